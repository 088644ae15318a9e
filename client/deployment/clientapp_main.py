"""Flower's command ``flwr-clientapp``, which starts for every message, without what it imports and does not use.

See :func:`~.flower_compat.clientapp_command`. While everything is being imported, a garbage collector only walks
through it again and again.
"""

from __future__ import annotations

import ctypes
import gc
import sys

from ...common.flower_compat import shorten_pull_backoff
from ..flower_compat import CLIENT_APP, clientapp_command

PR_SET_NAME = 15


def main() -> None:
    """Runs the command with this process's arguments."""
    if sys.platform == "linux":  # a zombie has nothing else by which to tell that it was a ClientApp
        ctypes.CDLL(None).prctl(PR_SET_NAME, CLIENT_APP.encode())
    gc.disable()
    flwr_clientapp = clientapp_command()
    from .. import client_app  # noqa: F401  # what the bundle that Flower ships will import

    gc.freeze()
    gc.enable()
    shorten_pull_backoff()
    flwr_clientapp()
