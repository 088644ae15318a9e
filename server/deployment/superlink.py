"""Flower's SuperLink as the coordinator uses it: on loopback, sites known by their keys, one stub app to run.

What Flower ships to the sites says nothing: both sides run their own installed code, and what the ServerApp needs
stands in the run folder.
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
description = "Starts the colora that is installed on each side."
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
POLLING = {TASK_POLL_INTERVAL: "0.5"}  # seconds between a run and its ServerApp
RUN_FOLDER = "COLORA_RUN"  # environment of the ServerApp
PAGE = 1 << 16  # bytes of a page of the database, which holds messages: with SQLite's 4 KiB 2.5 times slower


@dataclass(frozen=True)
class Certificates:
    """What ``colora provision`` wrote for the coordinator."""

    ca: Path
    certificate: Path
    key: Path


class SuperLink:
    """A ``flower-superlink`` with its database below ``home``; without certificates it knows sites by no key."""

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
        """Where the gate finds it."""
        return f"{'https' if self.certificates else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it; it answers a few seconds later."""
        self.home.mkdir(parents=True, exist_ok=True)
        for name, text in STUB.items():
            write_atomically(self.home / "app" / name, text.encode(), lasting=False)
        if not self.database.exists():
            _create(self.database)
        self.child.start()

    def register(self, keys: Mapping[str, bytes]) -> None:
        """Makes the sites' public keys (OpenSSH) known under the sites' names; keys that are no longer theirs go."""
        with self._control() as control:
            known = {node.name: node for node in list_nodes(control)}
            wanted = {name: point_of(key, name) for name, key in keys.items()}
            for name, node in known.items():
                if wanted.get(name) != node.public_key:
                    unregister_node(control, node.node_id)
            for name, key in wanted.items():
                if name not in known or known[name].public_key != key:
                    register_node(control, name, key)

    def prepare(self) -> None:
        """Makes the stub app, and loads what submitting needs, while the SuperLink starts."""
        self.app = build_app_bundle(self.home / "app")

    def submit(self) -> int:
        """Starts a run of the stub app, after ending the ones before it, and returns Flower's number for it.

        A run whose ServerApp died counts as running for a minute more. For as long a SuperNode would wait for the rest
        of an order that the ServerApp was sending just then.
        """
        with self._control() as control:
            stop_unfinished_runs(control)
            return start_run(control, self.app)

    def online(self) -> list[str]:
        """Names of the sites whose SuperNodes are online (empty names where sites have no keys)."""
        with self._control() as control:
            return [node.name for node in list_nodes(control) if node.status == "online"]

    def _control(self) -> ControlHttpClient:
        return open_control_api(f"127.0.0.1:{self.port}", self.certificates.ca if self.certificates else None)


def _create(path: Path) -> None:
    """An empty database with pages of :data:`PAGE`, which stay. Raises StateError."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute(f"PRAGMA page_size = {PAGE}")
            database.execute("VACUUM")  # writes it
    except sqlite3.Error as error:
        raise StateError(str(path), "a place for a database", error) from None


def point_of(key: bytes, site: str) -> bytes:
    """A public key (OpenSSH) as Flower sends and keeps it. Raises StateError."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        loaded = load_ssh_public_key(key)
    except ValueError as error:
        raise StateError("public key", "an OpenSSH ECDSA key", error, site=site) from None
    if not isinstance(loaded, ec.EllipticCurvePublicKey):
        raise StateError("public key", "an OpenSSH ECDSA key", type(loaded).__name__, site=site)
    return public_key_bytes(loaded)
