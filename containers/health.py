"""Health checks of the containers: exit code 0 when the service in this container answers.

health.py gate HOST:PORT CA      the coordinator's gate
health.py node STATE             the SuperNode, by gRPC's health service at the address in STATE/services.json
health.py trainer HOST:PORT CA   the trainer: a TLS handshake, as only the SuperNode has a certificate to go further
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import urllib.request
from pathlib import Path

SECONDS = 5


def gate(address: str, ca: str) -> None:
    """GET /health."""
    context = ssl.create_default_context(cafile=ca)
    with urllib.request.urlopen(f"https://{address}/health", timeout=SECONDS, context=context):
        pass


def node(state: str) -> None:
    """Raises when SuperNode's health service says anything but SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = json.loads((Path(state) / "services.json").read_text())["node_health"]
    with grpc.insecure_channel(address) as channel:
        found = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    if found.status != health_pb2.HealthCheckResponse.SERVING:
        raise SystemExit(f"the SuperNode is not serving: {found.status}")


def trainer(address: str, ca: str) -> None:
    """The service opens its port when it is ready, with a certificate for the name ``trainer``."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=SECONDS) as plain,
        context.wrap_socket(plain, server_hostname="trainer"),
    ):
        pass


if __name__ == "__main__":
    {"gate": gate, "node": node, "trainer": trainer}[sys.argv[1]](*sys.argv[2:])
