"""``colora provision``: writes keys, certificates and site files for a coordinator and its sites.

    keys/ca.crt ca.key                        the certificate authority, which also signs sites that are added later
    keys/roster.pub                           the sites' public keys for secure aggregation
    keys/coordinator/                         for the coordinator:
        ca.crt server.crt server.key              its TLS certificate
        sites/NAME.pub                            the sites' public keys
        roster.pub                                those for secure aggregation: it names sites that sign wrongly
    keys/sites/NAME/                          for one site:
        site.toml ca.crt site.key                 its site file, the authority's certificate and its key
        aggregation.key roster.pub                its key for secure aggregation, and the public keys of all sites
        link/ca.crt trainer.crt trainer.key node.crt node.key    TLS between its trainer and its SuperNode

The roster must not come from the coordinator: with one of its own making, it could pretend to be sites. ``--add``
writes a longer one into all site folders that are still there. The other sites need a copy.

Each site's link has an authority of its own. Its private key is not stored, so no further certificates can be signed.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic.dataclasses import dataclass

from ....common.atomic_io import write_atomically
from ....common.config.loader import read_toml
from ....common.config.schema import STRICT, Name, parse
from ....common.config.site_schema import ORDINARY
from ....common.errors import ConfigError, StateError
from .certificates import CLIENT, SERVER, Authority, Pair, hosts_of, new_site_key

LOCAL_HOSTS = ("localhost", "127.0.0.1")  # in each server certificate: the gateway and local trials use them
ROSTER = "roster.pub"
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


@dataclass(frozen=True, config=STRICT)
class CoordinatorPlan:
    """The address at which sites reach the coordinator, and its other names."""

    address: str  # host:port
    names: tuple[str, ...] = ()  # further host names and IP addresses of the coordinator


@dataclass(frozen=True, config=STRICT)
class KeyHolder:
    """A site that receives a key."""

    name: Name


@dataclass(frozen=True, config=STRICT)
class KeyPlan:
    """The input of ``colora provision``, a TOML file."""

    coordinator: CoordinatorPlan
    site: tuple[KeyHolder, ...] = ()
    secure_aggregation: bool = False  # the sites refuse recipes without privacy.secure_aggregation


def provision(plan: Path, out: Path, *, add: bool = False) -> list[str]:
    """Write the folder ``out``, or with ``add`` the sites that it lacks, and return the names of the new sites.

    The folder, or each added site, is written completely or not at all, and existing files are never overwritten.
    Raises ConfigError for the plan and StateError for files on disk.
    """
    keys = read_plan(plan)
    if add:
        return _add(keys, out)
    if out.exists() or out.is_symlink():
        raise StateError(
            str(out),
            "a new folder",
            "an existing path",
            message=f"{out} already exists.",
            hint="Choose another --out, or use --add to add new sites to it.",
        )
    authority, names = Authority.new("colora"), [site.name for site in keys.site]
    with _staging_folder(out.parent, out.name) as folder:
        _write_pair(folder, "ca", authority.pair)
        coordinator, sites = _folder(folder / "coordinator"), _folder(folder / "sites")
        public = _folder(coordinator / "sites")
        server = authority.sign("coordinator", "coordinator", SERVER, hosts_for(keys.coordinator))
        _write_pair(coordinator, "server", server)
        write_public(coordinator / "ca.crt", authority.pair.certificate)
        made = {name: _make_site(sites / name, name, keys, authority) for name in names}
        for name in names:
            write_public(public / f"{name}.pub", made[name].public)
        roster = b"".join(made[name].aggregation for name in names)
        for place in (folder, coordinator, *(sites / name for name in names)):
            write_public(place / ROSTER, roster)
        _move_into_place(folder, out)
    return names


def read_plan(path: Path) -> KeyPlan:
    """Read and check the input file. Raises ConfigError."""
    keys = parse(KeyPlan, read_toml(path))
    hosts_for(keys.coordinator)
    if not keys.site:
        message, hint = "The file names no sites.", "Add a [[site]] table with a name for each site."
        raise ConfigError("site", "[[site]] tables", "none", message=message, hint=hint)
    names = [site.name.casefold() for site in keys.site]  # host names and some file systems ignore case
    twice = next((site.name for site in keys.site if names.count(site.name.casefold()) > 1), None)
    if twice:
        message = f"site.name: {twice!r} is used more than once; upper and lower case count as the same."
        raise ConfigError("site.name", "a unique name for each site", f"{twice!r} twice", message=message)
    return keys


def hosts_for(coordinator: CoordinatorPlan) -> tuple[str, ...]:
    """Return all host names and IP addresses of the coordinator's certificate. Raises ConfigError."""
    for name in coordinator.names:
        _check_host(name, "coordinator.names", name)
    hosts = (host_of(coordinator.address), *coordinator.names)
    return tuple(dict.fromkeys((*map(_normalized, hosts), *LOCAL_HOSTS)))


