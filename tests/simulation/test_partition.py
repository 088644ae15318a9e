"""Sites made out of data sets: every row goes to one site, the seed determines which, and files are read back equal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colora.client.data.selection import balanced, load_site_rows
from colora.common.config.loader import load_site, recipe_from
from colora.common.config.schema import PartitionSettings, Recipe, SimulatedSiteSettings
from colora.common.dataset import Row, SiteDataset
from colora.simulation.minimum_shares import top_up
from colora.simulation.partition import SiteShare, by_column, dirichlet, iid, make_sites, write_site

LABELS = ("cat", "dog", "sun")
COUNT = 120
ROWS: list[Row] = [
    {"text": f"text {i}", "label": LABELS[i % 3], "region": f"r{(i * i) % 5}"} for i in range(COUNT)
]  # all texts are different


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def recipe(seed: int = 0, **tables: Any) -> Recipe:
    return recipe_from({"name": "x", "rounds": 1, "seed": seed, "model": {"source": "m"}, **tables})


def split(source: str, seed: int = 0, **partition: Any) -> list[SiteShare]:
    return make_sites(recipe(seed, data={"source": source}, partition=partition))


def texts(rows: Iterable[Row]) -> list[str]:
    return [row["text"] for row in rows]


def all_texts(sites: Iterable[SiteShare]) -> list[str]:
    return [text for site in sites for part in (site.rows.train, site.rows.test) for text in texts(part)]


PARTITIONS: list[dict[str, Any]] = [
    {"by": "iid", "sites": 7},
    {"by": "dirichlet", "sites": 4, "alpha": 5.0},
    {"by": "column", "column": "region"},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p["by"])
def test_every_row_goes_to_exactly_one_site_and_side(source: str, partition: dict[str, Any], seed: int) -> None:
    assert sorted(all_texts(split(source, seed, **partition))) == sorted(texts(ROWS))


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p["by"])
def test_the_seed_alone_decides_a_partition(source: str, partition: dict[str, Any]) -> None:
    assert split(source, 1, **partition) == split(source, 1, **partition)
    assert split(source, 1, **partition) != split(source, 2, **partition)


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.5, 10.0, 1e6])
@pytest.mark.parametrize("sites", [1, 2, 9, 200])
def test_dirichlet_loses_and_doubles_no_row_at_any_concentration(alpha: float, sites: int) -> None:
    settings = PartitionSettings("dirichlet", sites=sites, alpha=alpha)
    parts = dirichlet(ROWS, settings, recipe(partition={"by": "iid"}, data={"source": "x"}))
    assert len(parts) == sites
    assert sorted(i for part in parts.values() for i in part) == list(range(COUNT))


def test_dirichlet_spreads_a_label_evenly_at_a_large_alpha_and_hardly_at_a_small_one() -> None:
    """At alpha → ∞ each of 4 sites has a quarter of each label's 40 rows; at alpha → 0 one site has them all."""
    for alpha, largest in ((1e6, 10), (1e-6, 40)):
        settings = PartitionSettings("dirichlet", sites=4, alpha=alpha)
        parts = dirichlet(ROWS, settings, recipe(partition={"by": "iid"}, data={"source": "x"}))
        for label in LABELS:
            counts = [sum(ROWS[i]["label"] == label for i in part) for part in parts.values()]
            assert abs(max(counts) - largest) <= 1


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.5, 100.0])
@pytest.mark.parametrize(("sites", "rows", "labels"), [(12, 8, 2), (12, 10, 1), (5, 20, 3), (30, 4, 2)])
def test_every_site_of_a_dirichlet_split_can_train_and_test(
    source: str, alpha: float, sites: int, rows: int, labels: int
) -> None:
    """120 rows of three labels; check_rows refuses a site without test rows or with one label."""
    table = {"by": "dirichlet", "sites": sites, "alpha": alpha, "min_rows": rows, "min_labels": max(labels, 2)}
    made = split(source, **table)
    assert sorted(all_texts(made)) == sorted(texts(ROWS))
    for site in made:
        found = [row["label"] for row in (*site.rows.train, *site.rows.test)]
        assert len(found) >= rows
        assert len(set(found)) >= labels
        assert site.rows.test
    notes = {note for site in made for note in site.rows.notes}
    assert all(note.endswith(f"so that every site has {rows} rows and {max(labels, 2)} labels") for note in notes)
    if alpha < 1:
        assert len(notes) == 1


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.5])
def test_the_test_rows_of_a_dirichlet_split_have_labels_that_their_site_trains_on(
    source: str, alpha: float, tmp_path: Path
) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({**row, "text": f"test {row['text']}"}) + "\n" for row in ROWS[::2]))
    partition = {"by": "dirichlet", "sites": 9, "alpha": alpha}
    data = {"source": source, "test_source": str(test), "where": {"region": "r1"}, "labels": ["cat", "sun"]}
    made = make_sites(recipe(data={**data, "where": None}, partition=partition))
    for site in made:
        assert {row["label"] for row in site.rows.test} <= {row["label"] for row in site.rows.train}
        assert len(site.rows.train) >= 8
    made = make_sites(recipe(data=data, partition={**partition, "sites": 3}))
    assert all(len(site.rows.train) >= 8 for site in made), "rows that are left out do not count"


