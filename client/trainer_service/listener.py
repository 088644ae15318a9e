"""Where the trainer listens, and who may come in: a private Unix socket, or TCP with TLS on both sides."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio

from ...common.config.site_schema import TrainerSettings
from ...common.errors import ColoraError, ConfigError, StateError
from ...common.processes.supervised import exclusive_lock
from .serde import UNIX, target_of

LONGEST = 100  # bytes of a socket's path; the system's limit is 107
LOCK = "trainer.lock"


@contextmanager
def exclusive_state_dir(state: Path) -> Iterator[None]:
    """Holds the state folder, which is this user's only, for this process. Raises StateError when another has it."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)
    except OSError as error:
        raise StateError("trainer.state", "a folder of this user", f"{state} ({error.strerror})") from None
    with exclusive_lock(state / LOCK, "trainer"):
        yield


def listen(server: grpc.aio.Server, settings: TrainerSettings) -> str:
    """Opens the door that the site file names and returns its address. Raises ConfigError or StateError."""
    try:
        if settings.listen.startswith(UNIX):
            return _listen_here(server, settings)
        host, _, port = settings.listen.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError("trainer.listen", "unix:PATH or HOST:PORT", repr(settings.listen))
        return f"{host}:{server.add_secure_port(settings.listen, _both_sides(Path(settings.link)))}"
    except RuntimeError as error:
        if isinstance(error, ColoraError):
            raise
        raise StateError("trainer.listen", "an address that can be listened at", settings.listen) from None


def remove_socket(settings: TrainerSettings) -> None:
    """Takes the socket away, if there is one."""
    if settings.listen.startswith(UNIX):
        Path(settings.listen.removeprefix(UNIX)).unlink(missing_ok=True)


def _listen_here(server: grpc.aio.Server, settings: TrainerSettings) -> str:
    path = Path(settings.listen.removeprefix(UNIX))
    if len(os.fsencode(path)) > LONGEST:
        raise ConfigError("trainer.listen", f"a socket path of at most {LONGEST} bytes", str(path))
    _private(path.parent)
    _clear(path)
    old = os.umask(0o177)
    try:
        server.add_insecure_port(target_of(settings.listen))
    finally:
        os.umask(old)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode != 0o600:
        raise StateError("trainer.listen", "a socket of mode 0600", f"{mode:04o} of {path}")
    return settings.listen


def _private(folder: Path) -> None:
    """The folder of a socket, made here or already this user's own and nobody else's."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StateError("trainer.listen", "a folder for the socket", f"{folder} ({error.strerror})") from None
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        mode = f"{stat.S_IMODE(found.st_mode):04o}, user {found.st_uid}"
        raise StateError("trainer.listen", "a socket folder of this user, mode 0700", f"{folder} ({mode})")


def _clear(path: Path) -> None:
    """Removes the socket that a dead process left. Raises StateError when somebody listens, or it is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StateError("trainer.listen", "a path for a socket", f"another kind of file, {path}")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as trial:
        try:
            trial.connect(str(path))
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            raise StateError("trainer.listen", "a free socket path", f"{path} ({error.strerror})") from None
    raise StateError("trainer.listen", "a free socket path", f"a live process at {path}")


def _both_sides(link: Path) -> grpc.ServerCredentials:
    """TLS with the site's own authority: the trainer shows its certificate, and asks for one."""
    try:
        ca, certificate, key = ((link / name).read_bytes() for name in ("ca.crt", "trainer.crt", "trainer.key"))
    except OSError as error:
        wanted = "ca.crt, trainer.crt and trainer.key, as a trainer at HOST:PORT needs TLS on both sides"
        raise StateError("trainer.link", wanted, f"{error.filename} ({error.strerror})") from None
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
