"""``colora provision``: its files work with TLS and Flower, are private, and are never overwritten."""

from __future__ import annotations

import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.cli.supernode.register import try_load_public_key

from colora.cli import main
from colora.common.config.loader import load_site
from colora.common.config.schema import parse
from colora.common.config.site_schema import ORDINARY, AllowSettings, SiteSettings, TrainerSettings
from colora.common.errors import ColoraError, ConfigError, StateError
from colora.common.secure_aggregation.identity import read_identity
from colora.server.deployment.provisioning import provision as module
from colora.server.deployment.provisioning.provision import provision

PLAN: dict[str, Any] = {
    "coordinator": {"address": "fed.example.org:9443", "names": ["10.0.0.5", "gate"]},
    "site": [{"name": "north"}, {"name": "South.2"}],
}
NAMES = ("north", "South.2", "west", "east")  # with two that are added
LINK = {"ca.crt", "trainer.crt", "trainer.key", "node.crt", "node.key"}


def write_plan(folder: Path, raw: dict[str, Any] = PLAN) -> Path:
    path = folder / "sites.toml"
    path.write_text(tomli_w.dumps(raw))
    return path


def with_sites(*names: str) -> dict[str, Any]:
    return {**PLAN, "site": [{"name": name} for name in names]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The provisioned folder for PLAN; read-only."""
    folder = tmp_path_factory.mktemp("made")
    assert provision(write_plan(folder), folder / "keys") == ["north", "South.2"]
    return folder / "keys"


@pytest.fixture
def keys(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "keys")


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_has_what_everyone_needs_and_nothing_else(made: Path) -> None:
    expected = {
        "roster.pub",
        "ca.crt",
        "ca.key",
        "coordinator/ca.crt",
        "coordinator/server.crt",
        "coordinator/server.key",
        "coordinator/roster.pub",
    }
    for name in ("north", "South.2"):
        expected |= {f"coordinator/sites/{name}.pub"}
        own = ("site.toml", "ca.crt", "site.key", "aggregation.key", "roster.pub")
        expected |= {f"sites/{name}/{file}" for file in own}
        expected |= {f"sites/{name}/link/{file}" for file in LINK}
    files = content(made)
    assert set(files) == expected
    assert [p.name for p in made.parent.iterdir() if p.name.startswith(".")] == []
    keys = [data for name, data in files.items() if name.endswith(".key")]
    assert len(set(keys)) == len(keys)
    assert len({files[f"{where}ca.crt"] for where in ("", "coordinator/", "sites/north/", "sites/South.2/")}) == 1


def test_keys_are_for_their_owner_and_folders_for_nobody_else(made: Path) -> None:
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (made, *made.rglob("*"))}
    assert {mode for p, mode in modes.items() if p.is_dir()} == {0o700}
    assert {mode for p, mode in modes.items() if p.suffix == ".key"} == {0o600}
    assert {mode for p, mode in modes.items() if p.suffix in (".crt", ".pub", ".toml")} == {0o644}


@pytest.mark.parametrize("name", ["north", "South.2"])
def test_flower_reads_a_sites_key_pair(made: Path, name: str) -> None:
    private = load_ssh_private_key((made / "sites" / name / "site.key").read_bytes(), None)
    public_file = made / "coordinator" / "sites" / f"{name}.pub"
    public = load_ssh_public_key(public_file.read_bytes())
    assert private.public_key() == public
    assert public.curve.name == "secp384r1"  # type: ignore[union-attr]
    assert b"BEGIN PUBLIC KEY" in try_load_public_key(public_file)  # what `flwr supernode register` does
    assert public_file.read_text().endswith(f" {name}\n")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")
def test_openssh_derives_the_same_public_key(made: Path) -> None:
    derived = subprocess.check_output(["ssh-keygen", "-y", "-f", made / "sites/north/site.key"], text=True)
    assert derived.split()[:2] == (made / "coordinator/sites/north.pub").read_text().split()[:2]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
@pytest.mark.parametrize(
    ("ca", "certificate", "purpose"),
    [
        ("ca.crt", "coordinator/server.crt", "sslserver"),
        ("sites/north/link/ca.crt", "sites/north/link/trainer.crt", "sslserver"),
        ("sites/north/link/ca.crt", "sites/north/link/node.crt", "sslclient"),
    ],
)
def test_openssl_accepts_every_certificate_under_its_strict_rules(
    made: Path, ca: str, certificate: str, purpose: str
) -> None:
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", made / ca, made / certificate]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_certificates_serve_one_purpose_and_last_as_long_as_their_authority(made: Path) -> None:
    def read(name: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate((made / name).read_bytes())

    def purposes(name: str) -> list[x509.ObjectIdentifier]:
        return list(read(name).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert purposes("coordinator/server.crt") == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert purposes("sites/north/link/trainer.crt") == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert purposes("sites/north/link/node.crt") == [ExtendedKeyUsageOID.CLIENT_AUTH]
    authority = read("ca.crt")
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert read("coordinator/server.crt").not_valid_after_utc == authority.not_valid_after_utc
    years = (authority.not_valid_after_utc - authority.not_valid_before_utc).days / 365.25
    assert 10 <= years < 10.02
    assert read("sites/north/link/ca.crt").subject != read("sites/South.2/link/ca.crt").subject


@contextmanager
def tls_server(certificate: Path, key: Path) -> Iterator[int]:
    """A port where one TLS handshake after the other is answered."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                context.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, ConnectionError):
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("fed.example.org", True),
        ("10.0.0.5", True),
        ("gate", True),
        ("example.org", False),
        ("10.0.0.6", False),
    ],
)
def test_the_coordinators_certificate_is_for_its_names_only(made: Path, host: str, accepted: bool) -> None:
    context = ssl.create_default_context(cafile=made / "sites/north/ca.crt")
    context.verify_flags |= ssl.VERIFY_X509_STRICT

    def connect(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as plain:
            context.wrap_socket(plain, server_hostname=host).close()

    with tls_server(made / "coordinator/server.crt", made / "coordinator/server.key") as port:
        if accepted:
            connect(port)
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                connect(port)


class Echo(grpc.GenericRpcHandler):
    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, _context: request)


