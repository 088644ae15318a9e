"""At least 110 data files: each is read whole, or refused with one sentence that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from colora.client.data.selection import load_site_rows
from colora.common.config.schema import DataSettings, parse
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import ColoraError
from tests.client.data.file_table import DELIMITED, ENCODINGS, ENDINGS, LABELS, FileCase
from tests.client.data.instruction_table import INSTRUCTIONS
from tests.tables import show_table

GROUPS = {
    "endings": ENDINGS,
    "encodings": ENCODINGS,
    "delimiters": DELIMITED,
    "labels": LABELS,
    "instructions": INSTRUCTIONS,
}


def verdict(case: FileCase, folder: Path) -> str:
    """What comes of a file: the rows, labels and notes, or the error without the path."""
    path = folder / case.name.partition(":")[0]
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    data = parse(DataSettings, {"source": str(folder / case.name), **case.data})
    try:
        rows = load_site_rows(SiteSettings("ada", data), seed=0)
    except ColoraError as error:
        return f"refused: {error}".replace(f"{folder}/", "")
    labels = f" with {len(rows.labels)} labels ({', '.join(rows.labels)})" if rows.labels else ""
    told = "".join(f"; told: {note}" for note in rows.notes).replace(f"{folder}/", "")
    return f"{len(rows.train) + len(rows.test)} rows{labels}{told}"


def expected(case: FileCase, found: str) -> bool:
    """Whether a verdict is the case's: nothing is told where nothing was decided or left out."""
    if case.error:
        return found.startswith("refused: site ada: ") and case.error in found and "\n" not in found
    labels = f" with {len(case.labels)} labels ({', '.join(case.labels)})" if case.labels else ""
    read, told, note = found.partition("; told: ")
    return read == f"{case.rows} rows{labels}" and bool(told) is bool(case.note) and case.note in note


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_file_is_read_whole_or_refused_in_one_sentence(group: str, tmp_path: Path) -> None:
    found: dict[str, str] = {}
    for number, case in enumerate(GROUPS[group]):
        folder = tmp_path / str(number)
        folder.mkdir()
        found[case.name] = verdict(case, folder)
    assert len(found) == len(GROUPS[group]), "a name twice"
    show_table(f"files-{group}", ("file", "verdict"), found.items())
    assert [(case.name, found[case.name]) for case in GROUPS[group] if not expected(case, found[case.name])] == []


def test_the_table_has_at_least_110_files() -> None:
    assert sum(map(len, GROUPS.values())) >= 110