def host_of(address: str) -> str:
    """Return the host of ``host:port`` or ``[IPv6]:port``. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError("coordinator.address", "host:port", repr(address))
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError("coordinator.address", "host:port, an IPv6 address in brackets", repr(address))
    _check_host(host, "coordinator.address", address)
    return host


def _check_host(host: str, key: str, value: str) -> None:
    numeric = host.rpartition(".")[2].isdigit()  # as in a mistyped IP address
    if not _is_ip(host) and (numeric or not HOST.fullmatch(host)):
        expected = "a host name (ASCII, non-ASCII names in their xn-- form) or an IP address"
        raise ConfigError(key, f"host:port with {expected}" if key.endswith("address") else expected, repr(value))


def _is_ip(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host)) and "%" not in host
    except ValueError:
        return False


def _normalized(host: str) -> str:
    return str(ipaddress.ip_address(host)) if _is_ip(host) else host.lower()


def _add(keys: KeyPlan, out: Path) -> list[str]:
    """Add the sites that have no public key yet. A site's folder may be gone, since it is handed to the site."""
    authority = _authority_of(out, keys)
    sites, public = out / "sites", out / "coordinator" / "sites"
    known = {path.stem.casefold() for path in public.glob("*.pub")}
    new = [site.name for site in keys.site if site.name.casefold() not in known]
    folders = {path.name.casefold() for path in sites.glob("*")}
    orphan = next((name for name in new if name.casefold() in folders), None)
    if orphan:
        raise StateError(
            str(sites / orphan),
            str(public / f"{orphan}.pub"),
            "no such file",
            message=f"{sites / orphan} exists, but its public key {public / orphan}.pub does not.",
            hint="Delete the folder to create a new key, or remove the site from the list.",
        )
    if not new:
        _write_rosters(out)
        return []
    with _staging_folder(out, "new") as folder:
        created = {name: _make_site(folder / name, name, keys, authority) for name in new}
        roster = _known_roster(out) | {name: made.aggregation for name, made in created.items()}
        for name in new:
            write_public(folder / name / ROSTER, b"".join(roster.values()))
        _folder(sites, exist_ok=True)
        for name, made in created.items():
            _move_into_place(folder / name, sites / name)
            try:
                write_public(public / f"{name}.pub", made.public)
            except StateError:
                shutil.rmtree(sites / name)
                raise
    _write_rosters(out)
    return new


def _known_roster(out: Path) -> dict[str, bytes]:
    """The lines of the roster by site, with those of sites whose addition was interrupted.

    Empty for a folder of an earlier version, which had none.
    """
    lines = _roster_lines(out)
    for folder in sorted(path for path in (out / "sites").glob("*") if path.is_dir()):
        lines |= {name: line for name, line in _roster_lines(folder).items() if name == folder.name}
    return lines


def _roster_lines(folder: Path) -> dict[str, bytes]:
    path = folder / ROSTER
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return {line.split()[-1].decode(): line for line in lines if line.strip()}


