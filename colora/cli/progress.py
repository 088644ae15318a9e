"""Progress of a command on stderr. Where stderr is not a terminal, nothing is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(words: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the context is open, and yield a function for the number of units that are done, and of all.

    Until its first call, and without a ``unit``, the bar only moves.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(words, total=None, done="")

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, done=f"{done} of {total} {unit}")

        yield update
