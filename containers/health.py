"""Health checks of the containers. The exit code is 0 when the container's service answers.

health.py gateway HOST:PORT CA   the coordinator's gateway
health.py supernode STATE        the SuperNode's gRPC health service, at the address in STATE/services.json
health.py trainer HOST:PORT CA   the trainer, by a TLS handshake: any call needs the SuperNode's certificate
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import urllib.request
from pathlib import Path

TIMEOUT = 5  # seconds


def gateway(address: str, ca: str) -> None:
    """Request /health. Raises an error unless the gateway answers with a certificate of the CA."""
    context = ssl.create_default_context(cafile=ca)
    with urllib.request.urlopen(f"https://{address}/health", timeout=TIMEOUT, context=context):
        pass


def supernode(state: str) -> None:
    """Query the gRPC health service. Raises an error unless the SuperNode is serving."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = json.loads((Path(state) / "services.json").read_text())["supernode_health"]
    with grpc.insecure_channel(address) as channel:
        response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        raise SystemExit(f"the SuperNode is not serving: {response.status}")


def trainer(address: str, ca: str) -> None:
    """Do a TLS handshake. The trainer opens its port when it is ready; its certificate has the name ``trainer``."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection,
        context.wrap_socket(connection, server_hostname="trainer"),
    ):
        pass


if __name__ == "__main__":
    {"gateway": gateway, "supernode": supernode, "trainer": trainer}[sys.argv[1]](*sys.argv[2:])
