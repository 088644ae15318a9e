"""Flower's command ``flower-supernode``, which ends when a part of it has ended.

Flower's own goes on for ever as a process that does nothing: its HTTP server keeps it alive when the main thread has
failed, and without the thread of its heartbeats it is offline to the coordinator. Whoever keeps it alive sees nothing.
It also asks sooner for what is on its way.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback

from ...common.flower_compat import shorten_pull_backoff
from ..flower_compat import supernode_command


def main() -> None:
    """Runs the command with this process's arguments."""
    flower_supernode = supernode_command()
    threading.excepthook = _failed
    shorten_pull_backoff()
    code = 1  # it returns when it has lost its coordinator
    try:
        flower_supernode()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    _end(code)


def _failed(failure: threading.ExceptHookArgs) -> None:
    """Whichever thread it was: Flower would go on without it."""
    traceback.print_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    _end(1)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
