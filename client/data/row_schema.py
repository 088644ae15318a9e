"""Columns of a source become rows of a task. Raises a DataError that names the rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...common.config.schema import DataSettings
from ...common.dataset import TASKS, Row, SiteDataset, labels_of
from ...common.errors import DataError
from ...common.tasks import task_class
from ...common.tasks.columns import RawRow, listed

logger = logging.getLogger("colora.data")
INPUT_KEYS = ("text", "text_pair", "prompt", "messages", "system")  # keys of [data] that name columns of inputs


@dataclass
class SourceRows:
    """Parsed rows of one site, and what is known of them: numbers in their source, and notes for the site."""

    numbers: dict[int, int] = field(default_factory=dict)  # by identity of a row
    notes: list[str] = field(default_factory=list)
    kept: list[Row] = field(default_factory=list)  # so that an identity is never used twice

    def add(self, number: int, row: Row) -> None:
        """Remember a row's number."""
        self.numbers[id(row)] = number
        self.kept.append(row)

    def numbers_of(self, rows: Iterable[Row]) -> tuple[int, ...]:
        """Return the numbers of rows that were added."""
        return tuple(self.numbers[id(row)] for row in rows)


def parse_rows(
    rows: Iterable[tuple[int, Row]], data: DataSettings, site: str, notes: list[str] | None = None
) -> list[tuple[int, Row]]:
    """Parse rows, given with their numbers, for the site's task, without the rows that ``data.labels`` leaves out.

    ``notes`` receives what was changed. Raises a DataError for the first key of ``[data]`` that rows do not fit, with
    the numbers of all such rows.
    """
    parse, parsed, failures = task_class(data.task).parse_row, [], []
    rows = list(rows)
    remarks: dict[str, list[int]] = {}
    for number, values in rows:
        try:
            row = parse(RawRow(values, number, site, remarks), data)
        except DataError as error:
            failures.append((number, error))
            continue
        if row is not None:
            parsed.append((number, row))
    if failures:
        first = failures[0][1]
        same = [number for number, error in failures if error.field == first.field]
        found = first.found.removesuffix(f" in row {same[0]}")
        where = ("every row" if len(same) == len(rows) > 1 else listed(same)) + of_file(data)
        raise DataError(first.field, first.expected, f"{found} in {where}", site=first.site, hint=first.hint)
    if notes is not None:
        notes += [f"{sentence} in {listed(numbers)} of {data.source}" for sentence, numbers in remarks.items()]
    return parsed


def of_file(data: DataSettings) -> str:
    """Return " of SOURCE" for a message about a row, where the site has two sources."""
    return f" of {data.source}" if data.test_source else ""


def check_rows(
    site: str, data: DataSettings, train: Sequence[Row], test: Sequence[Row], known: SourceRows | None = None
) -> SiteDataset:
    """Check the rules that need all rows: some on both sides, and what the task asks for. Raises DataError."""
    if not train:
        raise DataError("data.source", "rows to train on", f"none in {data.source}", site=site)
    if not test:
        key, place = ("test_source", data.test_source) if data.test_source else ("test_fraction", data.source)
        raise DataError(f"data.{key}", "rows to test on", f"none in {place} beside {len(train)} to train on", site=site)
    train, validation = hold_out_validation(train, data.validation_fraction)
    if data.evaluate_on == "validation":
        test, validation = _for_testing(validation, site), ()
    try:
        labels = task_class(data.task).check_rows(data, train, [*test, *validation])
    except DataError as error:
        raise error.at_site(site) from None
    number = known.numbers_of if known else lambda rows: ()
    notes = (*(known.notes if known else ()), *_repeated(data, [*train, *validation], test, number(test)))
    columns = {key: name for key in INPUT_KEYS if (name := getattr(data, key)) is not None}
    return SiteDataset(
        site,
        data.task,
        train,
        test,
        labels,
        number(train),
        number(test),
        notes=tuple(dict.fromkeys(notes)),
        columns=columns,
        validation=validation,
        validation_numbers=number(validation),
    )


def _for_testing(validation: Sequence[Row], site: str) -> list[Row]:
    if not validation:
        hint = "Set data.validation_fraction, for example to 0.25, or use more training rows."
        raise DataError("data.evaluate_on", "validation rows", "none", site=site, hint=hint)
    return list(validation)


def hold_out_validation(rows: Sequence[Row], fraction: float) -> tuple[Sequence[Row], Sequence[Row]]:
    """Split training rows in two: the last ``fraction`` of every label is for validation.

    A row whose label no row before it has stays in training. Training rows and validation rows in this order are split
    in the same way again.
    """
    places = places_by_label(rows, range(len(rows)))
    order = sorted(places, key=lambda i: (places[i], labels_of(rows[i])))
    held_out = set(order[len(rows) - round(len(rows) * fraction) :])
    train = [row for i, row in enumerate(rows) if i not in held_out]
    moved, kept = split_new_labels(train, [row for i, row in enumerate(rows) if i in held_out])
    return [*train, *moved], tuple(kept)


def places_by_label(rows: Sequence[Row], order: Iterable[int]) -> dict[int, float]:
    """Return for each row its place, from 0 to 1, among the rows with its labels in this order.

    In the order of these places, any first part of the rows has about the label fractions of all rows.
    """
    by_label: dict[tuple[str, ...], list[int]] = {}
    for i in order:
        by_label.setdefault(labels_of(rows[i]), []).append(i)
    return {i: (k + 0.5) / len(group) for group in by_label.values() for k, i in enumerate(group)}


def split_new_labels(known: Sequence[Row], rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Split rows into those with a label that neither ``known`` nor a row before them has, and the others."""
    seen, new, others = {label for row in known for label in labels_of(row)}, [], []
    for row in rows:
        (others if seen.issuperset(labels_of(row)) else new).append(row)
        seen.update(labels_of(row))
    return new, others


def tell(sites: Sequence[SiteDataset]) -> None:
    """Log the notes of sites' rows as warnings, once where all sites have the same.

    Only the sites may see them: notes can name files and labels.
    """
    shared = [note for note in sites[0].notes if len(sites) > 1 and all(note in site.notes for site in sites)]
    for note in shared:
        logger.warning("%s", note)
    for site in sites:
        for note in site.notes:
            if note not in shared:
                logger.warning("site %s: %s", site.site, note)


def _repeated(data: DataSettings, train: Sequence[Row], test: Sequence[Row], numbers: Sequence[int]) -> list[str]:
    """Note test rows whose inputs are training rows too: their metrics say little about new inputs."""
    if TASKS[data.task].array_columns:
        return []
    inputs = {_input_of(row) for row in train}
    repeated = [i for i, row in enumerate(test) if _input_of(row) in inputs]
    if not repeated:
        return []
    where = f": {listed(sorted(numbers[i] for i in repeated))} of {data.test_source or data.source}" if numbers else ""
    return [f"{len(repeated)} of {len(test)} test rows are training rows too{where}"]


def _input_of(row: Row) -> object:
    """A text without its label; in generation the whole row, since one prompt can have several answers."""
    if "text" in row:
        return row["text"], row.get("text_pair")
    return json.dumps(row, sort_keys=True, default=str)
