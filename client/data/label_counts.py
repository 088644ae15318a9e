"""How many rows a site has of every label, in one line for the site's own terminal. Imports no torch."""

from __future__ import annotations

from collections import Counter

from ...common.dataset import TASKS, SiteDataset, labels_of

MAX_LABELS, MAX_LABEL_LENGTH = 20, 40  # more or longer labels are counted, not shown


def describe_rows(rows: SiteDataset) -> str:
    """Return the numbers of training and test rows, and those of every label where the task has labels."""
    counts = f"{len(rows.train)} training + {len(rows.test)} test rows"
    return f"{counts}; {describe_labels(rows)}" if TASKS[rows.task].has_labels else counts


def describe_labels(rows: SiteDataset) -> str:
    """Return ``no 6+3, yes 6+3``: training + test rows of every label. Many or long labels are summed up."""
    train, test = (Counter(label for row in part for label in labels_of(row)) for part in (rows.train, rows.test))
    names = rows.labels
    if len(names) > MAX_LABELS or any(len(name) > MAX_LABEL_LENGTH for name in names):
        counts = [train[name] for name in names]
        return f"{len(names)} labels with {min(counts)} to {max(counts)} training rows, too many or too long to show"
    return ", ".join(f"{name} {train[name]}+{test[name]}" for name in names)