def test_rows_are_moved_only_where_a_site_lacks_them() -> None:
    """The first site lacks a label and two rows; the second has most to spare."""
    parts = {"a": [0, 1], "b": [2, 3, 4, 5, 6, 7], "c": [8, 9, 10, 11]}
    labels = ["x", "x", *"xxyyyy", *"xxyy"]
    settings = PartitionSettings("dirichlet", min_rows=4, min_labels=2)
    assert top_up(parts, labels, settings) == 2
    assert parts == {"a": [0, 1, 6, 7], "b": [2, 3, 4, 5], "c": [8, 9, 10, 11]}


@pytest.mark.parametrize("sites", [1, 7, 120])
def test_iid_parts_differ_by_one_row_at_most(sites: int) -> None:
    parts = iid(ROWS, PartitionSettings("iid", sites=sites), recipe(partition={"by": "iid"}, data={"source": "x"}))
    sizes = [len(part) for part in parts.values()]
    assert sum(sizes) == COUNT
    assert max(sizes) - min(sizes) <= 1


def test_a_column_makes_one_site_of_each_value_with_its_rows(source: str) -> None:
    sites = {site.settings.name: site for site in split(source, by="column", column="region")}
    assert list(sites) == sorted({row["region"] for row in ROWS})
    for name, site in sites.items():
        assert sorted(all_texts([site])) == sorted(row["text"] for row in ROWS if row["region"] == name)


def test_any_value_of_a_column_makes_a_valid_site_name() -> None:
    values = ["São Paulo", "-x-", "a/b", 7, 1.5, True, "z" * 99, "日本"]
    rows = [{"who": value} for value in values]
    plain = recipe(partition={"by": "iid"}, data={"source": "x"})
    parts = by_column(rows, PartitionSettings("column", column="who"), plain)
    assert sorted(parts) == sorted(["S-o-Paulo", "x", "a-b", "7", "1.5", "True", "z" * 64, "unnamed"])
    assert all(SimulatedSiteSettings(name) for name in parts)


# --- explicit sites -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_explicit_sites_of_one_source_never_share_a_row(source: str, seed: int) -> None:
    other = str(Path(source).parent / "." / "link.jsonl")
    Path(other).symlink_to(source)
    tables = [
        {"name": "counts", "train": 10, "test": 8},
        {"name": "labels", "labels": ["cat", "dog"], "train": 12, "test": 6},
        {"name": "same file", "test_source": source, "train": 9, "test": 6},
        {"name": "link", "source": other, "where": {"region": "r1"}, "train": 6, "test": 6},
        {"name": "rest"},
    ]
    tables = [{**table, "name": table["name"].replace(" ", "-")} for table in tables]
    counts = Counter(all_texts(make_sites(recipe(seed, data={"source": source}, site=tables))))
    assert max(counts.values()) == 1
    assert set(counts) <= set(texts(ROWS))


