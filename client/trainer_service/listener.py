"""The trainer's listening address: a private Unix socket, or TCP with mutual TLS."""

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

MAX_SOCKET_PATH = 100  # bytes; the system's limit is 107
LOCK = "trainer.lock"
LINK_FILES = ("ca.crt", "trainer.crt", "trainer.key")  # in the link folder: the server side of the mutual TLS


@contextmanager
def exclusive_state_dir(state: Path) -> Iterator[None]:
    """Create the state folder with mode 0700 and lock it for this process.

    Raises StateError when another process holds the lock, or when the folder cannot be created.
    """
    try:
        state.mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)
    except OSError as error:
        raise StateError(
            "trainer.state",
            "a folder owned by this user",
            f"{state} ({error.strerror})",
            message=f"Cannot create {state} or change its mode: {error.strerror}.",
            hint="trainer.state must name a folder that this user owns or can create.",
        ) from None
    with exclusive_lock(state / LOCK, "trainer"):
        yield


def listen(server: grpc.aio.Server, settings: TrainerSettings) -> str:
    """Bind the server to the site file's ``trainer.listen`` and return the address.

    Raises ConfigError for an invalid address, StateError when it cannot be bound.
    """
    try:
        if settings.listen.startswith(UNIX):
            return _listen_on_socket(server, settings)
        host, _, port = settings.listen.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError("trainer.listen", "unix:PATH or HOST:PORT", repr(settings.listen))
        return f"{host}:{server.add_secure_port(settings.listen, _mutual_tls(Path(settings.link)))}"
    except RuntimeError as error:
        if isinstance(error, ColoraError):
            raise
        raise StateError(
            "trainer.listen",
            "an address that this machine has and that is free",
            settings.listen,
            message=f"The trainer cannot listen on {settings.listen}.",
            hint="Choose an address of this machine and a free port.",
        ) from None


def remove_socket(settings: TrainerSettings) -> None:
    """Delete the Unix socket, if there is one."""
    if settings.listen.startswith(UNIX):
        Path(settings.listen.removeprefix(UNIX)).unlink(missing_ok=True)


def _listen_on_socket(server: grpc.aio.Server, settings: TrainerSettings) -> str:
    path = Path(settings.listen.removeprefix(UNIX))
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise ConfigError(
            "trainer.listen",
            f"a socket path of at most {MAX_SOCKET_PATH} bytes",
            str(path),
            message=f"The socket path {path} has {length} bytes; at most {MAX_SOCKET_PATH} are allowed.",
            hint="Choose a shorter path in trainer.listen.",
        )
    _prepare_socket_folder(path.parent)
    _remove_stale_socket(path)
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(target_of(settings.listen))
    finally:
        os.umask(umask)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode != 0o600:
        raise StateError(
            "trainer.listen",
            "a socket with mode 0600",
            f"{mode:04o} of {path}",
            message=f"The socket {path} has mode {mode:04o}, not 0600.",
            hint="Choose a path on a file system that keeps modes.",
        )
    return settings.listen


def _prepare_socket_folder(folder: Path) -> None:
    """Create the socket's folder, or check that this user owns it and no other user has access."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StateError(
            "trainer.listen",
            "a folder for the socket",
            f"{folder} ({error.strerror})",
            message=f"Cannot create the socket's folder {folder}: {error.strerror}.",
        ) from None
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() or mode & 0o077:
        raise StateError(
            "trainer.listen",
            "a socket folder of this user with mode 0700",
            f"{folder} (mode {mode:04o}, user {status.st_uid})",
            message=f"Other users can access the socket's folder {folder} (mode {mode:04o}, user {status.st_uid}).",
            hint="Choose a folder that this user owns, with mode 0700.",
        )


def _remove_stale_socket(path: Path) -> None:
    """Delete the socket of a dead process.

    Raises StateError when a process listens on it, or when the path is another kind of file.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StateError(
                "trainer.listen",
                "a path for a socket",
                f"another kind of file, {path}",
                message=f"{path} is not a socket.",
                hint="Remove the file, or choose another path in trainer.listen.",
            )
    except FileNotFoundError:
        return
    message, problem = f"Another process listens on {path}.", "a live process"
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            message, problem = f"Cannot connect to the socket {path}: {error.strerror}.", str(error.strerror)
    raise StateError("trainer.listen", "a free socket path", f"{path} ({problem})", message=message)


def _mutual_tls(link: Path) -> grpc.ServerCredentials:
    """Return TLS credentials of the site's own authority that require a client certificate of it."""
    try:
        ca, certificate, key = ((link / name).read_bytes() for name in LINK_FILES)
    except OSError as error:
        raise StateError(
            "trainer.link",
            ", ".join(LINK_FILES),
            f"{error.filename} ({error.strerror})",
            message=f"Cannot read the certificate file {error.filename}: {error.strerror}.",
            hint=f"A trainer on HOST:PORT needs a trainer.link folder with {', '.join(LINK_FILES)}.",
        ) from None
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
