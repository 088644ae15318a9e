"""Flower's command ``flwr-clientapp``, which starts for every message, with a shorter start-up.

It skips modules that a ClientApp does not use, see ``flower_compat.clientapp_command``. The garbage collector is
disabled during the imports.
"""

from __future__ import annotations

import ctypes
import gc
import sys

from ...common.flower_compat import shorten_pull_backoff
from ..flower_compat import CLIENT_APP, clientapp_command

PR_SET_NAME = 15


def main() -> None:
    """Run the command with this process's arguments."""
    if sys.platform == "linux":  # the name is all that identifies a zombie as a ClientApp
        ctypes.CDLL(None).prctl(PR_SET_NAME, CLIENT_APP.encode())
    gc.disable()
    flwr_clientapp = clientapp_command()
    from .. import client_app  # noqa: F401  # imported early; the app that Flower ships imports it

    gc.freeze()
    gc.enable()
    shorten_pull_backoff()
    flwr_clientapp()


if __name__ == "__main__":
    main()
