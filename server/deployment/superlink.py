"""Flower's SuperLink as the coordinator runs it: on loopback, with the sites' keys registered, for one stub app.

The app that Flower ships to the sites has no code of its own. It imports the colora that is installed on each side,
and the ServerApp reads its input from the run folder.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.atomic_io import write_atomically
from ...common.errors import StateError
from ...common.flower_compat import TASK_POLL_INTERVAL
from ...common.processes.supervised import Command, SupervisedProcess, free_port, program
from ..flower_compat import (
    build_app_bundle,
    list_nodes,
    open_control_api,
    public_key_bytes,
    register_node,
    start_run,
    stop_unfinished_runs,
    unregister_node,
)

if TYPE_CHECKING:
    from ..flower_compat import ControlHttpClient

STUB = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "colora-run"
version = "1.0.0"
description = "Runs the colora that is installed on each side."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "colora"

[tool.flwr.app.components]
serverapp = "colora_stub.server:app"
clientapp = "colora_stub.client:app"

[tool.flwr.app.config]
""",
    "colora_stub/__init__.py": "",
    "colora_stub/server.py": "from colora.server.server_app import app as _app\n\napp = _app\n",
    "colora_stub/client.py": "from colora.client.client_app import app as _app\n\napp = _app\n",
}
POLLING = {TASK_POLL_INTERVAL: "0.5"}  # seconds between two checks for a task to start
RUN_FOLDER = "COLORA_RUN"  # environment variable of the ServerApp
PAGE = 1 << 16  # bytes per page of the message database; SQLite's default of 4 KiB is 2.5 times slower


@dataclass(frozen=True)
class Certificates:
    """The coordinator's certificates, as ``colora provision`` writes them (PEM)."""

    ca: Path
    certificate: Path
    key: Path


class SuperLink:
    """A ``flower-superlink`` process with its database in ``home``. Without certificates it does not check keys."""

    def __init__(self, home: Path, run: Path, log: Path, certificates: Certificates | None) -> None:
        self.home, self.certificates, self.app = home, certificates, b""
        self.port, self.health_port, self.database = free_port(), free_port(), home / "state.sqlite"
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--database", str(self.database)]
        arguments += ["--health-server-address", f"127.0.0.1:{self.health_port}"]
        arguments += ["--disable-runtime-dependency-installation", *self._security()]
        environment = {**POLLING, "FLWR_HOME": str(home), RUN_FOLDER: str(run)}
        self.child = SupervisedProcess(
            Command("superlink", (program("flower-superlink"), *arguments), log, environment)
        )

    def _security(self) -> list[str]:
        if self.certificates is None:
            return ["--insecure"]
        files = {
            "--ssl-ca-certfile": self.certificates.ca,
            "--ssl-certfile": self.certificates.certificate,
            "--ssl-keyfile": self.certificates.key,
        }
        return ["--enable-supernode-auth", *(str(word) for pair in files.items() for word in pair)]

    @property
    def url(self) -> str:
        """The URL at which the gateway reaches it."""
        return f"{'https' if self.certificates else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process. It accepts connections a few seconds later."""
        self.home.mkdir(parents=True, exist_ok=True)
        for name, text in STUB.items():
            write_atomically(self.home / "app" / name, text.encode(), lasting=False)
        if not self.database.exists():
            _create(self.database)
        self.child.start()

    def register(self, keys: Mapping[str, bytes]) -> None:
        """Register the sites' public keys (OpenSSH) under the sites' names, and remove all other keys."""
        with self._control() as control:
            known = {node.name: node for node in list_nodes(control)}
            current = {name: point_of(key, name) for name, key in keys.items()}
            for name, node in known.items():
                if current.get(name) != node.public_key:
                    unregister_node(control, node.node_id)
            for name, key in current.items():
                if name not in known or known[name].public_key != key:
                    register_node(control, name, key)

    def prepare(self) -> None:
        """Build the stub app and import what ``submit`` needs, while the SuperLink starts."""
        self.app = build_app_bundle(self.home / "app")

    def submit(self) -> int:
        """Stop earlier runs, start a new run of the stub app, and return its Flower run id.

        Flower counts a run as running for a minute after its ServerApp died. Without stopping it, a SuperNode would
        wait that long for the rest of a message that the ServerApp was sending.
        """
        with self._control() as control:
            stop_unfinished_runs(control)
            return start_run(control, self.app)

    def online(self) -> list[str]:
        """Return the names of the sites whose SuperNodes are online; names are empty for sites without keys."""
        with self._control() as control:
            return [node.name for node in list_nodes(control) if node.status == "online"]

    def _control(self) -> ControlHttpClient:
        return open_control_api(f"127.0.0.1:{self.port}", self.certificates.ca if self.certificates else None)


def _create(path: Path) -> None:
    """Create an empty database with pages of :data:`PAGE` bytes. Raises StateError."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute(f"PRAGMA page_size = {PAGE}")
            database.execute("VACUUM")  # writes the file
    except sqlite3.Error as error:
        raise StateError(
            str(path), "a path for a database", error, message=f"The database {path} could not be created: {error}."
        ) from None


def point_of(key: bytes, site: str) -> bytes:
    """Convert a public key (OpenSSH) to the form in which Flower sends and stores it. Raises StateError."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        loaded = load_ssh_public_key(key)
        problem = "" if isinstance(loaded, ec.EllipticCurvePublicKey) else type(loaded).__name__
    except ValueError as error:
        loaded, problem = None, str(error)
    if not isinstance(loaded, ec.EllipticCurvePublicKey):
        raise StateError(
            "public key",
            "an OpenSSH ECDSA key",
            problem,
            site=site,
            message=f"Its public key is not an OpenSSH ECDSA key: {problem}.",
            hint=f"Copy sites/{site}.pub again from the folder that colora provision wrote.",
        )
    return public_key_bytes(loaded)