@pytest.mark.parametrize(
    ("node", "ca", "accepted"),
    [("north", "north", True), ("South.2", "north", False), (None, "north", False), ("north", "South.2", False)],
)
def test_a_link_is_between_a_sites_own_trainer_and_node(made: Path, node: str | None, ca: str, accepted: bool) -> None:
    def read(site: str, name: str) -> bytes:
        return (made / "sites" / site / "link" / name).read_bytes()

    pair = [(read("north", "trainer.key"), read("north", "trainer.crt"))]
    credentials = grpc.ssl_server_credentials(pair, read("north", "ca.crt"), require_client_auth=True)
    server = grpc.server(ThreadPoolExecutor(1), [Echo()])
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    own = (read(node, "node.key"), read(node, "node.crt")) if node else (None, None)
    channel = grpc.ssl_channel_credentials(read(ca, "ca.crt"), *own)
    try:
        with grpc.secure_channel(f"localhost:{port}", channel) as link:
            if accepted:
                assert link.unary_unary("/echo")(b"hello", timeout=10) == b"hello"
            else:
                with pytest.raises(grpc.RpcError):
                    link.unary_unary("/echo")(b"hello", timeout=10)
    finally:
        server.stop(None).wait()


def test_a_site_file_is_ready_but_for_its_data(made: Path) -> None:
    site = load_site(made / "sites/north/site.toml")
    assert (site.name, site.data.source) == ("north", "")
    assert site.coordinator is not None
    assert site.coordinator.address == "fed.example.org:9443"
    for path in (site.coordinator.ca, site.coordinator.key):
        assert Path(path).is_file()
    assert {p.name for p in Path(site.trainer.link).iterdir()} == LINK
    assert site.allow == ORDINARY