def _write_rosters(out: Path) -> None:
    """Write the whole roster into the folder, the coordinator's, and those of the sites that are still there."""
    roster = b"".join(_known_roster(out).values())
    for place in (out, out / "coordinator", *sorted(path for path in (out / "sites").glob("*") if path.is_dir())):
        path = place / ROSTER
        if roster and not (path.exists() and path.read_bytes() == roster):
            write_public(path, roster)


def _authority_of(out: Path, keys: KeyPlan) -> Authority:
    """Load the authority in ``out``. The coordinator's certificate must cover the address that new sites receive."""
    hint = "Use the folder that colora provision wrote."
    try:
        authority = Authority.read(Pair((out / "ca.crt").read_bytes(), (out / "ca.key").read_bytes()))
        served = hosts_of((out / "coordinator" / "server.crt").read_bytes())
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        message = f"{out} is not a complete folder of keys: {reason}."
        raise StateError(str(out), "a folder of keys", reason, message=message, hint=hint) from None
    except (ValueError, TypeError) as error:
        message = f"ca.crt and ca.key in {out} cannot be used: {error}."
        raise StateError(str(out), "a certificate authority", error, message=message, hint=hint) from None
    missing = [host for host in hosts_for(keys.coordinator) if host not in served]
    if missing:
        certificate, names = out / "coordinator" / "server.crt", ", ".join(sorted(served))
        raise ConfigError(
            "coordinator",
            f"names in {names}",
            missing[0],
            message=f"coordinator: {missing[0]} is not a name of the certificate {certificate} ({names}).",
            hint="Use one of its names, or provision a new folder.",
        )
    return authority


class MadeSite(NamedTuple):
    """The public keys of a new site: for the coordinator, and for secure aggregation."""

    public: bytes
    aggregation: bytes


def _make_site(folder: Path, name: str, keys: KeyPlan, authority: Authority) -> MadeSite:
    """Create a site's folder without the roster."""
    _folder(folder)
    private, public = new_site_key(name)
    write_private(folder / "site.key", private)
    private, aggregation = new_site_key(name)
    write_private(folder / "aggregation.key", private)
    write_public(folder / "ca.crt", authority.pair.certificate)
    write_public(folder / "site.toml", _site_file(name, keys).encode())
    link, link_authority = _folder(folder / "link"), Authority.new(f"link of {name}")
    write_public(link / "ca.crt", link_authority.pair.certificate)
    hosts = (*LOCAL_HOSTS, "trainer", f"trainer-{name}".lower())  # the last two are containers
    _write_pair(link, "trainer", link_authority.sign("trainer", name, SERVER, hosts))
    _write_pair(link, "node", link_authority.sign("node", name, CLIENT))
    return MadeSite(public, aggregation)


def _site_file(name: str, keys: KeyPlan) -> str:
    optimizers, secure = json.dumps(ORDINARY.optimizers), "" if keys.secure_aggregation else "# "
    address = keys.coordinator.address
    return SITE.format(name=name, address=address, limits=ORDINARY, optimizers=optimizers, secure=secure)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read (mode 0600 from its creation)."""
    write_atomically(path, data)


def write_public(path: Path, data: bytes) -> None:
    """Write a file that everyone with access to its folder can read (mode 0644)."""
    write_atomically(path, data)
    path.chmod(0o644)


def _write_pair(folder: Path, name: str, pair: Pair) -> None:
    write_public(folder / f"{name}.crt", pair.certificate)
    write_private(folder / f"{name}.key", pair.key)


def _folder(path: Path, *, exist_ok: bool = False) -> Path:
    path.mkdir(mode=0o700, exist_ok=exist_ok)
    return path


@contextmanager
def _staging_folder(parent: Path, name: str) -> Iterator[Path]:
    """A temporary folder on the target's file system. What has not been moved out of it is deleted at the end."""
    folder = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}."))
        yield folder
    except OSError as error:
        reason = error.strerror or error
        message = f"Cannot write to {parent}: {reason}."
        raise StateError(str(parent), "a folder that can be written to", reason, message=message) from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(folder: Path, target: Path) -> None:
    if target.exists():
        message = f"{target} was created by another process in the meantime."
        raise StateError(str(target), "a path that does not exist", "an existing path", message=message)
    folder.rename(target)


