"""The ServerApp's side of ``colora server``: one process at a time leads a run folder, and says how it ended."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.errors import ColoraError, QuorumError
from ..common.flower_compat import shorten_pull_backoff
from ..common.recipe import load_recipe
from .app import Run
from .conduct import Conduct, Member, Stopped
from .events import EventLog
from .folder import RunFolder
from .superlink import RUN_FOLDER

LOOK = 0.3  # seconds between two looks whether the process that started this one still lives


@contextmanager
def deployed() -> Iterator[tuple[Run, Conduct]]:
    """The run of the folder in the environment. Waits until no other process leads it.

    Ends quietly after a stop; an error of ours is told in the events, for the supervisor to decide.
    """
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    shorten_pull_backoff()
    files = RunFolder(Path(os.environ[RUN_FOLDER]))
    with (files.path / "leading.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        roster = tuple(Member(*entry) for entry in json.loads(files.roster.read_text()))
        events = EventLog(files.path / "events.jsonl")
        try:
            yield Run(load_recipe(files.recipe), roster, files.path), Conduct(enduring=True, stop=files.stop.exists)
        except Stopped:
            events.emit("stopped")
        except ColoraError as error:
            events.emit("broken", reason=str(error), final=not isinstance(error, QuorumError))
            raise
        except Exception as error:
            events.emit("broken", reason=f"{type(error).__name__}: {error}", final=False)
            raise


def _die_with(parent: int) -> None:
    """Ends this process when Flower's SuperExec has gone: Flower itself would let it try for 20 seconds and more.

    That is a kill like any other: the round is done again, by the ServerApp that waits for this one's lock.
    """
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)