@pytest.mark.parametrize("secure", [True, False])
def test_the_sites_of_a_federation_with_secure_aggregation_refuse_recipes_without(tmp_path: Path, secure: bool) -> None:
    plan, keys = write_plan(tmp_path, {"secure_aggregation": secure, **PLAN}), tmp_path / "keys"
    provision(plan, keys)
    write_plan(tmp_path, {"secure_aggregation": secure, **with_sites("north", "west")})
    provision(plan, keys, add=True)
    for name in ("north", "South.2", "west"):
        file = keys / "sites" / name / "site.toml"
        file.write_text(file.read_text().replace('source = ""', 'source = "rows.csv"'))
        assert load_site(file).allow.require_secure_aggregation is secure


def test_every_commented_example_of_a_site_file_is_a_key_that_exists(made: Path) -> None:
    lines = (made / "sites/north/site.toml").read_text().splitlines()
    examples = [line.removeprefix("# ") if " = " in line or line.startswith("# [") else line for line in lines]
    raw = tomllib.loads("\n".join(examples))
    site = parse(SiteSettings, raw)
    assert set(raw["allow"]) == set(AllowSettings.__dataclass_fields__)
    assert set(raw["trainer"]) | {"link"} == set(TrainerSettings.__dataclass_fields__)
    defaults = TrainerSettings()
    assert (site.trainer.listen, site.trainer.state) == (defaults.listen, defaults.state)


def test_what_exists_is_never_written_over(keys: Path, tmp_path: Path) -> None:
    before, plan = content(keys), write_plan(tmp_path, with_sites("other"))
    with pytest.raises(StateError, match=r"keys already exists\. Choose another --out, or use --add"):
        provision(plan, keys)
    assert content(keys) == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(StateError):
        provision(plan, tmp_path / "empty")
    assert content(tmp_path / "empty") == {}


