"""Which rows a site trains and tests on: filtering, shuffling, caps and held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ...common.config.schema import DataSettings
from ...common.config.site_schema import SiteSettings
from ...common.dataset import Row, SiteDataset, labels_of
from ...common.errors import DataError
from ...common.seeds import seed_from
from .readers import as_test_source, read_rows
from .row_schema import check_rows, parse_row


@dataclass
class Sources:
    """Sources as they were read, and which of their rows are taken: sites of one machine never get the same row."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    taken: dict[str, set[int]] = field(default_factory=dict)

    def free(self, source: str, site: str) -> list[tuple[int, Row]]:
        """The rows that nobody has, with their numbers in the source."""
        place = _place(source)
        if place not in self.rows:
            self.rows[place] = list(read_rows(source, site))
        used = self.taken.setdefault(place, set())
        free = [(n, row) for n, row in enumerate(self.rows[place], 1) if n not in used]
        if not free:
            wanted = "rows that are not taken yet (data.train and data.test limit how many a site takes)"
            raise DataError("data.source", wanted, f"none of {len(used)} left in {source}", site=site)
        return free

    def take(self, source: str, numbers: Iterable[int]) -> None:
        """Gives rows to a site."""
        self.taken[_place(source)].update(numbers)


def load_site_rows(site: SiteSettings, seed: int, sources: Sources | None = None) -> SiteDataset:
    """Reads, shuffles, selects and checks one site's rows. Raises DataError naming the site, field and row.

    The order hangs on seed, site and source, so a simulation and a site of its own that read the same file have the
    same rows.
    """
    data, sources = site.data, sources or Sources()

    def draw(source: str, count: int | None) -> list[Row]:
        free = sources.free(source, site.name)
        shaped = dict(select_numbered(free, data, site.name))
        order = _order(len(free), seed_from(seed, site.name, _spelling(source))) if data.shuffle else range(len(free))
        kept = [(n, shaped[n]) for n in (free[i][0] for i in order) if n in shaped]
        chosen = balanced(kept, count) if data.shuffle else kept
        sources.take(source, (n for n, _ in chosen))
        return [row for _, row in chosen]

    if data.test_source:
        train = draw(data.source, data.train)
        with as_test_source():
            test = draw(data.test_source, data.test)
    else:
        wanted = None if data.train is None or data.test is None else data.train + data.test
        train, test = hold_out(draw(data.source, wanted), data, seed_from(seed, site.name, "held out"))
    return check_rows(site.name, data, capped(train, data.train), capped(test, data.test))


def _order(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count).tolist()


def _place(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).is_file() else source


def _spelling(source: str) -> str:
    """What a source is called wherever it lies: a file by its name."""
    return Path(source).name if Path(source).is_file() else source


def capped(rows: Sequence[Row], count: int | None) -> list[Row]:
    """The first ``count`` rows, taken in turn from every label where rows have labels, so that no class is lost."""
    if count is None or len(rows) <= count:
        return list(rows)
    return [row for _, row in balanced(list(enumerate(rows)), count)]


def balanced(rows: Sequence[tuple[int, Row]], count: int | None) -> list[tuple[int, Row]]:
    """The same for rows with their numbers."""
    if count is None:
        return list(rows)
    by_label: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        labels = labels_of(row[1])
        by_label.setdefault(labels[0] if len(labels) == 1 else "", []).append(row)
    turns = zip_longest(*(by_label[label] for label in sorted(by_label)))
    return [row for turn in turns for row in turn if row is not None][:count]


def hold_out(rows: Sequence[Row], data: DataSettings, seed: int) -> tuple[list[Row], list[Row]]:
    """A seeded split into training and test rows, ``train`` : ``test`` where both are set, else by ``test_fraction``.

    A label that only the test rows would have gives its first row to training: chance refuses no site.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    share = data.test / (data.train + data.test) if data.train and data.test else data.test_fraction
    cut = len(rows) - round(len(rows) * share)
    seen, given = {label for i in order[:cut] for label in labels_of(rows[i])}, []
    for i in order[cut:]:
        if not seen.issuperset(labels_of(rows[i])):
            seen.update(labels_of(rows[i]))
            given.append(i)
    return [rows[i] for i in given + order[:cut]], [rows[i] for i in order[cut:] if i not in given]


def select_numbered(rows: Iterable[tuple[int, Row]], data: DataSettings, site: str) -> list[tuple[int, Row]]:
    """Rows in the form of their task, filtered by ``where`` and ``labels``, with their numbers in the source."""
    wanted = dict(data.where or {})
    kept = [(n, row) for n, row in rows if all(str(row.get(k)) == v for k, v in wanted.items())]
    parsed = [(n, parse_row(row, n, data, site)) for n, row in kept]
    return [(n, row) for n, row in parsed if row is not None]
