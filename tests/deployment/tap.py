"""A second gateway in front of the coordinator's that records what the sites send, after TLS decryption."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from colora.common.atomic_io import load_arrays
from colora.common.models.saved import TRAINED
from colora.server.deployment.gateway.proxy import FleetProxy, Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress
from tests.leaks import Secret, leaks_in, numbers_in

from .conftest import Town


@contextmanager
def tapped(town: Town, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Record the bodies of all requests of the sites, whose site files are changed to the tap's address."""
    sent: list[bytes] = []
    forward = FleetProxy._forward

    async def kept(self: FleetProxy, asked, stack):
        assert asked.body.whole, "a body too large to be kept"
        sent.append(asked.body.head)
        return await forward(self, asked, stack)

    monkeypatch.setattr(FleetProxy, "_forward", kept)
    keys = town.folder / "keys" / "coordinator"
    door = ListenAddress("127.0.0.1", 0, keys / "server.crt", keys / "server.key")
    with GatewayServer(door, Upstream(f"https://127.0.0.1:{town.port}", keys / "ca.crt")) as gate:
        for name in town.names:
            path = town.site(name) / "site.toml"
            path.write_text(path.read_text().replace(f"127.0.0.1:{town.port}", gate.address))
        yield sent


def found_in(sent: Iterable[bytes], secrets: Iterable[Secret], windows: Iterable[str]) -> list[str]:
    """Return the personal tensors and texts that are in any of these bodies, in any encoding."""
    secrets, windows = list(secrets), list(windows)
    assert secrets
    assert windows
    bodies = list(dict.fromkeys(sent))
    return [leak for body in bodies for leak in leaks_in(numbers_in(body), body.decode("latin-1"), secrets, windows)]


def replies(states: Iterable[Path]) -> Iterator[Secret]:
    """Yield the arrays that were sent, which a working search must find."""
    for path in states:
        arrays: dict[str, np.ndarray] = load_arrays(path, prefix=TRAINED)[0]
        yield from ((f"{path}/{key}", value) for key, value in arrays.items())
