"""Flower's command ``flower-supernode``, changed so that it exits when one of its threads fails.

Without this change the process stays alive and does no work: its HTTP server keeps running after the main thread has
failed, and without the heartbeat thread the coordinator considers it offline. A supervisor could not see either. The
command also polls sooner for the parts of an incoming message, sends a reply that Flower would leave waiting, and
finishes an upload after its connection broke.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback

from ...common.flower_compat import shorten_pull_backoff
from ..flower_compat import finish_broken_uploads, send_waiting_replies, supernode_command


def main() -> None:
    """Run the command with this process's arguments."""
    flower_supernode = supernode_command()
    threading.excepthook = _exit_on_failure
    shorten_pull_backoff()
    send_waiting_replies()
    finish_broken_uploads()
    code = 1  # the command returns when it has lost its coordinator
    try:
        flower_supernode()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    _exit(code)


def _exit_on_failure(failure: threading.ExceptHookArgs) -> None:
    """Exit when any thread fails. Flower would continue without it."""
    traceback.print_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    _exit(1)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