SITE = """\
# The site file of {name}. Relative paths start at this folder. Keep site.key secret.
#
#   colora client site.toml --check     checks the setup
#   colora client site.toml             takes part in the federation

name = "{name}"
# on_unprepared = "wait"           # in a transfer, if this site prepared nothing: "wait", "evaluate" or "retrain"

[data]
source = ""                        # REQUIRED: "rows.csv" (.jsonl .tsv .parquet), asset:NAME/SPLIT, or a hub data set id
# test_source = "test.csv"         # default: a quarter of the rows is held out (test_fraction)
# task = "classification"          # or "generation", with the columns prompt and completion
# text = "text"                    # column names
# label = "label"

[coordinator]
address = "{address}"
ca = "ca.crt"
key = "site.key"

[trainer]                          # the process that has the base model, the data and the personal state
# listen = "unix:state/trainer.sock"   # or HOST:PORT between containers, with TLS by the certificates in link/
# state = "state"
# aggregation_key = "aggregation.key"  # of secure aggregation; keep it secret
# roster = "roster.pub"            # public keys of all sites; compare it with the other sites
# device = "auto"                  # or "cpu", "cuda:0"
# threads = 4                      # default: all cores
# precision = "int4"               # of the base model, instead of the recipe's; for a small GPU
# gradient_checkpointing = true
# micro_batch = 2                  # examples per forward pass; default: as many as fit
# seeds = "secret"                 # or "recipe": a simulation can then repeat the run, and the coordinator knows them

[allow]                            # limits for the coordinator's requests; most unset keys allow everything
# An update over few tokens shows them. Ordinary recipes are within these limits.
max_rank = {limits.max_rank}                       # a recipe with a larger rank trains at this one here, or is refused
min_examples = {limits.min_examples}                  # steps of a round × batch size
min_batch_size = {limits.min_batch_size}
min_max_length = {limits.min_max_length}
optimizers = {optimizers}
max_evaluations = {limits.max_evaluations}                # different requests of one round that get metrics
max_requests_per_day = {limits.max_requests_per_day}
# require_clipping = true          # a recipe must set train.max_update_norm
# max_epsilon = 8.0                # privacy budget of all federations; refuses recipes without [privacy]
# max_delta = 1e-5                 # of the same
# min_noise = 0.5                  # noise multiplier; refuses recipes without [privacy]
{secure}require_secure_aggregation = true  # the coordinator gets the sum of the updates only
# min_sites = 3                    # smallest number of sites in such a sum
# metrics = "rounded"              # or "none"; default: "all"
# federations = ["my-federation"]
# models = ["sentence-transformers/all-MiniLM-L6-v2"]  # "NAME@REVISION" allows a recipe's model.revision
# methods = ["colora"]             # "colora+head" also allows a recipe to share the head; forbidden by default
# max_steps = 100                  # optimizer steps per round
# max_seconds = 600                # training and evaluation time per round
# max_tokens = 256                 # per text
# max_rounds = 50
# max_batch_size = 64              # in training, evaluation and generation
# max_new_tokens = 256             # generated per example or prompt
# max_calls = 500                  # of a generator in a transfer
# max_samples = 1000               # synthetic texts in a transfer
# max_epochs = 20                  # passes over them
# max_disk = 20.0                  # GB in the state folder of one federation
# precision = ["fp32"]
# max_seeds = 5                    # examples that are kept for a transfer to a new base model; 0 forbids transfers
# tuned_generator = false          # true: may also keep a LoRA that imitates this site's texts and may repeat them

# [private]                        # a private adapter of this site, instead of the recipe's
# kind = "multilora"               # or "lora"

# [tracking]                       # what this site measures, to trackers of its own
# trackers = ["tensorboard"]       # also "wandb", "mlflow", "trackio"
"""
