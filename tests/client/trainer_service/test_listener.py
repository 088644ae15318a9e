"""The trainer's address: a socket for this user only, or TLS with certificates of the site on both sides."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from colora.client.trainer_service import listener
from colora.common.config.schema import to_json
from colora.common.config.site_schema import TrainerSettings
from colora.common.errors import ColoraError, ConfigError, StateError
from colora.common.processes.supervised import free_port
from colora.server.deployment.provisioning.provision import provision

if TYPE_CHECKING:
    from conftest import SiteSetup


def listening(settings: TrainerSettings, look: Any = None) -> Any:
    """Listen, call ``look``, and stop."""

    async def run() -> Any:
        server = grpc.aio.server()
        try:
            listener.listen(server, settings)
            return look() if look else None
        finally:
            await server.stop(None)

    return asyncio.run(run())


# --- the socket -------------------------------------------------------------------------------------------------------


def test_the_socket_is_private_from_the_moment_it_is_there(tmp_path: Path) -> None:
    """Right after binding; the process's umask is unchanged."""
    path = tmp_path / "socket of Ådå 50%" / "t.sock"
    old = os.umask(0)
    try:
        modes = listening(
            TrainerSettings(listen=f"unix:{path}"),
            lambda: [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent)],
        )
        assert os.umask(0) == 0
    finally:
        os.umask(old)
    assert modes == [0o600, 0o700]


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 100 are allowed"):
        listening(TrainerSettings(listen=f"unix:{tmp_path}/{'ä' * 60}"))


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(StateError, match=r"Other users can access the socket's folder .* \(mode 0755, user "):
        listening(TrainerSettings(listen=f"unix:{tmp_path}/t.sock"))
    tmp_path.chmod(0o700)
    listening(TrainerSettings(listen=f"unix:{tmp_path}/t.sock"))


def test_the_socket_of_a_dead_process_is_replaced_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "socket"
    folder.mkdir(mode=0o700)
    settings = TrainerSettings(listen=f"unix:{folder}/t.sock")
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(folder / "t.sock"))
        live.listen()
        with pytest.raises(StateError, match=r"Another process listens on .*/t.sock"):
            listening(settings)
        live.getsockname()
    assert (folder / "t.sock").exists()  # closed, as after a kill
    listening(settings)


def test_a_file_that_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    folder = tmp_path / "socket"
    folder.mkdir(mode=0o700)
    (folder / "t.sock").write_text("thesis")
    with pytest.raises(StateError, match=r"t.sock is not a socket"):
        listening(TrainerSettings(listen=f"unix:{folder}/t.sock"))
    assert (folder / "t.sock").read_text() == "thesis"


def test_a_state_folder_is_made_private_and_has_one_trainer(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    with listener.exclusive_state_dir(state):
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        with (
            pytest.raises(StateError, match=f"process {os.getpid()}"),
            listener.exclusive_state_dir(state),
        ):
            pass
    with listener.exclusive_state_dir(state):
        pass


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of two sites, ada and bob."""
    folder = tmp_path_factory.mktemp("keys")
    plan = folder / "sites.toml"
    plan.write_text('[coordinator]\naddress = "127.0.0.1:9999"\n[[site]]\nname = "ada"\n[[site]]\nname = "bob"\n')
    provision(plan, folder / "keys")
    return folder / "keys" / "sites"


@pytest.fixture
def remote(site_setup: SiteSetup, keys: Path) -> SiteSetup:
    """A site whose trainer listens on TCP."""
    link = f'link = "{keys}/ada/link"'
    site_setup.configure(listen=f"127.0.0.1:{free_port()}", trainer=link).start()
    return site_setup


def test_over_tls_comes_the_same_reply(remote: SiteSetup, keys: Path) -> None:
    plan = remote.plan()
    request = remote.request(plan)
    site = remote.client(link=str(keys / "ada" / "link"))
    assert site.site_info(plan.name, to_json(plan)).site == "ada"
    assert remote.equal(site.handle(request), remote.expected(plan, request)[0])


def test_who_has_no_certificate_of_the_link_does_not_come_in(remote: SiteSetup, keys: Path) -> None:
    """No TLS, TLS without a certificate, and another site's certificate, whose owner also rejects the trainer."""
    link, plan = keys / "ada" / "link", remote.plan()
    ca = (link / "ca.crt").read_bytes()
    named = [("grpc.ssl_target_name_override", "trainer")]
    other = [(keys / "bob" / "link" / name).read_bytes() for name in ("node.key", "node.crt")]
    channels = {
        "plain": grpc.insecure_channel(remote.address),
        "no certificate": grpc.secure_channel(remote.address, grpc.ssl_channel_credentials(ca), named),
        "bob's": grpc.secure_channel(remote.address, grpc.ssl_channel_credentials(ca, *other), named),
    }
    for channel in channels.values():
        with channel:
            call = channel.unary_unary("/colora.trainer.v1.Trainer/GetSiteInfo")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"did not answer within 0.1 s"):
        remote.client(link=str(keys / "bob" / "link"), patience=0.1).site_info(plan.name, to_json(plan))
    assert remote.client(link=str(link)).site_info(plan.name, to_json(plan)).site == "ada"


def test_a_site_without_its_link_listens_to_no_network(tmp_path: Path) -> None:
    settings = TrainerSettings(listen=f"127.0.0.1:{free_port()}", link=str(tmp_path))
    with pytest.raises(StateError, match=r"ca.crt: No such file or directory. A trainer on HOST:PORT needs a"):
        listening(settings)
    for address in ("nowhere", ":", "host:", "host:http"):
        with pytest.raises(ConfigError, match=r"trainer.listen: expected unix:PATH or HOST:PORT"):
            listening(TrainerSettings(listen=address, link=str(tmp_path)))


def test_a_port_in_use_is_named(keys: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StateError, match=rf"cannot listen on {address}"):
            listening(TrainerSettings(listen=address, link=str(keys / "ada" / "link")))


def test_a_link_that_is_no_certificate_is_an_error_of_ours(tmp_path: Path) -> None:
    for name in ("ca.crt", "trainer.crt", "trainer.key"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(ColoraError):
        listening(TrainerSettings(listen=f"127.0.0.1:{free_port()}", link=str(tmp_path)))
