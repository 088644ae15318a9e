"""Rows of a file: labels, templates, row numbers, and what a site is told about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colora.client.data.readers import read_rows
from colora.client.data.row_schema import tell
from colora.common.config.schema import DataSettings
from colora.common.dataset import SiteDataset
from tests.client.data.test_files import ROWS, lines, loaded, refused, table, written


def with_labels(labels: list[Any]) -> str:
    return lines([{"text": f"text {i}", "label": label} for i, label in enumerate(labels)])


@pytest.mark.parametrize("blank", ["", "  ", "\u00a0"])
def test_rows_without_a_label_are_refused_with_their_numbers(blank: str, tmp_path: Path) -> None:
    content = with_labels(["a", "b", blank] * 8)
    message = refused(tmp_path / "a.jsonl", content)
    assert message.endswith("data.label: expected a label, found an empty one in rows 3, 6, 9, 12, 15 and 3 more")


def test_rows_without_a_label_are_left_out_where_the_labels_are_listed(tmp_path: Path) -> None:
    rows = loaded(tmp_path / "a.jsonl", with_labels(["a", "b", "", "c"] * 4), labels=("b", "a"))
    assert rows.labels == ("b", "a")
    assert len(rows.train) + len(rows.test) == 8


def test_labels_that_differ_in_white_space_are_one_and_counted(tmp_path: Path) -> None:
    rows = loaded(tmp_path / "a.jsonl", with_labels(["a", " a", "b c", "b  c"] * 3))
    assert rows.labels == ("a", "b c")
    (note,) = rows.notes
    assert note.startswith("White space was removed from the labels in rows 2, 4, 6, 8, 10 and 1 more of ")


@pytest.mark.parametrize("label", [["a", "b"], {"a": 1}, 0.5, None])
def test_a_label_that_is_no_text_and_no_whole_number_is_refused(label: Any, tmp_path: Path) -> None:
    message = refused(tmp_path / "a.jsonl", with_labels(["a", "b", label]))
    assert "expected a text or whole number" in message
    assert "in row 3" in message
    assert ('task = "multilabel"' in message) is isinstance(label, list)


def test_whole_numbers_sort_by_value_and_may_be_written_as_fractions(tmp_path: Path) -> None:
    assert loaded(tmp_path / "a.jsonl", with_labels([10, 2, 0, 1] * 3)).labels == ("0", "1", "2", "10")
    assert loaded(tmp_path / "b.jsonl", with_labels([10.0, 2, "-1"] * 3)).labels == ("-1", "2", "10")
    assert loaded(tmp_path / "c.jsonl", with_labels(["10", "2", "x"] * 3)).labels == ("10", "2", "x")


def test_notes_are_logged_once_where_all_sites_have_them(caplog: pytest.LogCaptureFixture) -> None:
    notes = {"ada": ("of the file", "of ada"), "bob": ("of the file",)}
    tell([SiteDataset(name, "classification", (), (), notes=found) for name, found in notes.items()])
    assert caplog.messages == ["of the file", "site ada: of ada"]
    caplog.clear()
    tell([SiteDataset("bob", "classification", (), (), notes=notes["bob"])])
    assert caplog.messages == ["site bob: of the file"]


def test_test_rows_that_are_training_rows_are_counted(tmp_path: Path) -> None:
    test = written(tmp_path / "test.jsonl", lines([{"text": "new", "label": "no"}, *ROWS[:2]]))
    rows = loaded(tmp_path / "a.jsonl", lines(), test_source=test)
    assert rows.notes == (f"2 of 3 test rows are training rows too: rows 2, 3 of {test}",)
    assert not loaded(tmp_path / "b.jsonl", lines()).notes


def test_rows_keep_their_numbers_in_the_source(tmp_path: Path) -> None:
    rows = loaded(tmp_path / "a.jsonl", lines())
    for part, numbers in ((rows.train, rows.train_numbers), (rows.test, rows.test_numbers)):
        assert [ROWS[number - 1]["text"] for number in numbers] == [row["text"] for row in part]


def test_templates_join_columns(tmp_path: Path) -> None:
    content = lines([{"a": "x", "b": i, "c": None, "label": "yn"[i % 2], "{a}": "z"} for i in range(8)])
    rows = loaded(tmp_path / "a.jsonl", content, text="{a}: {b}{c}", shuffle=False)
    assert {row["text"] for row in (*rows.train, *rows.test)} == {f"x: {i}" for i in range(8)}
    assert {row["text"] for row in loaded(tmp_path / "b.jsonl", content, text="{a}").train} == {"z"}
    assert "expected a column 'd', found only a, b, c" in refused(tmp_path / "c.jsonl", content, text="{a} {d}")


def test_pairs_of_texts_have_two_columns(tmp_path: Path) -> None:
    content = lines([{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i % 2} for i in range(8)])
    rows = loaded(tmp_path / "a.jsonl", content, text="premise", text_pair="hypothesis")
    assert all(row["text_pair"] == row["text"].replace("p", "h") for row in rows.train)
    assert rows.columns == {"text": "premise", "text_pair": "hypothesis", "prompt": "prompt"}
    assert "expected a column 'second'" in refused(tmp_path / "b.jsonl", content, text="premise", text_pair="second")


@pytest.mark.parametrize(("told", "right"), [(";", ","), ("\t", ","), ("|", ";"), ("^", "\t"), (",", "\t")])
def test_a_wrong_delimiter_is_named_by_its_key(told: str, right: str, tmp_path: Path) -> None:
    message = refused(tmp_path / "a.csv", table(right), delimiter=told)
    assert message.startswith("site ada: data.delimiter is ")
    assert "which finds one column only in" in message
    assert message.endswith("Remove data.delimiter, or set it to the character between the columns.")


def test_a_table_of_one_column_may_name_its_delimiter(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", "text\n" + "".join(f"red, sun {i}\n" for i in range(8)))
    assert len(read_rows(source, data=DataSettings(source, delimiter=";"))) == 8


def test_labels_that_a_data_set_stores_as_numbers_have_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    columns = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    rows = read_rows(str(tmp_path / "saved"))
    assert [row["label"] for row in rows] == ["yes", "no", None]
    several = datasets.Features({"label": datasets.Sequence(datasets.ClassLabel(names=["no", "yes"]))})
    datasets.Dataset.from_dict({"label": [[1, 0], []]}, features=several).save_to_disk(str(tmp_path / "several"))
    assert [row["label"] for row in read_rows(str(tmp_path / "several"))] == [["yes", "no"], []]


def test_a_blank_line_of_a_table_with_one_column_is_a_row(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", "\ntext\nred sun\n\nblue moon\n\n")
    assert [row["text"] for row in read_rows(source)] == ["red sun", "", "blue moon"]
    several = written(tmp_path / "b.csv", "text,label\na,yes\n\nb,no\n")
    assert [row["text"] for row in read_rows(several)] == ["a", "b"]
