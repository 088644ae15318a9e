"""The trackers of a site: one tracked run for each federation that the site works for, from the site's own events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from ...common.config.site_schema import SiteSettings
from ...common.trackers import Trackers, check_installed
from .events import read_events
from .tracking import track_folder

INTERVAL = 1.0  # seconds between two looks for new events


class SiteTrackers:
    """A context manager within which the trackers that a site file names log what the site does.

    They follow the federation with the newest event, from its first one on. When another federation has a newer one,
    the tracked run of the first is closed. ``report`` receives a sentence about a tracker that failed.
    """

    def __init__(self, site: SiteSettings, report: Callable[[str], None]) -> None:
        """Raises ConfigError if the package of a tracker is not installed."""
        check_installed(site.tracking.trackers)
        self.site, self.report = site, report
        self.followed: Path | None = None  # the event log that is tracked
        self._began, self._closing = time.time(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="trackers", daemon=True)

    def __enter__(self) -> SiteTrackers:
        if self.site.tracking.trackers:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _follow(self) -> None:
        with ExitStack() as tracked:
            while not self._closing.wait(INTERVAL):
                newest = max(self._changed(), default=(0.0, None), key=lambda found: found[0])[1]
                if newest is not None and newest != self.followed:
                    tracked.close()
                    tracked.enter_context(self._track(newest))
                    self.followed = newest

    def _changed(self) -> Iterator[tuple[float, Path]]:
        """The event logs with an event since this object was made, and the times of their last events."""
        for log in Path(self.site.trainer.state).glob("*/events.jsonl"):
            try:
                changed = log.stat().st_mtime
            except OSError:  # deleted in this moment
                continue
            if changed >= self._began and log.is_file():
                yield changed, log

    def _track(self, log: Path) -> Trackers:
        started = next((event for event in read_events(log) if event["event"] == "started"), {})
        name = f"{log.parent.name} at {self.site.name}"
        return track_folder(log.parent, name, self.site.tracking, started.get("settings", {}), self._failed)

    def _failed(self, tracker: str, reason: str) -> None:
        self.report(f"the tracker {tracker} stopped: {reason}")
