"""Starts a command that dies with its parent: ``python leash.py PARENT_PID COMMAND…``. Imports nothing of ours.

On Linux the kernel kills it when the parent dies, however that happens; elsewhere the parent's own end has to do it.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Sets the leash, looks whether the parent is still there, and becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
