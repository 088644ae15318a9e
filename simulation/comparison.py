"""The gain of each site's personal model over local-only training, paired by test row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..client.training.state_store import StateStore
from ..common.config.schema import Recipe
from ..common.event_log import EventLog, Listener
from ..common.standard_error import mean_and_error
from ..server.reporting.run_folder import RunFolder


def compare(run: RunFolder, recipe: Recipe, sites: Sequence[str], listener: Listener | None) -> None:
    """Emit one ``compared`` event per site into the baseline's log. Sites whose rows have no scores are left out."""
    events = EventLog(run.baseline / "events.jsonl", listener)
    for site in sites:
        personal, alone = (row_scores(folder, site, recipe) for folder in (run.path, run.baseline))
        if personal and len(personal) == len(alone):
            gain, error = paired_gain(personal, alone)
            events.emit("compared", site=site, gain=gain, standard_error=error, rows=len(personal))


def paired_gain(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean difference of two models' scores on the same rows, and its standard error (None for one row)."""
    return mean_and_error([score - other for score, other in zip(scores, others, strict=True)])


def row_scores(folder: Path, site: str, recipe: Recipe) -> tuple[float, ...]:
    """Return the scores of a site's final model on each test row, in a finished run; none for tasks without them."""
    state = StateStore(folder / "sites" / site / "state", recipe.name).newest()
    return state.row_scores if state else ()