def test_add_makes_the_new_sites_only(keys: Path, tmp_path: Path) -> None:
    before, plan = content(keys), write_plan(tmp_path, with_sites("South.2", "west", "north", "east"))
    assert provision(plan, keys, add=True) == ["west", "east"]
    after = content(keys)
    kept = [name for name in before if not name.endswith("roster.pub")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    lines = before["roster.pub"].splitlines()
    rosters = [
        after[f"{place}roster.pub"].splitlines()
        for place in ("", "coordinator/", *(f"sites/{name}/" for name in NAMES))
    ]
    assert all(roster == rosters[0] for roster in rosters)
    assert rosters[0][: len(lines)] == lines  # who is in it stays in it
    assert sorted(line.split()[-1].decode() for line in rosters[0]) == sorted(NAMES)
    assert {name.split("/")[1] for name in set(after) - set(before) if name.startswith("sites/")} == {"west", "east"}
    assert {p.name for p in (keys / "sites/west/link").iterdir()} == LINK
    assert after["sites/west/ca.crt"] == before["ca.crt"]
    assert {p.name for p in keys.iterdir()} == {"ca.crt", "ca.key", "coordinator", "sites", "roster.pub"}
    assert "coordinator/sites/west.pub" in after
    assert provision(plan, keys, add=True) == []
    assert content(keys) == after


def test_a_site_whose_folder_was_handed_over_gets_no_second_key(keys: Path, tmp_path: Path) -> None:
    shutil.rmtree(keys / "sites")
    before = content(keys)
    assert provision(write_plan(tmp_path), keys, add=True) == []
    assert content(keys) == before
    assert provision(write_plan(tmp_path, with_sites("north", "west")), keys, add=True) == ["west"]


def test_a_site_whose_public_key_was_taken_away_does_not_come_back_by_itself(keys: Path, tmp_path: Path) -> None:
    (keys / "coordinator/sites/north.pub").unlink()
    with pytest.raises(
        StateError, match=r"sites/north exists, but its public key .*north\.pub does not\. Delete the folder"
    ):
        provision(write_plan(tmp_path), keys, add=True)
    assert not (keys / "coordinator/sites/north.pub").exists()


def test_add_wants_the_authority_and_the_same_address(keys: Path, tmp_path: Path) -> None:
    other = {**with_sites("west"), "coordinator": {"address": "moved.example.org:9443"}}
    with pytest.raises(ConfigError, match=r"moved\.example\.org is not a name of the certificate .*server\.crt"):
        provision(write_plan(tmp_path, other), keys, add=True)
    plan = write_plan(tmp_path, with_sites("west"))
    (keys / "ca.key").write_bytes((keys / "coordinator/server.key").read_bytes())
    with pytest.raises(StateError, match=r"ca\.crt and ca\.key in .* cannot be used: the key does not belong"):
        provision(plan, keys, add=True)
    (keys / "ca.key").unlink()
    with pytest.raises(StateError, match=r"is not a complete folder of keys: No such file"):
        provision(plan, keys, add=True)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("writes", [0, 3, 9])
def test_a_disk_that_fills_up_leaves_no_trace(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int, add: bool
) -> None:
    left, real = writes, module.write_atomically

    def until_full(path: Path, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StateError(str(path), "room and permission to write", "No space left on device")
        real(path, data)

    out, before = keys if add else tmp_path / "new", content(tmp_path)
    plan = write_plan(tmp_path, with_sites("west", "east") if add else PLAN)
    monkeypatch.setattr(module, "write_atomically", until_full)
    with pytest.raises(StateError, match="No space left"):
        provision(plan, out, add=add)
    plan.unlink()
    assert content(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == {"keys"}
    assert {p.name for p in (keys / "sites").iterdir()} == {"north", "South.2"}


def test_an_added_site_has_both_its_folder_and_its_public_key_or_neither(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.write_atomically

    def no_public(path: Path, data: bytes) -> None:
        if path.suffix == ".pub":
            raise StateError(str(path), "room and permission to write", "No space left on device")
        real(path, data)

    before, plan = content(keys), write_plan(tmp_path, with_sites("west"))
    monkeypatch.setattr(module, "write_atomically", no_public)
    with pytest.raises(StateError):
        provision(plan, keys, add=True)
    assert content(keys) == before
    monkeypatch.undo()
    assert provision(plan, keys, add=True) == ["west"]


def plan_with(**coordinator: object) -> dict[str, Any]:
    return {**PLAN, "coordinator": {"address": "fed.example.org:9443", **coordinator}}


NO_SITES = "The file names no sites. Add a [[site]] table with a name for each site."
TWICE = "site.name: 'a' is used more than once; upper and lower case count as the same."
BRACKETS = "expected host:port, an IPv6 address in brackets"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"site": PLAN["site"]}, "coordinator is missing."),
        ({**PLAN, "sites": []}, "There is no key sites. Did you mean 'site'?"),
        (plan_with(adress="x:1"), "There is no key coordinator.adress. Did you mean 'address'?"),
        ({**PLAN, "site": [{"name": "a", "key": "b"}]}, "There is no key site[0].key. The keys here are name."),
        ({**PLAN, "site": []}, NO_SITES),
        ({"coordinator": PLAN["coordinator"]}, NO_SITES),
        (with_sites("a", "b", "a"), TWICE),
        (with_sites("a", "A"), TWICE),
        (with_sites("../up"), "site[0].name must be a letter or digit, then"),
        (with_sites("a", ""), "site[1].name must be a letter or digit, then"),
        (plan_with(address="fed.example.org"), "coordinator.address: expected host:port, found 'fed.example.org'"),
        (plan_with(address=":9443"), "coordinator.address: expected host:port, found ':9443'"),
        (plan_with(address="fed:0"), "coordinator.address: expected host:port, found 'fed:0'"),
        (plan_with(address="fed:http"), "coordinator.address: expected host:port, found 'fed:http'"),
        (plan_with(address="https://fed:1"), f"coordinator.address: {BRACKETS}, found 'https://fed:1'"),
        (plan_with(address="::1:9443"), f"coordinator.address: {BRACKETS}, found '::1:9443'"),
        (plan_with(address='fe"d:1'), "coordinator.address: expected host:port with a host name"),
        (plan_with(address="10.0.0.256:1"), "coordinator.address: expected host:port with a host name"),
        (
            plan_with(names=["größe.org"]),
            "coordinator.names: expected a host name (ASCII, non-ASCII names in their xn-- form)",
        ),
        (plan_with(names=['fe80::1%a"b']), "coordinator.names: expected a host name"),
        (plan_with(names="10.0.0.5"), "coordinator.names must be a list, not '10.0.0.5'."),
    ],
)
def test_a_wrong_plan_is_refused_in_words_and_nothing_is_written(
    tmp_path: Path, raw: dict[str, Any], message: str
) -> None:
    plan = write_plan(tmp_path, raw)
    with pytest.raises(ColoraError) as refusal:
        provision(plan, tmp_path / "keys")
    assert str(refusal.value).startswith(message)
    assert [p.name for p in tmp_path.iterdir()] == ["sites.toml"]


