"""A site announces its replies and never sends their parts: the rounds of the others end in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.proto.message_pb2 import PushObjectResponse
from starlette.responses import Response

from colora.server.deployment.gateway.proxy import FleetProxy, Upstream
from colora.server.deployment.gateway.server import GatewayServer, ListenAddress
from colora.server.rounds.replies import STALL

from .conftest import Town

pytestmark = [pytest.mark.slow, pytest.mark.endurance]
PUSH = "/v1/fleet/push-object"
TIMEOUT, SLACK = 20.0, 15.0  # of a round; seconds that a round may take beyond the time limit


class Withholding:
    """While ``active``, the parts of a site's replies are acknowledged and dropped. ``dropped`` counts them."""

    def __init__(self) -> None:
        self.active, self.dropped = threading.Event(), 0


@contextmanager
def withholding(town: Town, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Withholding]:
    """Route one site through a gateway that drops the parts of its replies."""
    state, forward = Withholding(), FleetProxy._forward

    async def dropping(self: FleetProxy, held, stack):
        if held.path == PUSH and state.active.is_set():
            state.dropped += 1
            content = PushObjectResponse(stored=True).SerializeToString()
            return Response(content, media_type="application/x-protobuf")
        return await forward(self, held, stack)

    monkeypatch.setattr(FleetProxy, "_forward", dropping)
    keys = town.folder / "keys" / "coordinator"
    door = ListenAddress("127.0.0.1", 0, keys / "server.crt", keys / "server.key")
    with GatewayServer(door, Upstream(f"https://127.0.0.1:{town.port}", keys / "ca.crt")) as gateway:
        path = town.site(name) / "site.toml"
        path.write_text(path.read_text().replace(f"127.0.0.1:{town.port}", gateway.address))
        yield state


@pytest.mark.parametrize("timeout", [TIMEOUT, None], ids=["with timeout", "without timeout"])
def test_replies_that_are_never_sent_cost_only_their_own_site(
    place: Path, tiny_recipe: dict, monkeypatch: pytest.MonkeyPatch, timeout: float | None
) -> None:
    """The site takes part again as soon as it sends what it announces."""
    tiny_recipe["rounds"] = 40
    tiny_recipe["server"] = {"quorum": 2, "max_attempts": 1} | ({"timeout": timeout} if timeout else {})
    town = Town(place / "town", tiny_recipe).build()
    try:
        with withholding(town, "cyd", monkeypatch) as state:
            town.start()
            town.wait_for("reply", 240, site="cyd")
            state.active.set()
            failed = town.wait_for("failed", 400, site="cyd")
            round_of_failure = town.wait_for("round", 60, round=failed["round"])
            dropped, back = state.dropped, time.monotonic()
            state.active.clear()
            town.wait_for("round", 120, round=failed["round"] + 2)
            print(
                f"\n{failed['reason']!r}: {round_of_failure['seconds']:.1f} s, {dropped} parts dropped; "
                f"two more rounds after {time.monotonic() - back:.1f} s"
            )
    finally:
        town.stop()
    admitted = {event["round"]: event["admitted"] for event in town.events("round")}
    assert dropped > 0
    assert round_of_failure["seconds"] < (timeout or STALL) + SLACK
    assert admitted[failed["round"]] == ["ada", "bob"]
    assert "cyd" in admitted[max(admitted)]
