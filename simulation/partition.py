"""Sites made out of data sets: explicit sites, one per column value, IID, or Dirichlet over labels.

flwr-datasets has partitioners too, but it requires datasets < 5, huggingface_hub < 2, matplotlib and seaborn at every
site for three short functions.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import tomli_w

from ..client.data.readers import as_test_source, read_rows
from ..client.data.row_schema import SourceRows, check_rows, tell
from ..client.data.selection import Sources, capped, hold_out, load_site_rows, matches, select_numbered
from ..common.atomic_io import write_atomically
from ..common.config.rules import missing_source
from ..common.config.schema import DataSettings, PartitionSettings, Recipe, SimulatedSiteSettings, to_dict
from ..common.config.site_schema import SiteSettings
from ..common.dataset import TASKS, Row, SiteDataset, labels_of
from ..common.errors import DataError
from ..common.seeds import seed_from
from .minimum_shares import follow, top_up
from .synthetic_sites import SOURCES, regression_sites

Parts = dict[str, list[int]]  # site name → row indices
COLUMNS = {  # default names of the columns that a row's keys are written as
    **{key: key for key in ("text", "text_pair", "label", "prompt", "completion", "messages")}
}


@dataclasses.dataclass(frozen=True)
class SiteShare:
    """The settings of a simulated site and its share of the rows."""

    settings: SimulatedSiteSettings
    rows: SiteDataset


def make_sites(recipe: Recipe) -> list[SiteShare]:
    """Return the sites of a recipe with checked rows, which depend on the recipe only.

    Raises DataError, and ConfigError for a site without a source.
    """
    if without := [site.name for site in recipe.site if not site.data.source]:
        raise missing_source(without[0])
    if recipe.partition is None:
        sites = _explicit(recipe)
    elif recipe.data.source in SOURCES:
        if recipe.data.evaluate_on != "test":
            raise DataError("data.evaluate_on", "test, for synthetic data", recipe.data.evaluate_on)
        sites = [SiteShare(settings, rows) for settings, rows in regression_sites(recipe)]
    else:
        sites = _partitioned(recipe)
    tell([site.rows for site in sites])
    return sites


def write_site(site: SiteShare, folder: Path) -> None:
    """Write a site's rows and its ``site.toml`` to ``folder``, in the files of a deployed site.

    Columns keep their names, by which ``colora predict`` finds the inputs of other files.
    """
    settings, messages = site.settings.data, any("messages" in row for row in site.rows.train)
    names = {key: getattr(settings, key) or default for key, default in COLUMNS.items()}
    if len(set(names.values())) < len(names) or TASKS[site.rows.task].array_columns:
        names = COLUMNS
    write_rows = _write_arrays if TASKS[site.rows.task].array_columns else _write_lines
    files = {
        part: write_rows(folder / "data" / part, [{names.get(k, k): v for k, v in row.items()} for row in rows])
        for part, rows in (("train", [*site.rows.train, *site.rows.validation]), ("test", site.rows.test))
    }
    data = dataclasses.replace(
        DataSettings(task=site.rows.task, labels=site.rows.labels or None),
        source=f"data/{files['train']}",
        test_source=f"data/{files['test']}",
        shuffle=False,
        validation_fraction=settings.validation_fraction if settings.evaluate_on == "test" else 0.0,
        text_pair=names["text_pair"] if settings.text_pair else None,
        messages=names["messages"] if messages else None,
        format=None if messages or site.rows.task != "generation" else "prompt-completion",
        **{key: names[key] for key in ("text", "label", "prompt", "completion")},
    )
    private = {"private": to_dict(site.settings.private)} if site.settings.private else {}
    allow = {"allow": {"max_rank": site.settings.max_rank}} if site.settings.max_rank else {}
    text = tomli_w.dumps({"name": site.settings.name, "data": to_dict(data), **private, **allow})
    write_atomically(folder / "site.toml", text.encode())


def _explicit(recipe: Recipe) -> list[SiteShare]:
    """Return one site per ``[[site]]`` table. Sites that read the same source never get the same row."""
    sources = Sources()
    return [
        SiteShare(site, load_site_rows(SiteSettings(site.name, site.data), recipe.seed, sources))
        for site in recipe.site
    ]


def _partitioned(recipe: Recipe) -> list[SiteShare]:
    data, partition = recipe.data, recipe.partition
    assert partition is not None
    if data.test_source == data.source:
        raise DataError(
            "data.test_source",
            "another source than data.source",
            data.source,
            message=f"data.source and data.test_source of a partition are both {data.source}.",
            hint="Remove data.test_source: data.test_fraction of the rows is held out for testing.",
        )
    notes: list[str] = []
    parts = {"train": _rows_and_parts(recipe, data.source, partition, notes)}
    if data.test_source:
        with as_test_source():
            parts["test"] = _rows_and_parts(recipe, data.test_source, partition, notes, parts["train"])
    sites, known = [], SourceRows(notes=notes)
    for number, row in (pair for part in parts.values() for pairs in part.values() for pair in pairs):
        known.add(number, row)
    for (name, pairs), max_rank in zip(parts["train"].items(), cycle(partition.max_ranks or (None,)), strict=False):
        train = [row for _, row in pairs]
        if data.test_source:
            test = [row for _, row in parts["test"].get(name, [])]
        else:
            train, test = hold_out(train, data, seed_from(recipe.seed, name, "held out"))
        rows = check_rows(name, data, capped(train, data.train), capped(test, data.test), known)
        sites.append(SiteShare(SimulatedSiteSettings(name, data, max_rank=max_rank), rows))
    return sites


def _rows_and_parts(
    recipe: Recipe,
    source: str,
    partition: PartitionSettings,
    notes: list[str],
    train: dict[str, list[tuple[int, Row]]] | None = None,
) -> dict[str, list[tuple[int, Row]]]:
    """Return the rows of every site, parsed, with their numbers in ``source``, by which errors name them.

    ``train`` are the training rows of every site where ``source`` has the test rows.
    """
    raw = list(read_rows(source, None, recipe.data, notes))
    if partition.by == "column" and partition.column not in raw[0]:
        columns = ", ".join(raw[0])
        raise DataError(
            "partition.column",
            f"a column of {source}: {columns}",
            repr(partition.column),
            message=f"partition.column is {partition.column!r}, which is not a column of {source}.",
            hint=f"The columns are {columns}.",
        )
    order = np.random.default_rng(seed_from(recipe.seed, source)).permutation(len(raw)).tolist()
    split = PARTITIONERS[partition.by]([raw[i] for i in order], partition, recipe)
    if partition.by == "dirichlet":
        notes += _evened(split, [raw[i] for i in order], recipe, source, train)
    numbered = {name: [(order[k] + 1, raw[order[k]]) for k in rows] for name, rows in split.items()}
    return {name: select_numbered(rows, recipe.data, name, notes) for name, rows in numbered.items()}


def _evened(
    split: Parts, rows: Sequence[Row], recipe: Recipe, source: str, train: dict[str, list[tuple[int, Row]]] | None
) -> list[str]:
    """Move rows of a Dirichlet split, in place, until every site can train, or test on labels that it trains on.

    Rows that ``data.where`` and ``data.labels`` leave out are removed from the split. Returns a note where rows moved.
    """
    partition, data = recipe.partition, recipe.data
    assert partition is not None
    labels = [_label(row, recipe) for row in rows]
    kept = {i for i, row in enumerate(rows) if matches(row, data) and (not data.labels or labels[i] in data.labels)}
    for part in split.values():
        part[:] = [i for i in part if i in kept]
    if train is None:
        moved, reason = top_up(split, labels, partition), f"{partition.min_rows} rows and {partition.min_labels} labels"
    elif TASKS[data.task].has_labels:
        trained = {
            name: Counter(label for _, row in pairs for label in labels_of(row)) for name, pairs in train.items()
        }
        moved, reason = follow(split, labels, trained), "test rows of labels that it trains on"
    else:
        return []
    return [f"{moved} of {len(kept)} rows of {source} were moved so that every site has {reason}"] if moved else []


def by_column(rows: Sequence[Row], settings: PartitionSettings, recipe: Recipe) -> Parts:
    """Make one site per value of ``partition.column``, named by the value. Raises DataError."""
    parts: Parts = {}
    values: dict[str, object] = {}
    for i, row in enumerate(rows):
        value = row.get(settings.column or "")
        if value is None:
            raise DataError(
                "partition.column",
                f"a value of {settings.column!r} in every row",
                "a row without one",
                message=f"partition.column is {settings.column!r}, but a row has no value of it.",
                hint="Fill in or remove the rows without a value.",
            )
        name = _site_name(value)
        if values.setdefault(name, value) != value:
            raise DataError(
                "partition.column",
                "values that make different site names",
                f"{values[name]!r} and {value!r}, both site {name}",
                message=f"partition.column: the values {values[name]!r} and {value!r} make the same site name, {name}.",
                hint="Rename one of the values.",
            )
        parts.setdefault(name, []).append(i)
    return dict(sorted(parts.items()))


def iid(rows: Sequence[Row], settings: PartitionSettings, recipe: Recipe) -> Parts:
    """Make ``partition.sites`` parts of equal size (± 1). The rows are shuffled already."""
    return {_site_number(k): list(range(k, len(rows), settings.sites)) for k in range(settings.sites)}


def dirichlet(rows: Sequence[Row], settings: PartitionSettings, recipe: Recipe) -> Parts:
    """Divide the rows of each label by Dirichlet(``partition.alpha``) shares (Hsu et al. 2019, arXiv 1909.06335)."""
    rng = np.random.default_rng(seed_from(recipe.seed, "dirichlet"))
    parts: Parts = {_site_number(k): [] for k in range(settings.sites)}
    by_label: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_label.setdefault(_label(row, recipe), []).append(i)
    for label in sorted(by_label):
        shares = rng.dirichlet([settings.alpha] * settings.sites)
        cuts = (np.cumsum(shares)[:-1] * len(by_label[label])).astype(int)
        for name, chunk in zip(parts, np.split(np.array(by_label[label]), cuts), strict=True):
            parts[name] += chunk.tolist()
    return parts


def _label(row: Row, recipe: Recipe) -> str:
    return " ".join(str(row.get(recipe.data.label)).split())


PARTITIONERS = {"column": by_column, "iid": iid, "dirichlet": dirichlet}  # by partition.by


def _site_number(k: int) -> str:
    return f"site-{k + 1:02d}"


def _site_name(value: object) -> str:
    text = "".join(c if (c.isascii() and c.isalnum()) or c in "._-" else "-" for c in str(value)).strip("-._")
    return text[:64] or "unnamed"


def _write_lines(path: Path, rows: Iterable[Row]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path.with_suffix(".jsonl"), text.encode())
    return path.with_suffix(".jsonl").name


def _write_arrays(path: Path, rows: Sequence[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".npz")
    np.savez(file, x=np.stack([r["x"] for r in rows]), y=np.stack([r["y"] for r in rows]))
    return file.name
