"""The bar of a round: sites that replied, steps of the site that trains."""

from __future__ import annotations

import io

from rich.console import Console

from colora.server.reporting.round_progress import RoundProgress


def shown(progress: RoundProgress) -> tuple[str, float, float | None, bool]:
    task = progress.bar.tasks[0]
    return task.description, task.completed, task.total, task.visible


def test_the_bar_follows_sites_and_steps() -> None:
    progress = RoundProgress(Console(file=io.StringIO()))
    assert not shown(progress)[-1]
    progress({"event": "round_started", "round": 1, "sites": ["north", "south"]})
    assert shown(progress) == ("0 of 2 sites", 0.0, 2.0, True)
    progress.step("north", 2, 4)
    assert shown(progress) == ("0 of 2 sites, north: step 2 of 4", 0.5, 2.0, True)
    progress({"event": "reply", "site": "north", "round": 1})
    progress.step("south", 4, 4)
    assert shown(progress) == ("1 of 2 sites, south: step 4 of 4", 2.0, 2.0, True)
    for _ in range(2):  # a site that failed is asked again
        progress({"event": "failed", "site": "south", "round": 1, "reason": "x"})
    assert shown(progress) == ("2 of 2 sites", 2.0, 2.0, True)
    progress({"event": "round", "round": 1})
    assert not shown(progress)[-1]
    progress({"event": "finalizing", "round": 1, "sites": ["north"]})
    assert shown(progress) == ("0 of 1 sites", 0.0, 1.0, True)


def test_a_name_cannot_write_to_the_terminal() -> None:
    progress = RoundProgress(Console(file=io.StringIO()))
    progress({"event": "round_started", "round": 1, "sites": ["a"]})
    progress.step("\x1b[31m[bold]", 1, 2)
    assert "\x1b" not in shown(progress)[0]


def test_without_steps_the_bar_does_not_divide_by_zero() -> None:
    progress = RoundProgress(Console(file=io.StringIO()))
    progress({"event": "round_started", "round": 1, "sites": []})
    progress.step("a", 0, 0)
    assert shown(progress)[1:3] == (0.0, 1.0)
