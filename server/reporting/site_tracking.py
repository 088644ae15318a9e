"""The trackers of a site: one tracked run for each federation that the site works for, from the site's own events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ...common.config.site_schema import SiteSettings
from ...common.event_log import Event
from ...common.trackers import Trackers, check_installed
from .events import read_events
from .tracking import track_folder

INTERVAL = 1.0  # seconds between two looks for new federations


class SiteTrackers:
    """A context manager within which the trackers that a site file names log what the site does.

    A federation is tracked from its first new event on, with what went before. ``report`` receives a sentence about a
    tracker that failed.
    """

    def __init__(self, site: SiteSettings, report: Callable[[str], None]) -> None:
        """Raises ConfigError if the package of a tracker is not installed."""
        check_installed(site.tracking.trackers)
        self.site, self.report, self.tracked = site, report, set[Path]()
        self._began = time.time()
        self._closing, self._stack = threading.Event(), ExitStack()
        self._thread = threading.Thread(target=self._follow, name="trackers", daemon=True)

    def __enter__(self) -> SiteTrackers:
        if self.site.tracking.trackers:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._stack.close()

    def _follow(self) -> None:
        while not self._closing.wait(INTERVAL):
            for log in sorted(Path(self.site.trainer.state).glob("*/events.jsonl")):
                if log not in self.tracked and log.stat().st_mtime >= self._began:
                    self.tracked.add(log)
                    self._stack.enter_context(self._track(log))

    def _track(self, log: Path) -> Trackers:
        started = next((event for event in read_events(log) if event["event"] == "started"), {})
        name = f"{log.parent.name} at {self.site.name}"
        return track_folder(log.parent, name, self.site.tracking, started.get("settings", {}), self._failed)

    def _failed(self, event: Event) -> None:
        self.report(f"the tracker {event['tracker']} stopped: {event['reason']}")
