"""Data files as people have them, with the verdict on each: so many rows with these labels, or a sentence."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = ("red sun", "blue moon", "green hill", "deep sea", "cold dog", "warm cat")
PAIRS = [(f"{word} {i}", ("yes", "no")[i % 2]) for i, word in enumerate(WORDS * 4)]
ROWS = [{"text": text, "label": label} for text, label in PAIRS]
Content = str | bytes | Callable[[Path], None]


@dataclass(frozen=True)
class FileCase:
    """A file and its verdict: ``rows`` and ``labels`` that are read, or ``error``, a part of the one sentence."""

    name: str
    content: Content
    rows: int = len(ROWS)
    labels: tuple[str, ...] = ("no", "yes")
    error: str = ""
    note: str = ""  # a part of what the site is told
    data: dict[str, Any] = field(default_factory=dict)


def reads(name: str, content: Content, rows: int = len(ROWS), *labels: str, note: str = "", **data: Any) -> FileCase:
    return FileCase(name, content, rows, labels or ("no", "yes"), note=note, data=data)


def refuses(name: str, content: Content, error: str, **data: Any) -> FileCase:
    return FileCase(name, content, error=error, data=data)


def table(delimiter: str = ",", rows: Iterable[Sequence[str]] = PAIRS, header: str = "text,label") -> str:
    return "".join(delimiter.join(row) + "\n" for row in (header.split(","), *rows))


def lines(rows: Iterable[Any] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def replaced(numbers: Iterable[int], **values: Any) -> list[dict[str, Any]]:
    """The rows with other values in the rows of these numbers, from 1."""
    chosen = set(numbers)
    return [{**row, **(values if i in chosen else {})} for i, row in enumerate(ROWS, 1)]


def changed(number: int, line: str) -> str:
    """The table with another line in place of row ``number``."""
    parts = table().splitlines(keepends=True)
    parts[number] = line + "\n"
    return "".join(parts)


def foreign(words: str, encoding: str) -> bytes:
    """A table of texts in a language, in one of its encodings."""
    parts = words.split()
    texts = [f"{' '.join(parts[i:] + parts[:i])} {i}" for i in range(len(parts))] * 3
    rows = [(f"{text} {n}", ("yes", "no")[n % 2]) for n, text in enumerate(texts)][: len(ROWS)]
    return table(rows=rows).encode(encoding)


FRENCH = "l'été dernier nous avons mangé des gâteaux près de la forêt où règne un château très âgé"
RUSSIAN = "прошлым летом мы ели пироги у леса где стоит очень старый замок и река течёт медленно"
JAPANESE = "去年の夏に 私たちは 森の 近くで お菓子を 食べました とても 古い お城が あります そして 川は ゆっくり 流れる"


def parquet(**values: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, **values} for row in ROWS]), path)

    return write


def saved(*, splits: bool = False, class_label: bool = False, unlabelled: bool = False) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.Dataset.from_list(ROWS)
        if class_label:
            rows = rows.class_encode_column("label")
        if unlabelled:  # as the test split of many a data set on the hub
            labels = datasets.ClassLabel(names=["no", "yes"])
            rows = datasets.Dataset.from_dict({"text": rows["text"], "label": [-1, -1, *[0, 1] * 11]})
            rows = rows.cast_column("label", labels)
        (datasets.DatasetDict({"train": rows, "test": rows}) if splits else rows).save_to_disk(str(path))

    return write


def sheet(rows: Sequence[Sequence[Any]], *more: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import openpyxl

        book = openpyxl.Workbook()
        for row in rows:
            book.worksheets[0].append(list(row))
        for name in more:
            book.create_sheet(name).append(["other"])
        book.save(path)

    return write


def npz(path: Path) -> None:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((24, 4)), z=np.zeros(24))
    path.write_bytes(buffer.getvalue())


HEADER = ("text", "label")
SHEET = [HEADER, *PAIRS]
ENDINGS: list[FileCase] = [
    *(reads(f"rows{suffix}", table()) for suffix in (".csv", ".CSV", ".Csv")),
    *(reads(f"rows{suffix}", table("\t")) for suffix in (".tsv", ".TSV")),
    *(reads(f"rows{suffix}", lines()) for suffix in (".jsonl", ".ndjson", ".JSONL", ".json")),
    *(reads(f"list{suffix}", json.dumps(ROWS)) for suffix in (".json", ".jsonl", ".JSON")),
    reads("indented.json", json.dumps(ROWS, indent=2)),
    reads("wrapped.json", json.dumps({"version": 2, "data": ROWS})),
    reads("rows.csv.gz", gzip.compress(table().encode())),
    reads("rows.jsonl.gz", gzip.compress(lines().encode())),
    reads("rows.tsv.bz2", bz2.compress(table("\t").encode())),
    reads("rows.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    reads("rows.parquet", parquet()),
    reads("rows.xlsx", sheet(SHEET)),
    reads("rows.XLSX", sheet(SHEET)),
    reads("sheets.xlsx", sheet(SHEET, "notes"), note="only the first sheet"),
    reads("saved", saved()),
    reads("saved-splits:train", saved(splits=True)),
    reads("saved-classes", saved(class_label=True)),
    refuses("saved-unlabelled", saved(unlabelled=True), "in rows 1, 2"),
    reads("saved-splits", saved(splits=True)),
    refuses("saved-splits:dev", saved(splits=True), "has no split 'dev', only train, test"),
    refuses("rows.txt", table(), "which selects no reader"),
    refuses("rows", table(), "which selects no reader"),
    refuses("rows.doc", table(), "which selects no reader"),
    refuses("rows.csv.zip", table(), "which selects no reader"),
    refuses("arrays.npz", npz, "arrays x and y"),
    refuses("cut.csv.gz", gzip.compress(table().encode())[:60], "cannot read"),
    refuses("not.gz.csv.gz", table(), "cannot read"),
    refuses("cut.parquet", b"PAR1 and no more", "cannot read"),
    refuses("cut.xlsx", b"PK and no more", "cannot read"),
    refuses("empty.csv", "", "contains no rows"),
    refuses("empty.jsonl", "\n\n", "contains no rows"),
    refuses("empty.json", "[]", "contains no rows"),
    refuses("header.csv", "text,label\n", "contains no rows"),
    refuses("empty.xlsx", sheet([]), "contains no rows"),
]
ENCODINGS: list[FileCase] = [
    reads("bom.csv", b"\xef\xbb\xbf" + table().encode()),
    reads("bom.jsonl", b"\xef\xbb\xbf" + lines().encode()),
    reads("utf16.csv", table().encode("utf-16")),
    reads("utf16.jsonl", lines().encode("utf-16")),
    reads("utf32.csv", table().encode("utf-32")),
    reads("crlf.csv", table().replace("\n", "\r\n")),
    reads("cr.csv", table().replace("\n", "\r")),
    reads("crlf.jsonl", lines().replace("\n", "\r\n")),
    reads("blank-lines.csv", table().replace("\n", "\n\n")),
    reads("latin.csv", foreign(FRENCH, "latin-1"), note="was read as cp1252"),
    reads("cp1251.csv", foreign(RUSSIAN, "cp1251"), note="was read as cp1251"),
    refuses("sjis.csv", foreign(JAPANESE, "shift_jis"), "it may be 'shift_jis'"),
    reads("told.csv", foreign(RUSSIAN, "koi8_r"), encoding="koi8_r"),
    reads("utf8.csv", foreign(RUSSIAN, "utf-8")),
    refuses("wrong.csv", foreign(RUSSIAN, "cp1251"), "data.encoding", encoding="utf-8"),
    refuses("unknown.csv", table(), "data.encoding: Python knows no encoding", encoding="latin-99"),
    refuses("damaged.csv", foreign(RUSSIAN, "utf-8")[:-9] + b"\xff\xfe\n", "is not valid utf-8"),
]
DELIMITED: list[FileCase] = [
    reads("semicolon.csv", table(";"), note="with a semicolon between columns"),
    reads("tab.csv", table("\t"), note="with a tab between columns"),
    reads("bar.csv", table("|"), note="with a vertical bar between columns"),
    reads("comma.tsv", table(), note="with a comma between columns"),
    reads("told-semicolon.csv", table(";"), delimiter=";"),
    reads("told-bar.csv", table("|"), delimiter="|"),
    reads("told-caret.csv", table("^"), delimiter="^"),
    reads("excel.csv", "sep=;\n" + table(";")),
    refuses("wrong-delimiter.csv", table(), "data.delimiter", delimiter=";"),
    refuses("wrong-delimiter.tsv", table("\t"), "data.delimiter", delimiter=","),
    refuses("no-delimiter.csv", table("^"), "data.text"),
    reads("quoted.csv", table(rows=[(f'"{t}, {t}"', label) for t, label in PAIRS])),
    reads("all-quoted.csv", table(rows=[(f'"{t}"', f'"{label}"') for t, label in PAIRS], header='"text","label"')),
    reads("doubled.csv", changed(3, '"she said ""go"" and went",yes')),
    reads("newline.csv", changed(3, '"one\ntwo",yes')),
    reads("stray.tsv", table("\t").replace("green hill 2", '"green hill 2'), note="quotation marks that enclose no"),
    refuses("open.csv", changed(3, '"green, hill, yes'), "is not closed"),
    refuses("ragged.csv", changed(3, "green, hill,yes"), "fields in row 3"),
    refuses("many-ragged.csv", changed(3, "a, b,yes").replace("deep sea 3,", "deep, sea 3,"), "fields in rows 3, 4"),
    reads("trailing.csv", table().replace("yes\n", "yes,,\n")),
    refuses("short.csv", changed(3, "green hill"), "in row 3"),
    reads("huge.csv", changed(3, "word " * 60_000 + ",yes")),
    reads("padded.csv", table(header=" text , label ")),
    reads("more-columns.csv", table(rows=[("1", t, label, "") for t, label in PAIRS], header="id,text,label,note")),
    refuses(
        "twice.csv", table(rows=[(t, t, label) for t, label in PAIRS], header="text,text,label"), "are named 'text'"
    ),
    refuses("no-header.csv", table().partition("\n")[2], "data.text"),
    refuses("other-columns.csv", table(header="body,class"), "data.text"),
    reads("named.csv", table(header="body,class"), text="body", label="class"),
    refuses("typo.csv", table(header="body,class"), "data.label", text="body", label="clas"),
    reads(
        "spaces.csv",
        table(rows=[(t, f"{label} " if i % 3 else label) for i, (t, label) in enumerate(PAIRS)]),
        note="White space was removed from the labels",
    ),
]
LABELS: list[FileCase] = [
    refuses("blank.csv", table(rows=[(t, "" if i == 2 else label) for i, (t, label) in enumerate(PAIRS)]), "in row 3"),
    refuses(
        "space.csv", table(rows=[(t, "  " if i == 2 else label) for i, (t, label) in enumerate(PAIRS)]), "in row 3"
    ),
    refuses("null.jsonl", lines(replaced([3], label=None)), "in row 3"),
    refuses("list.jsonl", lines(replaced([3, 5], label=["yes", "no"])), "rows 3, 5"),
    refuses("object.jsonl", lines(replaced([3], label={"a": 1})), "in row 3"),
    refuses("one-class.csv", table(rows=[(t, "yes") for t, _ in PAIRS]), "at least two classes"),
    reads("ints.jsonl", lines({**row, "label": i % 12} for i, row in enumerate(ROWS)), 24, *map(str, range(12))),
    reads("bools.jsonl", lines({**row, "label": i % 2 == 0} for i, row in enumerate(ROWS)), 24, "False", "True"),
    reads("labels-left-out.jsonl", lines(replaced([1, 2], label="perhaps")), 22, labels=["no", "yes"]),
    reads("blank-text.jsonl", lines(replaced([3], text=" "))),
    refuses("no-text.jsonl", lines(replaced([3], text=None)), "data.text"),
    refuses("number-text.jsonl", lines(replaced([3], text=7)), "data.text"),
    refuses("missing-key.jsonl", lines([*ROWS[:4], {"text": "a"}, *ROWS[5:]]), "in row 5"),
    refuses("torn.jsonl", lines()[:-9], "line 24"),
    refuses("scalar.jsonl", lines([*ROWS[:4], 7]), "line 5"),
    refuses("torn.json", json.dumps(ROWS)[:-9], "a JSON list of objects"),
    refuses("scalars.json", json.dumps([1, 2]), "row 1"),
    refuses("nan.jsonl", lines(replaced([3], label=float("nan"))), "in row 3"),
    reads("pairs.jsonl", lines({**row, "other": "x"} for row in ROWS), text_pair="other"),
    refuses("no-pair.jsonl", lines(), "data.text_pair", text_pair="other"),
    reads(
        "many.jsonl",
        lines({**row, "label": ["a", "b"][: i % 3]} for i, row in enumerate(ROWS)),
        24,
        "a",
        "b",
        task="multilabel",
    ),
    reads(
        "numbers.jsonl",
        lines({**row, "a": i % 2, "b": 1 - i % 2} for i, row in enumerate(ROWS)),
        24,
        "a",
        "b",
        task="multilabel",
        label_columns=["a", "b"],
    ),
    refuses(
        "two.jsonl",
        lines({**row, "a": 2, "b": 1} for row in ROWS),
        "data.label_columns",
        task="multilabel",
        label_columns=["a", "b"],
    ),
]