def test_the_seed_alone_decides_what_explicit_sites_draw(source: str) -> None:
    tables = [{"name": name, "train": 20, "test": 10} for name in ("ada", "bob")]
    drawn = [make_sites(recipe(seed, data={"source": source}, site=tables)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_site_takes_at_most_what_it_asks_for_and_as_much_of_every_label(source: str) -> None:
    table = {"name": "ada", "test_source": source, "train": 31, "test": 9}
    (site,) = make_sites(recipe(data={"source": source}, site=[table]))
    for rows, expected in ((site.rows.train, [10, 10, 11]), (site.rows.test, [3, 3, 3])):
        assert sorted(Counter(row["label"] for row in rows).values()) == expected


def test_balanced_draws_take_labels_in_turn_and_keep_their_order() -> None:
    rows = [(i, {"label": label}) for i, label in enumerate("aaabca")]
    assert [n for n, _ in balanced(rows, 5)] == [0, 3, 4, 1, 2]
    assert [n for n, _ in balanced(rows, 99)] == [0, 3, 4, 1, 2, 5]
    assert balanced(rows, None) == rows


# --- on disk --------------------------------------------------------------------------------------------------------

WRITTEN = {
    "classification": SiteDataset(
        "ada",
        "classification",
        [{"text": 'größer\n\u2028 "x"', "label": "z"}, {"text": "", "label": "a"}],
        [{"text": "t", "label": "a"}],
        ("z", "a"),
    ),
    "generation": SiteDataset(
        "ada", "generation", [{"prompt": "p\r\n", "completion": "日本"}], [{"prompt": "", "completion": ""}]
    ),
    "chat": SiteDataset(
        "ada",
        "generation",
        [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}],
        [{"messages": [{"role": "assistant", "content": "ä"}]}],
    ),
}


def read_back(rows: SiteDataset, folder: Path) -> SiteDataset:
    write_site(SiteShare(SimulatedSiteSettings(rows.site), rows), folder)
    return load_site_rows(load_site(folder / "site.toml"), seed=99)


@pytest.mark.parametrize("rows", WRITTEN.values(), ids=WRITTEN)
def test_written_rows_are_read_back_equal(rows: SiteDataset, tmp_path: Path) -> None:
    assert read_back(rows, tmp_path) == rows


SOURCE_COLUMNS: list[tuple[dict[str, Any], list[Row]]] = [
    ({"text": "body", "label": "queue"}, [{"body": f"t{i}", "queue": i % 2} for i in range(8)]),
    ({"text": "a", "text_pair": "b", "label": "c"}, [{"a": f"t{i}", "b": "u", "c": i % 2} for i in range(8)]),
    ({"text": "{a}: {b}"}, [{"a": f"t{i}", "b": "u", "label": i % 2} for i in range(8)]),
    ({"task": "generation", "prompt": "q", "completion": "a"}, [{"q": f"t{i}", "a": "u"} for i in range(8)]),
    ({"task": "generation"}, [{"instruction": f"t{i}", "input": "", "output": "u"} for i in range(8)]),
    (
        {"task": "generation", "messages": "talk"},
        [{"talk": [{"from": "human", "value": f"t{i}"}, {"from": "gpt", "value": "u"}]} for i in range(8)],
    ),
]


@pytest.mark.parametrize(("data", "rows"), SOURCE_COLUMNS, ids=lambda value: str(value)[:20])
def test_written_columns_keep_the_names_of_the_source(data: dict[str, Any], rows: list[Row], tmp_path: Path) -> None:
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows))
    (site,) = make_sites(recipe(data=data, site=[{"name": "ada", "source": str(source)}]))
    write_site(site, tmp_path / "ada")
    read = load_site_rows(load_site(tmp_path / "ada" / "site.toml"), seed=99)
    assert read == site.rows
    assert {key: read.columns[key] for key in site.rows.columns} == site.rows.columns


def test_written_arrays_are_read_back_equal(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, test = (
        [{"x": rng.standard_normal((3, 3)).astype("f4"), "y": np.float32(rng.standard_normal())} for _ in range(n)]
        for n in (4, 2)
    )
    dataset = read_back(SiteDataset("ada", "regression", train, test), tmp_path)
    assert (dataset.site, dataset.task) == ("ada", "regression")
    for read, written in ((dataset.train, train), (dataset.test, test)):
        assert len(read) == len(written)
        for a, b in zip(read, written, strict=True):
            assert all(a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in "xy")


def test_a_written_folder_moves_with_its_rows(source: str, tmp_path: Path) -> None:
    site = split(source, **PARTITIONS[0])[0]
    write_site(site, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_site_rows(load_site(tmp_path / "there" / "site.toml"), seed=0) == site.rows
