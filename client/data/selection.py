"""Select the training and test rows of a site: filtering, shuffling, limits and held-out rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ...common.config.diagnostics import did_you_mean
from ...common.config.schema import DataSettings
from ...common.config.site_schema import SiteSettings
from ...common.dataset import Row, SiteDataset, labels_of
from ...common.errors import DataError
from ...common.seeds import seed_from
from .readers import as_test_source, read_rows
from .row_schema import SourceRows, check_rows, parse_rows, places_by_label, split_new_labels


@dataclass
class Sources:
    """The sources read so far, and the rows taken from them: two sites of one machine never get the same row."""

    rows: dict[tuple[str | None, ...], tuple[list[Row], list[str]]] = field(default_factory=dict)
    taken: dict[str, set[int]] = field(default_factory=dict)

    def free(self, source: str, data: DataSettings, site: str) -> tuple[list[tuple[int, Row]], list[str]]:
        """Return the rows that no site has taken, with their numbers in the source (from 1), and the reader's notes."""
        key = _source_key(source)
        read_as = (key, data.config, data.delimiter, data.encoding)
        if read_as not in self.rows:
            notes: list[str] = []
            self.rows[read_as] = list(read_rows(source, site, data, notes)), notes
        rows, notes = self.rows[read_as]
        taken = self.taken.setdefault(key, set())
        free = [(n, row) for n, row in enumerate(rows, 1) if n not in taken]
        if not free:
            raise DataError(
                "data.source",
                "rows that are not taken yet",
                f"none of {len(taken)} left in {source}",
                site=site,
                message=f"data.source: the other sites take all {len(taken)} rows of {source}.",
                hint="Limit the rows of each site with data.train and data.test.",
            )
        return free, notes

    def take(self, source: str, numbers: Iterable[int]) -> None:
        """Mark rows as taken."""
        self.taken[_source_key(source)].update(numbers)


def load_site_rows(site: SiteSettings, seed: int, sources: Sources | None = None) -> SiteDataset:
    """Read, shuffle, select and check one site's rows. Raises DataError naming the site, field and row.

    The order derives from the seed, the site and the file's name, so that a simulation and a deployed site with the
    same file select the same rows.
    """
    data, sources, known = site.data, sources or Sources(), SourceRows()

    def draw(source: str, count: int | None) -> list[Row]:
        free, notes = sources.free(source, data, site.name)
        known.notes += notes
        selected = dict(select_numbered(free, replace(data, source=source), site.name, known.notes))
        order = (
            _order(len(free), seed_from(seed, site.name, _source_name(source))) if data.shuffle else range(len(free))
        )
        candidates = [(n, selected[n]) for n in (free[i][0] for i in order) if n in selected]
        chosen = balanced(candidates, count) if data.shuffle else candidates[:count]
        sources.take(source, (n for n, _ in chosen))
        for number, row in chosen:
            known.add(number, row)
        return [row for _, row in chosen]

    if data.test_source:
        train = draw(data.source, data.train)
        with as_test_source():
            test = draw(data.test_source, data.test)
    else:
        total = None if data.train is None or data.test is None else data.train + data.test
        train, test = hold_out(draw(data.source, total), data, seed_from(seed, site.name, "held out"))
    return check_rows(site.name, data, capped(train, data.train), capped(test, data.test), known)


def _order(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count).tolist()


def _source_key(source: str) -> str:
    """Return a key that two spellings of one path share."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _source_name(source: str) -> str:
    """Return the name of a file or folder without its parent, and any other source as it is."""
    return Path(source).name if Path(source).exists() else source


def capped(rows: Sequence[Row], count: int | None) -> list[Row]:
    """Return the first ``count`` rows, taken from each label in turn where rows have labels, so that none is lost."""
    if count is None or len(rows) <= count:
        return list(rows)
    return [row for _, row in balanced(list(enumerate(rows)), count)]


def balanced(rows: Sequence[tuple[int, Row]], count: int | None) -> list[tuple[int, Row]]:
    """Return the first ``count`` numbered rows, taken from each label in turn; all of them without ``count``."""
    if count is None:
        return list(rows)
    by_label: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        labels = labels_of(row[1])
        by_label.setdefault(labels[0] if len(labels) == 1 else "", []).append(row)
    cycles = zip_longest(*(by_label[label] for label in sorted(by_label)))
    return [row for cycle in cycles for row in cycle if row is not None][:count]


def hold_out(rows: Sequence[Row], data: DataSettings, seed: int) -> tuple[list[Row], list[Row]]:
    """Split the rows into training and test rows with a seed.

    The ratio is ``train`` : ``test`` where both are set, otherwise ``test_fraction``. With ``stratify`` it holds for
    every label. The first test row of a label that training lacks is moved to training, so that no site is refused by
    chance. If that would leave no test row, a training row whose labels others have becomes one.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    if data.stratify:
        order = sorted(order, key=places_by_label(rows, order).__getitem__)
    share = data.test / (data.train + data.test) if data.train and data.test else data.test_fraction
    cut, ordered = len(rows) - round(len(rows) * share), [rows[i] for i in order]
    moved, test = split_new_labels(ordered[:cut], ordered[cut:])
    train = moved + ordered[:cut]
    if moved and not test:
        counts = Counter(label for row in train for label in labels_of(row))
        test = [row for row in train if all(counts[label] > 1 for label in labels_of(row))][-1:]
        train = [row for row in train if not any(row is other for other in test)]
    return train, test


def select_numbered(
    rows: Iterable[tuple[int, Row]], data: DataSettings, site: str, notes: list[str] | None = None
) -> list[tuple[int, Row]]:
    """Parse the rows for their task and filter them by ``where`` and ``labels``; keep their numbers in the source."""
    rows = list(rows)
    for column in data.where or ():
        if rows and not any(column in row for _, row in rows):
            hint = did_you_mean(column, map(str, rows[0][1]), similarity=0.7)
            columns = ", ".join(map(str, rows[0][1]))
            raise DataError("data.where", f"a column {column!r}", f"only {columns}", site=site, hint=hint)
    return parse_rows([(n, row) for n, row in rows if matches(row, data)], data, site, notes)


def matches(row: Row, data: DataSettings) -> bool:
    """Whether a row of a source has the column values of ``data.where``."""
    return all(str(row.get(column)) == value for column, value in (data.where or {}).items())
