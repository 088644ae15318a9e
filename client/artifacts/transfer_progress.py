"""What a person sees of a transfer: how many texts were written and kept, then the steps of the distillation."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ...transfer.synthesis import SynthesisProgress as Written


class TransferProgress:
    """One line a stage, as texts are written and as the new adapter learns.

    Where the output is no terminal: a line for every call of the writer, and for every quarter of the learning.
    """

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.lines: dict[str, TaskID] = {}

    def on_progress(self, progress: Written) -> None:
        """After every call of the writer, and after every judgement."""
        kept = min(progress.kept, progress.wanted)
        more = f", {progress.waiting} not judged yet" if progress.waiting else f" ({progress.acceptance:.0%} kept)"
        told = f"{kept} of {progress.wanted} kept, {progress.written} written{more}"
        self._show("writing", kept, progress.wanted, told)

    def on_step(self, done: int, total: int) -> None:
        """After every optimiser step."""
        if self.progress.disable and done * 4 // total == (done - 1) * 4 // total:
            return
        self._show("learning", done, total, f"step {done} of {total}")

    def _show(self, stage: str, done: int, total: int, told: str) -> None:
        if self.progress.disable:
            self.progress.console.print(f"{stage}: {told}", highlight=False, soft_wrap=True)
        if stage not in self.lines:
            self.lines[stage] = self.progress.add_task(stage, total=total, told="")
        self.progress.update(self.lines[stage], completed=done, total=total, told=told)

    def __enter__(self) -> TransferProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
