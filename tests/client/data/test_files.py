"""Files as people have them: other delimiters and encodings, JSON arrays, compression, sheets, damaged tables."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from colora.client.data.readers import read_rows
from colora.client.data.selection import Sources, load_site_rows
from colora.common.config.loader import load_site
from colora.common.config.schema import DataSettings, parse
from colora.common.config.site_schema import SiteSettings
from colora.common.dataset import Row, SiteDataset
from colora.common.errors import ConfigError, DataError

WORDS = ("red sun", "blue moon", "green hill", "deep sea", "cold dog", "warm cat")
ROWS: list[Row] = [{"text": f"{word} {i}", "label": ("yes", "no")[i % 2]} for i, word in enumerate(WORDS * 2)]


def table(delimiter: str = ",", rows: list[Row] = ROWS) -> str:
    return "".join(delimiter.join(row) + "\n" for row in (("text", "label"), *(tuple(r.values()) for r in rows)))


def lines(rows: list[Row] = ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(path: Path, content: str | bytes, **data: Any) -> str:
    with pytest.raises(DataError) as error:
        load_site_rows(SiteSettings("ada", DataSettings(written(path, content), **data)), seed=0)
    message = str(error.value)
    assert message.startswith("site ada: ")
    assert "\n" not in message
    return message


def loaded(path: Path, content: str | bytes, **data: Any) -> SiteDataset:
    return load_site_rows(SiteSettings("ada", DataSettings(written(path, content), **data)), seed=0)


SAME: dict[str, str | bytes] = {
    "A.CSV": table(),
    "a.TSV": table("\t"),
    "a.JsonL": lines(),
    "a.ndjson": lines(),
    "array.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "lines.json": lines(),
    "wrapped.json": json.dumps({"version": "1", "data": ROWS}),
    "a.jsonl.gz": gzip.compress(lines().encode()),
    "A.CSV.GZ": gzip.compress(table().encode()),
    "a.csv.bz2": bz2.compress(table().encode()),
    "a.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "windows.csv": table().replace("\n", "\r\n"),
    "bom.csv": b"\xef\xbb\xbf" + table().encode(),
    "utf16.csv": table().encode("utf-16"),
    "padded.csv": table().replace("text,label", "text , label"),
    "wide.csv": table().replace("\n", ",,\n").replace("text,label,,", "text,label"),
    "excel.csv": "sep=;\n" + table(";"),
}


@pytest.mark.parametrize("name", SAME)
def test_files_of_one_content_give_the_same_rows_without_a_word(name: str, tmp_path: Path) -> None:
    notes: list[str] = []
    assert list(read_rows(written(tmp_path / name, SAME[name]), notes=notes)) == ROWS
    assert not notes


def parquet(path: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path.read_bytes()


def workbook(path: Path) -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [("text", "label"), *((row["text"], row["label"]) for row in ROWS)]:
        book.active.append(row)
    book.save(path)
    return path.read_bytes()


CONTENTS: dict[str, Callable[[Path], bytes]] = {
    ".jsonl": lambda _: lines().encode(),
    ".ndjson": lambda _: lines().encode(),
    ".json": lambda _: json.dumps(ROWS).encode(),
    ".csv": lambda _: table().encode(),
    ".tsv": lambda _: table("\t").encode(),
    ".parquet": parquet,
    ".xlsx": workbook,
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title], ids=["lower", "upper", "title"])
@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", CONTENTS)
def test_every_suffix_is_read_in_any_case_and_compression(
    suffix: str, compression: str, case: Callable[[str], str], tmp_path: Path
) -> None:
    content = COMPRESSED[compression](CONTENTS[suffix](tmp_path / f"plain{suffix}"))
    assert list(read_rows(written(tmp_path / case(f"rows{suffix}{compression}"), content))) == ROWS


@pytest.mark.parametrize(("delimiter", "name"), [(";", "a semicolon"), ("\t", "a tab"), ("|", "a vertical bar")])
def test_another_delimiter_is_found_and_told(delimiter: str, name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", table(delimiter))
    notes: list[str] = []
    assert list(read_rows(path, notes=notes)) == ROWS
    assert notes == [f"{path} was read with {name} between columns; set data.delimiter if it is wrong"]
    assert list(read_rows(path, data=DataSettings(delimiter=delimiter), notes=(silent := []))) == ROWS
    assert not silent


def test_commas_in_texts_do_not_make_a_table_with_tabs_one_with_commas(tmp_path: Path) -> None:
    rows = [{"text": "one, two, three", "label": "a, b"}] * 4
    assert list(read_rows(written(tmp_path / "a.tsv", table("\t", rows)))) == rows


def test_a_delimiter_is_one_character() -> None:
    for wrong in ("", "ab", '"', "\n"):
        with pytest.raises(ConfigError, match=r"delimiter"):
            parse(DataSettings, {"delimiter": wrong})


TEXTS = {  # sentences in the languages of the encodings
    "cp1252": "Le café était très bon, déjà réservé. „Größe“ überfällig",
    "cp1251": "Посылка пришла поздно, всё плохо",
    "cp1250": "Paczka przyszła późno ąęłż dziękuję",
    "cp1253": "Το πακέτο ήρθε αργά, πολύ κακό",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_likely_encoding_is_found_and_told(encoding: str, tmp_path: Path) -> None:
    rows = [{"text": f"{TEXTS[encoding]} {i}", "label": "ab"[i % 2]} for i in range(20)]
    path = written(tmp_path / "a.csv", table("\t", rows).encode(encoding))
    notes: list[str] = []
    assert list(read_rows(path, notes=notes)) == rows
    note = notes[0]
    assert note.startswith(f"{path} is not UTF-8 and was read as ")
    assert "data.encoding" in note
    settings = DataSettings(encoding=encoding, delimiter="\t")
    assert list(read_rows(path, data=settings, notes=(silent := []))) == rows
    assert not silent


@pytest.mark.parametrize("encoding", ["shift_jis", "euc_kr", "big5"])
def test_an_uncertain_encoding_is_refused_and_can_be_set(encoding: str, tmp_path: Path) -> None:
    text = {"shift_jis": "荷物が遅れました", "euc_kr": "배송이 늦었습니다", "big5": "包裹來晚了"}[encoding]
    rows = [{"text": f"{text} {i}", "label": "ab"[i % 2]} for i in range(20)]
    message = refused(tmp_path / "a.csv", table(rows=rows).encode(encoding))
    assert "line 2 of" in message
    assert "data.encoding to the file's encoding; it may be " in message
    assert repr(encoding) in message
    assert list(read_rows(str(tmp_path / "a.csv"), data=DataSettings(encoding=encoding))) == rows


def test_a_short_latin_1_file_is_read_as_such(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "text,label\ncafé,a\nthé,b\n".encode("latin-1"))
    assert [row["text"] for row in read_rows(path)] == ["café", "thé"]


def test_damaged_utf_8_is_no_other_encoding(tmp_path: Path) -> None:
    content = "text,label\ngrößer über äöü,a\n".encode() + b"caf\xe9,b\n"
    message = refused(tmp_path / "a.csv", content)
    assert "line 3 of" in message
    assert "is not valid utf-8" in message
    assert "data.encoding" in message


def test_a_wrong_encoding_is_named(tmp_path: Path) -> None:
    assert "no encoding 'utf-9'" in refused(tmp_path / "a.csv", table(), encoding="utf-9")
    assert "line 2 of" in refused(tmp_path / "b.csv", "text,label\né,a\n".encode(), encoding="ascii")


def test_an_unquoted_comma_is_refused_with_the_rows(tmp_path: Path) -> None:
    rows = [{**row, "text": row["text"].replace(" ", ", ", 1)} if i % 3 == 0 else row for i, row in enumerate(ROWS)]
    message = refused(tmp_path / "a.csv", table(rows=rows))
    assert "has 2 columns, but there are 3 fields in rows 1, 4, 7, 10." in message
    assert "quotation marks" in message


def test_a_short_row_is_refused_with_its_number(tmp_path: Path) -> None:
    assert "found nothing in row 13" in refused(tmp_path / "a.csv", "label,text\n" + "a,b\nb,c\n" * 6 + "yes\n")


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_quotation_marks_that_enclose_nothing_are_kept(name: str, tmp_path: Path) -> None:
    """Read with quotation marks, the first text would reach to the next mark, five rows later."""
    rows = [{**row, "text": f'"{row["text"]}'} if i % 5 == 0 else row for i, row in enumerate(ROWS)]
    notes: list[str] = []
    assert list(read_rows(written(tmp_path / name, table("\t" if name == "a.tsv" else ",", rows)), notes=notes)) == rows
    assert "quotation marks that enclose no field" in notes[0]


def test_a_field_that_holds_whole_rows_is_refused(tmp_path: Path) -> None:
    """A stray mark and a quoted field later on: neither reading fits all rows."""
    content = 'text\tlabel\n"red\tyes\nblue\tno\ngreen"\tyes\n"deep\tsea"\tno\n'
    assert "a field holds whole rows" in refused(tmp_path / "a.tsv", content)


def test_an_open_quotation_mark_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "line 3 of" in refused(tmp_path / "a.csv", 'text,label\n"a, b",yes\n"c, d,no\ne,yes\n')


def test_a_long_field_is_read(tmp_path: Path) -> None:
    rows = [{"text": "word " * 28_000, "label": "yes"}, *ROWS]
    assert list(read_rows(written(tmp_path / "a.csv", table(rows=rows)))) == rows
    csv.field_size_limit(2**17)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    assert "two columns" in refused(tmp_path / "a.csv", "text,text\na,b\n")


def test_a_file_that_exists_is_never_missing_nor_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a look-up"))
    for name, suffix in (("rows.txt", ".txt"), ("rows", "no suffix"), ("v1.2", ".2")):
        message = refused(tmp_path / name, table())
        assert f"ends in {suffix}, which selects no reader. Use a file in one of these formats: .jsonl," in message
    for missing in ("nowhere/a.CSV", "./rows", "../rows", "/nowhere/rows", "a/b/c", "rows.jsonl.gz", "C:\\rows"):
        with pytest.raises(DataError, match="does not exist"):
            read_rows(missing)
    with pytest.raises(DataError, match="is a folder without a data set of save_to_disk"):
        read_rows(str(tmp_path))


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(3))}).save_to_disk(tmp_path / "two")
    for source, rows in (("one", ROWS), ("two", ROWS), ("two:train", ROWS), ("two:test", ROWS[:3])):
        assert list(read_rows(str(tmp_path / source))) == rows
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        read_rows(str(tmp_path / "two:dev"))
    (tmp_path / "site.toml").write_text('name = "ada"\n[data]\nsource = "two"\ntest_source = "two:test"\n')
    data = load_site(tmp_path / "site.toml").data
    assert (data.source, data.test_source) == (str(tmp_path / "two"), f"{tmp_path / 'two'}:test")


def test_a_hub_data_set_is_loaded_in_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple] = []

    def load(name: str, config: str | None, split: str) -> list[Row]:
        calls.append((name, config, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_rows("owner/name:dev", data=DataSettings(config="en"))
    read_rows("name")
    assert calls == [("owner/name", "en", "dev"), ("name", None, "train")]


def test_the_first_sheet_of_a_workbook_is_read(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [(" text", "label", None), *((r["text"], i % 3, None) for i, r in enumerate(ROWS)), (None, None, None)]:
        book.active.append(row)
    book.create_sheet("more")
    book.save(tmp_path / "a.XLSX")
    notes: list[str] = []
    found = list(read_rows(str(tmp_path / "a.XLSX"), notes=notes))
    assert found == [{"text": r["text"], "label": i % 3} for i, r in enumerate(ROWS)]
    assert "only the first sheet" in notes[0]


def test_a_workbook_with_a_wrong_size_is_read_whole(tmp_path: Path) -> None:
    """Some programs write the range of the first cell only."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [("text", "label"), *((r["text"], r["label"]) for r in ROWS)]:
        book.active.append(row)
    book.save(tmp_path / "whole.xlsx")
    with ZipFile(tmp_path / "whole.xlsx") as whole, ZipFile(tmp_path / "a.xlsx", "w") as wrong:
        for name in whole.namelist():
            wrong.writestr(name, re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1"', whole.read(name)))
    assert list(read_rows(str(tmp_path / "a.xlsx"))) == ROWS


def test_two_columns_of_one_name_in_a_workbook_are_refused(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (("text", "text", "label"), ("a", "b", "yes")):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match="two columns"):
        read_rows(str(tmp_path / "a.xlsx"))


def test_one_conversation_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    assert read_rows(written(tmp_path / "a.json", json.dumps({"messages": turns}, indent=1))) == [{"messages": turns}]
    many = {"conversations": [{"conversations": turns}, {"conversations": turns}]}
    assert len(read_rows(written(tmp_path / "b.json", json.dumps(many)))) == 2
    assert "expected one JSON object, found int" in refused(tmp_path / "c.json", "5")


def test_errors_and_notes_name_the_source_of_their_rows(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", lines())
    odd = [*ROWS[:3], {"text": "x", "label": None}]
    assert refused(
        tmp_path / "train.jsonl", lines(), test_source=written(tmp_path / "test.jsonl", lines(odd))
    ).endswith(f"in row 4 of {tmp_path / 'test.jsonl'}")
    spaced = [*ROWS[:3], {"text": "x", "label": " yes"}]
    data = DataSettings(train, test_source=written(tmp_path / "test.jsonl", lines(spaced)))
    (note,) = (n for n in load_site_rows(SiteSettings("ada", data), seed=0).notes if "White space" in n)
    assert note.endswith(f"in row 4 of {tmp_path / 'test.jsonl'}")


def test_a_limit_holds_for_rows_in_their_order(tmp_path: Path) -> None:
    data = DataSettings(written(tmp_path / "a.jsonl", lines()), train=4, test=2, shuffle=False)
    sources = Sources()
    for start, name in ((0, "ada"), (6, "bob")):
        rows = load_site_rows(SiteSettings(name, data), 0, sources)
        assert {row["text"] for row in (*rows.train, *rows.test)} == {r["text"] for r in ROWS[start : start + 6]}


def test_a_condition_on_a_missing_column_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path / "a.jsonl", lines(), where={"labels": "yes"})
    assert "data.where: expected a column 'labels', found only text, label. Did you mean 'label'?" in message


@pytest.mark.parametrize("template", ["{}", "{text:.2f}", "{text!r}"])
def test_a_template_has_names_only(template: str, tmp_path: Path) -> None:
    message = refused(tmp_path / "a.jsonl", lines(), text=template)
    assert "data.text: expected a template of columns in braces" in message


def test_a_workbook_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert 'pip install "colora[xlsx]"' in refused(tmp_path / "a.xlsx", b"PK")


DAMAGED: dict[str, tuple[str, bytes]] = {
    "gzip": ("a.csv.gz", b"text,label\n"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(lines().encode())[:40]),
    "array": ("a.json", b'[{"text": "x"}, '),
    "array of numbers": ("a.json", b"[1, 2]"),
}


@pytest.mark.parametrize("case", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_named_in_one_sentence(case: tuple[str, bytes], tmp_path: Path) -> None:
    assert case[0] in refused(tmp_path / case[0], case[1])
