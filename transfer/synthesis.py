"""Synthetic inputs that pass the filter, with progress on disk from which an interrupted transfer continues.

The generator and the discriminator's model need not be in memory at the same time. Texts are generated in rounds; each
round is filtered as a whole, until enough texts are accepted or the generator's calls are used up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.atomic_io import write_atomically
from ..common.config.schema import TransferSettings
from ..common.errors import DataError
from ..common.json_files import read_json
from ..common.models.base_model import BaseModel
from .preparation import TransferArtifacts
from .sampling import Deduplicator, generate_texts

OVERSAMPLING = 1.3  # texts generated per missing text, at the acceptance rate so far

Filter = Callable[[list[str]], list[bool]]
ModelContext = Callable[[], AbstractContextManager[BaseModel]]  # holds the generator in memory for its block


@dataclass(frozen=True)
class SynthesisProgress:
    """Counts of a transfer: generator calls, and texts generated, accepted, requested and not yet filtered."""

    calls: int
    generated: int
    accepted: int
    requested: int
    pending: int = 0

    @property
    def acceptance(self) -> float:
        """Accepted ÷ generated; 0 before the first text."""
        return self.accepted / self.generated if self.generated else 0.0


AGAIN = "Delete it, and repeat the command: the texts are generated again."
ProgressCallback = Callable[[SynthesisProgress], None]


class SampleLog:
    """``written.json``: each generated text with the filter's verdict (None: pending), and the number of calls.

    Raises DamagedError for a file that holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.calls = path, 0
        self.verdicts: dict[str, bool | None] = {}
        if path.exists():
            saved = read_json(path, _is_log, "a count of calls and a verdict for each text", AGAIN)
            self.calls, self.verdicts = saved["calls"], saved["verdicts"]

    def save(self) -> None:
        """Replace the file atomically."""
        text = json.dumps({"calls": self.calls, "verdicts": self.verdicts}, ensure_ascii=False)
        write_atomically(self.path, text.encode())

    def with_verdict(self, verdict: bool | None) -> list[str]:
        """Return the texts with this verdict, in the order of generation."""
        return [text for text, given in self.verdicts.items() if given is verdict]

    def progress(self, requested: int) -> SynthesisProgress:
        """Return the counts so far."""
        accepted, pending = (len(self.with_verdict(verdict)) for verdict in (True, None))
        return SynthesisProgress(self.calls, len(self.verdicts), accepted, requested, pending)


def _is_log(saved: Any) -> bool:
    if not isinstance(saved, dict) or saved.keys() != {"calls", "verdicts"} or not isinstance(saved["verdicts"], dict):
        return False
    verdicts = saved["verdicts"].values()
    return type(saved["calls"]) is int and saved["calls"] >= 0 and all(v is None or type(v) is bool for v in verdicts)


@dataclass(frozen=True)
class SynthesisModels:
    """The generator, and the filter that judges a list of texts; without a filter every new text is accepted."""

    generator: ModelContext
    filter: Filter | None


def synthesise(
    artifacts: TransferArtifacts,
    settings: TransferSettings,
    seed: int,
    models: SynthesisModels,
    folder: Path,
    on_progress: ProgressCallback | None = None,
) -> list[str]:
    """Return as many accepted texts as requested, or all that ``transfer.generator.max_calls`` calls gave.

    ``settings.samples`` texts are requested, by default as many as the site trained on. Raises DataError where no text
    is accepted.
    """
    log, requested = SampleLog(folder / "written.json"), settings.samples or artifacts.examples
    report = on_progress or (lambda progress: None)
    while True:
        _filter(log, models.filter)
        progress = log.progress(requested)
        report(progress)
        if progress.accepted >= requested or log.calls >= settings.generator.max_calls:
            break
        goal = _next_goal(progress, filtered=models.filter is not None)
        with models.generator() as base:
            for _ in _generate(base, artifacts, settings, seed, log, goal):
                report(log.progress(requested))
    accepted = log.with_verdict(True)
    if not accepted:
        raise _nothing_accepted(log)
    return accepted[:requested]


def _next_goal(progress: SynthesisProgress, *, filtered: bool) -> int:
    """The total number of generated texts to reach before the filter runs again."""
    missing = progress.requested - progress.accepted
    acceptance = (progress.accepted + 1) / (progress.generated + 2)
    needed = OVERSAMPLING * missing / acceptance if filtered else missing
    most = progress.generated + 2 * progress.requested  # a first estimate of the acceptance may be far off
    return progress.generated + 1 + int(min(needed, most))


def _generate(
    base: BaseModel, artifacts: TransferArtifacts, settings: TransferSettings, seed: int, log: SampleLog, goal: int
) -> Iterator[None]:
    """Call the generator until the log has ``goal`` texts; each call is on disk before the next begins."""
    is_new = Deduplicator([*artifacts.seeds, *log.verdicts])
    while len(log.verdicts) < goal and log.calls < settings.generator.max_calls:
        for text in generate_texts(base, artifacts.seeds, settings.generator, seed, log.calls):
            if is_new(text):
                log.verdicts[text] = None
        log.calls += 1
        log.save()
        yield


def _filter(log: SampleLog, judge: Filter | None) -> None:
    pending = log.with_verdict(None)
    if pending:
        verdicts = judge(pending) if judge else [True] * len(pending)
        log.verdicts |= dict(zip(pending, verdicts, strict=True))
        log.save()


def _nothing_accepted(log: SampleLog) -> DataError:
    count, calls = len(log.verdicts), log.calls
    message = f"The generator produced no new text in {calls} calls."
    if count:
        message = f"The discriminator accepted none of {count} texts from {calls} calls of the generator."
    return DataError(
        "transfer",
        "at least one accepted text",
        f"none of {count} after {calls} calls of the generator",
        message=message,
        hint="In a new --out, raise transfer.generator.max_calls, lower transfer.generator.temperature, or set "
        'transfer.filter = "none".',
    )
