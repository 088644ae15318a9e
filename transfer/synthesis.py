"""Synthetic inputs that pass the filter, in files that a killed transfer goes on from.

The writer's model and the discriminator's need not be in memory at once: texts are written in rounds, each judged when
it is whole, until enough are kept or the writer's calls are used up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ..common.atomic_io import write_atomically
from ..common.config.schema import TransferSettings
from ..common.errors import DataError
from ..common.models.base_model import BaseModel
from .preparation import TransferArtifacts
from .sampling import Deduplicator, generate_texts

OVER = 1.3  # texts written for each that is still wanted, at the acceptance seen so far

Filter = Callable[[list[str]], list[bool]]
Model = Callable[[], AbstractContextManager[BaseModel]]  # in memory while it is needed, and as it writes


@dataclass(frozen=True)
class SynthesisProgress:
    """How far a transfer is: writer's calls, texts written, kept of those wanted, and waiting to be judged."""

    calls: int
    written: int
    kept: int
    wanted: int
    waiting: int = 0

    @property
    def acceptance(self) -> float:
        """Kept ÷ written; 0 before anything was written."""
        return self.kept / self.written if self.written else 0.0


ProgressCallback = Callable[[SynthesisProgress], None]


class SampleLog:
    """``written.json``: every text with its verdict (None: not judged yet), and the writer's calls so far."""

    def __init__(self, path: Path) -> None:
        self.path, self.calls = path, 0
        self.verdicts: dict[str, bool | None] = {}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.calls, self.verdicts = found["calls"], found["verdicts"]

    def save(self) -> None:
        """Whole or not at all."""
        text = json.dumps({"calls": self.calls, "verdicts": self.verdicts}, ensure_ascii=False)
        write_atomically(self.path, text.encode())

    def with_verdict(self, verdict: bool | None) -> list[str]:
        """The texts so judged, in the order they were written."""
        return [text for text, found in self.verdicts.items() if found is verdict]


@dataclass(frozen=True)
class SynthesisModels:
    """Who writes, and who judges a list of texts; without a judge every new text is kept."""

    generator: Model
    filter: Filter | None


def synthesise(
    prepared: TransferArtifacts,
    settings: TransferSettings,
    seed: int,
    cast: SynthesisModels,
    folder: Path,
    watch: ProgressCallback | None = None,
) -> list[str]:
    """As many kept texts as wanted, or all that came of ``settings.generator.max_calls`` calls. Raises DataError for none at all."""
    book, wanted = SampleLog(folder / "written.json"), settings.samples or prepared.examples
    tell = watch or (lambda progress: None)
    while True:
        _judge(book, cast.filter)
        kept = book.with_verdict(True)
        tell(SynthesisProgress(book.calls, len(book.verdicts), len(kept), wanted))
        if len(kept) >= wanted or book.calls >= settings.generator.max_calls:
            break
        acceptance = (len(kept) + 1) / (len(book.verdicts) + 2)
        more = OVER * (wanted - len(kept)) / acceptance if cast.filter else wanted - len(kept)
        aim = len(book.verdicts) + 1 + int(min(more, len(book.verdicts) + 2 * wanted))  # a first guess may be far off
        with cast.generator() as base:
            for _ in _write(base, prepared, settings, seed, book, aim):
                tell(SynthesisProgress(book.calls, len(book.verdicts), len(kept), wanted, len(book.with_verdict(None))))
    if not kept:
        found = f"none of {len(book.verdicts)} after {book.calls} calls of the writer"
        wanted_of = "that the discriminator takes for real" if book.verdicts else "that is new and whole"
        mends = "more transfer.generator.max_calls, a lower transfer.generator.temperature, or transfer.filter = none, begun anew"
        raise DataError("transfer", f"at least one written text {wanted_of} ({mends})", found)
    return kept[:wanted]


def _write(
    base: BaseModel, prepared: TransferArtifacts, settings: TransferSettings, seed: int, book: SampleLog, aim: int
) -> Iterator[None]:
    """Calls the writer until there are ``aim`` texts; every call is on disk before the next."""
    new = Deduplicator([*prepared.seeds, *book.verdicts])
    while len(book.verdicts) < aim and book.calls < settings.generator.max_calls:
        for text in generate_texts(base, prepared.seeds, settings.generator, seed, book.calls):
            if new(text):
                book.verdicts[text] = None
        book.calls += 1
        book.save()
        yield


def _judge(book: SampleLog, judge: Filter | None) -> None:
    waiting = book.with_verdict(None)
    if waiting:
        verdicts = judge(waiting) if judge else [True] * len(waiting)
        book.verdicts |= dict(zip(waiting, verdicts, strict=True))
        book.save()
