"""Run a command that dies with its parent: ``python die_with_parent.py PARENT_PID COMMAND…``.

On Linux the kernel kills the command when its parent dies for any reason. On other systems the parent must end it.
This file runs as a script and imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # option of prctl(2): the signal that this process gets when its parent dies


def main() -> None:
    """Ask for SIGKILL at the parent's death, exit if the parent has died already, and become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
