"""Flower's command ``flwr-clientapp``, which starts for every message, without what it imports and does not use.

Its package also loads ``flower-supernode``, and with it Flower's database layer: as much again as a ClientApp needs.
And while everything is being imported, a garbage collector only walks through it again and again.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from types import ModuleType

from ...common.flower_compat import shorten_pull_backoff

CLIENT_APP, UNUSED = "flwr-clientapp", "flwr.supernode.cli.flower_supernode"
PR_SET_NAME = 15


def main() -> None:
    """Runs the command with this process's arguments."""
    if sys.platform == "linux":  # a zombie has nothing else by which to tell that it was a ClientApp
        ctypes.CDLL(None).prctl(PR_SET_NAME, CLIENT_APP.encode())
    gc.disable()
    unused = ModuleType(UNUSED)
    unused.flower_supernode = None  # type: ignore[attr-defined]
    sys.modules[UNUSED] = unused
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    from .. import client_app as app  # noqa: F401  # what the bundle that Flower ships will import

    gc.freeze()
    gc.enable()
    shorten_pull_backoff()
    flwr_clientapp()
