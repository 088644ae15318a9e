"""A SuperNode whose port was taken hangs with its main thread ended: it is started again, at other ports."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from colora.client.launch import NodeKeeper
from colora.common.settings import DataSettings
from colora.common.site import CoordinatorSettings, SiteSettings, TrainerSettings

HANGING = (
    "import sys, time; print('Port in server address 127.0.0.1:1 is already in use.', flush=True); time.sleep(600)"
)
WELL = "import time; print('SuperNode ID: 7', flush=True); time.sleep(600)"


def test_a_supernode_without_its_port_is_started_again_at_others(tmp_path: Path) -> None:
    said: list[str] = []
    site = SiteSettings(
        "ada",
        DataSettings("rows.jsonl"),
        trainer=TrainerSettings(state=str(tmp_path / "state")),
        coordinator=CoordinatorSettings("127.0.0.1:1", insecure=True),
    )
    keeper = NodeKeeper(site, said.append)
    stock, ports = keeper.node._command, []

    def command():
        ports.append((keeper.node.port, keeper.node.health_port))
        program = HANGING if len(ports) == 1 else WELL
        return replace(stock(), arguments=(sys.executable, "-u", "-c", program))

    keeper.node._command = command  # type: ignore[method-assign]
    try:
        ends = time.monotonic() + 30
        while not keeper.connected and time.monotonic() < ends:
            keeper.keep()
            time.sleep(0.05)
        assert keeper.connected
        ports.append((keeper.node.port, keeper.node.health_port))
        assert len(set(ports)) == len(ports) == 3
    finally:
        keeper.stop()
    assert "a port of its own was taken: starting the SuperNode again" in said
