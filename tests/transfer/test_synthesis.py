"""Texts are generated until enough are accepted: the limit on calls, and continuing after an interruption."""

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


class UnusedModel:
    """A model that the stand-in generator does not use."""

    backbone = nn.Module()


def models(accept: Any) -> SynthesisModels:
    return SynthesisModels(lambda: nullcontext(UnusedModel()), accept)  # type: ignore[arg-type, return-value]


def by_first_word(texts: list[str]) -> list[bool]:
    return [text.startswith("s") for text in texts]


def test_it_returns_as_many_accepted_texts_as_requested(tmp_path: Path, generator_calls: list[int]) -> None:
    reports: list[SynthesisProgress] = []
    texts = synthesise(PREPARED, TransferSettings(), 3, models(by_first_word), tmp_path, reports.append)
    assert len(texts) == len(set(texts)) == 20
    assert all(text.startswith("s") for text in texts)
    assert reports[-1].accepted >= 20
    assert reports[-1].requested == 20
    assert 0.02 < reports[-1].acceptance < 0.3  # one word in eight


def test_after_max_calls_it_returns_what_was_accepted_or_fails(tmp_path: Path, generator_calls: list[int]) -> None:
    settings = TransferSettings(generator=TransferGeneratorSettings(max_calls=4, batch_size=8))
    texts = synthesise(PREPARED, settings, 3, models(by_first_word), tmp_path / "a")
    assert 0 < len(texts) < 20
    assert generator_calls == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"accepted none of 32 texts from 4 calls of the generator"):
        synthesise(PREPARED, settings, 3, models(lambda texts: [False] * len(texts)), tmp_path / "b")


@pytest.mark.parametrize("after", [1, 3, 7])
def test_after_an_interruption_it_continues_to_the_same_texts(
    tmp_path: Path, generator_calls: list[int], after: int
) -> None:
    whole = synthesise(PREPARED, TransferSettings(), 3, models(by_first_word), tmp_path / "whole")
    calls = len(generator_calls)

    def cut(progress: SynthesisProgress) -> None:
        if progress.calls >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(PREPARED, TransferSettings(), 3, models(by_first_word), tmp_path / "cut", cut)
    del generator_calls[:]
    assert synthesise(PREPARED, TransferSettings(), 3, models(by_first_word), tmp_path / "cut") == whole
    assert generator_calls[0] >= after
    assert len(generator_calls) <= 2 * calls
