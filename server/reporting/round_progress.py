"""A progress bar over one round: the sites that have replied, the steps of the site that trains, and the time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ...common.event_log import Event
from ...common.foreign_text import printable

BEGINS, REPLIES, ENDS = ("round_started", "finalizing"), ("reply", "failed", "refused"), ("round", "finalized")


class RoundProgress:
    """The bar of a round, in units of one site's work. ``bar`` is drawn by a live display."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self.task = self.bar.add_task("", total=1.0, visible=False)
        self.sites = self.replied = 0

    def __call__(self, event: Event) -> None:
        """Process one event of the run."""
        name = event["event"]
        if name in BEGINS:
            self.sites, self.replied = len(event["sites"]), 0
            self.bar.reset(self.task, total=float(max(self.sites, 1)), visible=True)
            self._show(0.0, "")
        elif name in REPLIES:
            self.replied = min(self.replied + 1, self.sites)
            self._show(float(self.replied), "")
        elif name in ENDS:
            self.bar.update(self.task, visible=False)

    def step(self, site: str, done: int, total: int) -> None:
        """Show that a site has taken ``done`` of ``total`` optimizer steps of this round."""
        self._show(self.replied + done / max(total, 1), f", {printable(site)}: step {done} of {total}")

    def _show(self, completed: float, step: str) -> None:
        description = f"{self.replied} of {self.sites} sites{step}"
        self.bar.update(self.task, completed=min(completed, float(self.sites)), description=description)
