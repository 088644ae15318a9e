"""The label list of a site stays that of its first state, since the outputs of its head stand for these labels."""

from __future__ import annotations

import dataclasses

from ...common.dataset import SiteDataset
from ...common.errors import StateError


def with_pinned_labels(rows: SiteDataset, pinned: tuple[str, ...]) -> SiteDataset:
    """Return the rows with the labels of the site's first state, in its order; unchanged where it has no state.

    Rows may lack some of these labels. Raises StateError for a label that is not one of them.
    """
    if not pinned or rows.labels == pinned:
        return rows
    new = next((label for label in rows.labels if label not in pinned), None)
    if new is None:
        return dataclasses.replace(rows, labels=pinned)
    names = ", ".join(pinned[:5]) + (", …" if len(pinned) > 5 else "")
    raise StateError(
        "data.label",
        f"the labels of the site's first state ({names})",
        repr(new),
        site=rows.site,
        message=f"The rows have the label {new!r}, which the site's head does not know. Its labels are {names}.",
        hint="Remove these rows with data.labels, or use a new state folder.",
    )
