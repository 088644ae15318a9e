"""The terminal output of a transfer: the texts generated and accepted, then the training steps."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ...transfer.synthesis import SynthesisProgress


class TransferProgress:
    """One progress bar for the generation of texts and one for the training of the new adapter.

    Without a terminal it prints a line for every call of the generator and for every quarter of the training.
    """

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[details]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.lines: dict[str, TaskID] = {}

    def on_progress(self, progress: SynthesisProgress) -> None:
        """Show the counts after a call of the generator or a run of the filter."""
        accepted = min(progress.accepted, progress.requested)
        rest = (
            f", {progress.pending} not filtered yet" if progress.pending else f" ({progress.acceptance:.0%} accepted)"
        )
        details = f"{accepted} of {progress.requested} accepted, {progress.generated} generated{rest}"
        self._show("generating", accepted, progress.requested, details)

    def on_step(self, done: int, total: int) -> None:
        """Show an optimizer step."""
        if self.progress.disable and done * 4 // total == (done - 1) * 4 // total:
            return
        self._show("training", done, total, f"step {done} of {total}")

    def _show(self, stage: str, done: int, total: int, details: str) -> None:
        if self.progress.disable:
            self.progress.console.print(f"{stage}: {details}", highlight=False, soft_wrap=True)
        if stage not in self.lines:
            self.lines[stage] = self.progress.add_task(stage, total=total, details="")
        self.progress.update(self.lines[stage], completed=done, total=total, details=details)

    def __enter__(self) -> TransferProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
