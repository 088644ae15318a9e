"""The ServerApp process of ``colora server``: it locks the run folder and records how the run ended."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...common.config.loader import load_recipe
from ...common.errors import ColoraError, QuorumError
from ...common.event_log import EventLog
from ...common.flower_compat import shorten_pull_backoff
from ...common.secure_aggregation.identity import coordinator_roster
from ..reporting.run_folder import RunFolder
from ..rounds.agreement import own_fingerprints
from ..rounds.run_options import RosterEntry, Run, RunOptions, StopRequested
from .superlink import RUN_FOLDER

PARENT_CHECK_INTERVAL = 0.3  # seconds between two checks that the parent process is alive


@contextmanager
def deployed() -> Iterator[tuple[Run, RunOptions]]:
    """Open the run folder that the environment names, once no other process holds its lock.

    A requested stop is recorded as `stopped`, and an error as `run_failed`, by which the supervisor decides whether to
    start another run. Errors are raised again.
    """
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    shorten_pull_backoff()
    files = RunFolder(Path(os.environ[RUN_FOLDER]))
    with (files.path / "leading.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        events = EventLog(files.path / "events.jsonl")
        try:
            roster = tuple(RosterEntry(*entry) for entry in files.read_roster())
            keys, stop = coordinator_roster(files.public_keys), files.stop.exists
            options = RunOptions(True, stop, fingerprints=own_fingerprints, public_keys=keys)
            yield Run(load_recipe(files.recipe), roster, files.path), options
        except StopRequested:
            events.emit("stopped")
        except ColoraError as error:
            events.emit("run_failed", reason=str(error), final=not isinstance(error, QuorumError))
            raise
        except Exception as error:
            events.emit("run_failed", reason=f"{type(error).__name__}: {error}", final=False)
            raise


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent process (Flower's SuperExec) is gone; Flower's own retries would last 20 seconds or more.

    The round in progress is lost. The next ServerApp, which waits for this one's lock, repeats it.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_INTERVAL)
    os._exit(1)
