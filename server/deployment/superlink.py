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

from ...common.atomic_io import write_atomically
from ...common.errors import StateError
from ...common.processes.supervised import Command, SupervisedProcess, free_port, program

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
POLLING = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}  # seconds between a run and its ServerApp
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
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

        with self._control() as control:
            known = {node.name: node for node in control.ListNodes(ListNodesRequest()).nodes_info}
            wanted = {name: point_of(key, name) for name, key in keys.items()}
            for name, node in known.items():
                if wanted.get(name) != node.public_key:
                    control.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
            for name, key in wanted.items():
                if name not in known or known[name].public_key != key:
                    control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))

    def prepare(self) -> None:
        """Makes the stub app, and loads what submitting needs, while the SuperLink starts."""
        from flwr.cli.build import build_fab_from_disk
        from flwr.supercore.control import ControlHttpClient  # noqa: F401

        self.app = build_fab_from_disk(self.home / "app")

    def submit(self) -> int:
        """Starts a run of the stub app, after ending the ones before it, and returns Flower's number for it.

        A run whose ServerApp died counts as running for a minute more. For as long a SuperNode would wait for the rest
        of an order that the ServerApp was sending just then.
        """
        import hashlib

        from flwr.common.constant import Status
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
        from flwr.supercore.fab import Fab

        fab = Fab(hashlib.sha256(self.app).hexdigest(), self.app, {})
        with self._control() as control:
            for number, run in control.ListRuns(ListRunsRequest()).run_dict.items():
                if run.status.status != Status.FINISHED:
                    control.StopRun(StopRunRequest(run_id=number))
            return control.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id

    def online(self) -> list[str]:
        """Names of the sites whose SuperNodes are online (empty names where sites have no keys)."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with self._control() as control:
            return [node.name for node in control.ListNodes(ListNodesRequest()).nodes_info if node.status == "online"]

    def _control(self):
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        return ControlHttpClient.from_server_address(
            f"127.0.0.1:{self.port}",
            insecure=self.certificates is None,
            root_certificates=str(self.certificates.ca) if self.certificates else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="colora server")],
        )


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
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        loaded = load_ssh_public_key(key)
    except ValueError as error:
        raise StateError("public key", "an OpenSSH ECDSA key", error, site=site) from None
    if not isinstance(loaded, ec.EllipticCurvePublicKey):
        raise StateError("public key", "an OpenSSH ECDSA key", type(loaded).__name__, site=site)
    return public_key_to_bytes(loaded)
