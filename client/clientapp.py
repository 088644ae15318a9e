"""Flower's command ``flwr-clientapp``, which starts for every message, without what it imports and does not use.

Its package also loads ``flower-supernode`` and with it FastAPI's and SQLAlchemy's half of Flower: as much again as all
that a ClientApp needs. And a process that lives for one message has no use for a garbage collector, which walks
through everything that is being imported several times.
"""

from __future__ import annotations

import gc
import sys
from types import ModuleType

from ..common.pulling import hasten

UNUSED = "flwr.supernode.cli.flower_supernode"


def main() -> None:
    """Runs the command with this process's arguments."""
    gc.disable()
    unused = ModuleType(UNUSED)
    unused.flower_supernode = None  # type: ignore[attr-defined]
    sys.modules[UNUSED] = unused
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    hasten()
    flwr_clientapp()
