"""Wrong paths and columns are named before torch is imported, in the words of the full check."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colora.client.data import early_check
from colora.client.data.early_check import check_sources
from colora.client.data.selection import load_site_rows
from colora.common.config.schema import DataSettings
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import ConfigError, DataError
from tests.conftest import labelled_rows, write_lines

WRONG: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": (labelled_rows(["a", "b"], 8), {"text": "body"}),
    "label": (labelled_rows(["a", "b"], 8), {"label": "topic"}),
    "pair": (labelled_rows(["a", "b"], 8), {"text_pair": "second"}),
    "flags": (labelled_rows(["a", "b"], 8), {"task": "multilabel", "label_columns": ["a"]}),
    "prompt": (labelled_rows(["a", "b"], 8), {"task": "generation"}),
    "template": (labelled_rows(["a", "b"], 8), {"text": "{title} {text}"}),
    "one row": (labelled_rows(["a"], 1), {"text": "body"}),
    "empty": ([], {}),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("key", ["source", "test_source"])
def test_the_early_check_raises_what_the_full_check_raises(case: tuple, key: str, tmp_path: Path) -> None:
    rows, settings = case
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    path = write_lines(tmp_path / "a.jsonl", rows)
    columns = {"body": "x", "topic": "a", "second": "y", "a": 1, "prompt": "p", "completion": "c", "title": "t"}
    good = write_lines(tmp_path / "b.jsonl", [{**row, **columns} for row in labelled_rows(["a", "b"], 8)])
    data = DataSettings(**{"source": str(good), key: str(path), **settings})
    errors = []
    for check in (check_sources, lambda data, site: load_site_rows(SiteSettings(site, data), 0)):
        with pytest.raises(DataError) as error:
            check(data, "ada")
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert key == "source" or str(path) in errors[0]


def test_what_costs_time_is_left_to_the_full_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"label": "a"}, {"text": "x", "label": "a"}])
    check_sources(DataSettings(str(path)), "ada")
    monkeypatch.setattr(early_check, "SMALL", 4)
    check_sources(DataSettings(str(path), text="body"), "ada")
    for elsewhere in ("asset:chatterbot/nothing", "owner/name", "name:split"):
        check_sources(DataSettings(elsewhere), "ada")
    with pytest.raises(DataError, match=r"data\.test_source: the file nowhere/a\.csv does not exist"):
        check_sources(DataSettings("owner/name", "nowhere/a.csv"), "ada")


def test_the_command_names_a_wrong_column_without_torch(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", labelled_rows(["a", "b"], 8))
    recipe = {"name": '"x"', "rounds": "1", "model": '{source = "m"}'}
    sites = f'[[site]]\nname = "ada"\nsource = {json.dumps(str(path))}\ntext = "body"\n'
    (tmp_path / "r.toml").write_text("".join(f"{k} = {v}\n" for k, v in recipe.items()) + sites)
    code = (
        "import sys\nfrom colora.cli import main\n"
        f"sys.argv = ['colora', 'simulate', {str(tmp_path / 'r.toml')!r}]\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules, 'datasets' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "site ada: data.text: expected a column 'body', found only text, label in every row" in done.stderr
    assert done.stdout.split()[-3:] == ["2", "False", "False"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reviews", "the file reviews does not exist. Did you mean 'reviews.csv'?"),
        ("reveiws.csv", "the file reveiws.csv does not exist. Did you mean 'reviews.csv'?"),
        ("asset:chaterbot", "there is no data asset 'chaterbot'. Did you mean 'chatterbot'?"),
    ],
)
def test_a_misspelt_source_is_named_without_asking_the_hub(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\nfine,good\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, ConfigError), match=re.escape(message)):
        check_sources(DataSettings(source), "ada")


@pytest.mark.parametrize(
    ("row", "settings", "hint"),
    [
        ({"instruction": "Say hello.", "output": "hello"}, {}, 'Instruction data needs data.task = "generation".'),
        ({"Text": "fine", "label": "good"}, {}, "Did you mean 'Text'?"),
        ({"text": "fine", "topic": "good"}, {"label": "topics"}, "Did you mean 'topic'?"),
    ],
)
def test_a_missing_column_is_named_with_the_likely_remedy(row: dict, settings: dict, hint: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row] * 4)
    with pytest.raises(DataError, match=re.escape(hint)):
        check_sources(DataSettings(str(path), **settings), "ada")
