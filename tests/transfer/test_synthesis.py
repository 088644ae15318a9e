"""Written texts until enough are kept: the cap, and going on after an interruption."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from colora.common.config.schema import TransferGeneratorSettings, TransferSettings
from colora.common.errors import DataError
from colora.transfer.preparation import TransferArtifacts
from colora.transfer.synthesis import SynthesisModels, SynthesisProgress, synthesise

PREPARED = TransferArtifacts(("a b", "c d", "e f", "g h", "i j"), "tiny", 20)


class Nothing:
    """A model that the stand-in for the writer never looks at."""

    backbone = nn.Module()


def cast(judge: Any) -> SynthesisModels:
    return SynthesisModels(lambda: nullcontext(Nothing()), judge)  # type: ignore[arg-type, return-value]


def by_first_word(texts: list[str]) -> list[bool]:
    return [text.startswith("s") for text in texts]


def test_it_stops_at_the_number_wanted_with_kept_texts_only(tmp_path: Path, writer: list[int]) -> None:
    told: list[SynthesisProgress] = []
    texts = synthesise(PREPARED, TransferSettings(), 3, cast(by_first_word), tmp_path, told.append)
    assert len(texts) == len(set(texts)) == 20
    assert all(text.startswith("s") for text in texts)
    assert told[-1].kept >= 20
    assert told[-1].wanted == 20
    assert 0.02 < told[-1].acceptance < 0.3  # one word in eight


def test_the_cap_on_calls_ends_it_with_what_there_is_or_says_that_there_is_nothing(
    tmp_path: Path, writer: list[int]
) -> None:
    settings = TransferSettings(generator=TransferGeneratorSettings(max_calls=4, batch_size=8))
    texts = synthesise(PREPARED, settings, 3, cast(by_first_word), tmp_path / "a")
    assert 0 < len(texts) < 20
    assert writer == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"at least one written text .*, found none of 32 after 4 calls"):
        synthesise(PREPARED, settings, 3, cast(lambda texts: [False] * len(texts)), tmp_path / "b")


@pytest.mark.parametrize("after", [1, 3, 7])
def test_it_goes_on_where_it_was_cut_off_and_ends_with_the_same_texts(
    tmp_path: Path, writer: list[int], after: int
) -> None:
    whole = synthesise(PREPARED, TransferSettings(), 3, cast(by_first_word), tmp_path / "whole")
    calls = len(writer)

    def cut(progress: SynthesisProgress) -> None:
        if progress.calls >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(PREPARED, TransferSettings(), 3, cast(by_first_word), tmp_path / "cut", cut)
    del writer[:]
    assert synthesise(PREPARED, TransferSettings(), 3, cast(by_first_word), tmp_path / "cut") == whole
    assert writer[0] >= after
    assert len(writer) <= 2 * calls
