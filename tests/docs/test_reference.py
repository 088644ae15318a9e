"""The reference pages of recipe keys and site file keys are what the generator writes, and miss no key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def reference(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("recipe_reference")


def test_the_pages_are_up_to_date(reference: ModuleType) -> None:
    assert reference.outdated() == [], "run python docs/scripts/recipe_reference.py"
    assert reference.main(["--check"]) == 0


def test_check_fails_on_an_edited_page(
    reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    (tmp_path / "docs" / "reference").mkdir(parents=True)
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    page = tmp_path / "docs" / "reference" / "recipe.md"
    page.write_text(page.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    assert reference.main(["--check"]) == 1
    assert "docs/reference/recipe.md is outdated" in capsys.readouterr().err


def test_every_key_has_a_row_and_a_description(reference: ModuleType) -> None:
    for page in reference.PAGES:
        text = reference.page_text(page)
        for section in reference.sections(page.root):
            assert f"## {section.heading}\n" in text
            docs = reference.attribute_docstrings(section.settings)
            names = {field.name for field in dataclasses.fields(section.settings)}
            assert all(f"| `{name}` |" in text for name in names)
            assert section.path.startswith("transfer") or names == set(docs), section.heading