def test_the_longest_names_and_an_ipv6_address_fit(tmp_path: Path) -> None:
    longest = "n" * 64
    raw = {**with_sites(longest), "coordinator": {"address": "[::1]:9443"}}
    assert provision(write_plan(tmp_path, raw), tmp_path / "keys") == [longest]
    served = module.hosts_of((tmp_path / "keys/coordinator/server.crt").read_bytes())
    assert served == {"::1", "localhost", "127.0.0.1"}
    assert module.hosts_of((tmp_path / f"keys/sites/{longest}/link/trainer.crt").read_bytes()) == {
        "localhost",
        "127.0.0.1",
        "trainer",
        f"trainer-{longest}",
    }


def test_the_command_says_what_goes_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["colora", "provision", "sites.toml", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return stop.value.code or 0, output.out, output.err

    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path, with_sites("north"))
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "keys/sites/north: send to site north" in out
    assert "keys/coordinator: copy to the coordinator" in out
    assert run() == (
        2,
        "",
        "colora: keys already exists. Choose another --out, or use --add to add new sites to it.\n",
    )
    write_plan(tmp_path, with_sites("north", "west"))
    assert run("--add")[:2][1].splitlines()[0] == "Added to keys: west"
    assert run("--add") == (0, "keys already has keys for all these sites.\n", "")


def test_every_site_finds_its_own_key_in_its_roster(made: Path) -> None:
    for name in ("north", "South.2"):
        folder = made / "sites" / name
        identity = read_identity(name, folder / "aggregation.key", folder / "roster.pub")
        assert set(identity.roster) == {"north", "South.2"}
    with pytest.raises(ConfigError, match=r"roster\.pub does not hold the public key of .*aggregation\.key"):
        read_identity("north", made / "sites/South.2/aggregation.key", made / "roster.pub")
    with pytest.raises(ConfigError, match=r"Secure aggregation needs .*none\.key .*cannot be read: No such file"):
        read_identity("north", made / "none.key", made / "roster.pub")
    with pytest.raises(ConfigError, match=r"ca\.key does not hold a private key"):
        read_identity("north", made / "ca.key", made / "roster.pub")


def test_an_interrupted_addition_is_completed_by_the_next(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the new site is there, and the rosters of the others are not: the next call writes them."""
    plan, real = write_plan(tmp_path, with_sites("west")), module._write_rosters
    monkeypatch.setattr(module, "_write_rosters", lambda out: None)
    assert provision(plan, keys, add=True) == ["west"]
    monkeypatch.setattr(module, "_write_rosters", real)
    assert b"west" not in (keys / "sites/north/roster.pub").read_bytes()
    assert provision(plan, keys, add=True) == []
    assert (keys / "sites/north/roster.pub").read_bytes() == (keys / "sites/west/roster.pub").read_bytes()
