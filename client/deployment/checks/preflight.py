"""``colora client SITE --check``: everything a site needs, looked at one by one; a page of plain findings.

No finding depends on another's success further than it must, and none shows what a row says: counts, lengths, names of
columns and of labels only.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ....common.config.loader import load_site
from ....common.config.schema import EvaluationSettings, ModelSettings, Plan
from ....common.config.site_schema import SiteSettings
from ....common.dataset import TASKS, SiteDataset, labels_of
from ....common.errors import ColoraError, DataError
from ...data.readers import read_rows
from ...data.selection import load_site_rows
from .credentials import check_ca, check_coordinator, check_key, check_link
from .result import CheckFailed, CheckResult, print_checks, size
from .system import check_device, check_socket, check_state, check_threads, memory_left

if TYPE_CHECKING:
    from ....common.models.base_model import BaseModel


__all__ = ["preflight", "print_checks"]

UNIX = "unix:"
MOST_LABELS, LONGEST_LABEL, MOST_COLUMNS, LONGEST_COLUMN = 20, 40, 20, 30
ENDLESS = 1 << 30  # tokens
Check = tuple[str, Callable[[], str]]
Component = Literal["trainer", "node"]
PARTS: tuple[Component, ...] = ("trainer", "node")
NO_MODEL = "not checked: no model named (--model SOURCE, or one entry in allow.models)"
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}  # of a weight
INSECURE = "none needed: coordinator.insecure = true"


def preflight(path: Path, model: str | None = None, only: Component | None = None) -> list[CheckResult]:
    """All findings about a site file; ``only`` those that one of the site's two processes needs.

    ``model`` is the base model to look at; without it the only entry of ``allow.models``, if there is one.
    """
    try:
        site = load_site(path)
    except ColoraError as error:
        return [CheckResult("site file", False, str(error))]
    checks: list[Check] = [("site file", lambda: f"site {site.name}, {path}")]
    if only != "node":
        checks += TrainerSide(site, model).checks()
    if site.trainer.listen.startswith(UNIX):
        checks += [("socket", lambda: check_socket(Path(site.trainer.listen.removeprefix(UNIX))))]
    else:
        parts = PARTS if only is None else (only,)
        checks += [("link", lambda: check_link(Path(site.trainer.link), parts))]
    if only != "trainer":
        checks += _way_out(site)
    return [_finding(name, check) for name, check in checks]


class TrainerSide:
    """What the process with the data and the model needs. The checks run in their order and keep what they found."""

    def __init__(self, site: SiteSettings, model: str | None) -> None:
        models = site.allow.models or ()
        self.site = site
        self.source = model or (models[0] if len(models) == 1 else None)
        self.rows: SiteDataset | None = None
        self.base: BaseModel | None = None
        self.device = "cpu"
        self.missing = 0  # bytes of memory that the model would lack

    def checks(self) -> list[Check]:
        """Names and checks."""
        trainer = self.site.trainer
        return [
            ("data", self.data),
            ("labels", self.labels),
            ("device", self.find_device),
            ("threads", lambda: check_threads(trainer.threads)),
            ("memory", self.memory),
            ("model", self.model),
            ("tokens", self.tokens),
            ("state", lambda: check_state(Path(trainer.state))),
        ]

    def data(self) -> str:
        """Rows and columns."""
        source = self.site.data.source
        if not source:
            raise CheckFailed("data.source is empty: the site file must say where the rows are")
        try:
            self.rows = load_site_rows(self.site, seed=0)
        except DataError as error:
            raise CheckFailed(self._without_values(error)) from None
        columns = _few(self._columns(source))
        return f"{len(self.rows.train)} rows to train on, {len(self.rows.test)} to test on; columns {columns}"

    def labels(self) -> str:
        """How many rows every label has."""
        if not TASKS[self.site.data.task].has_labels:
            return f"none: the task is {self.site.data.task}"
        if self.rows is None:
            return "not checked: there are no rows to look at"
        train, test = (
            Counter(label for row in rows for label in labels_of(row)) for rows in (self.rows.train, self.rows.test)
        )
        names = self.rows.labels
        if len(names) > MOST_LABELS or any(len(name) > LONGEST_LABEL for name in names):
            counts = [train[name] for name in names]
            return f"{len(names)}, with {min(counts)} to {max(counts)} rows to train on (too many or long to show)"
        return ", ".join(f"{name} {train[name]}+{test[name]}" for name in names) + " (train+test)"

    def find_device(self) -> str:
        """Whether torch has it; where it does not, the model is loaded on the CPU."""
        self.device, told = check_device(self.site.trainer.device)
        return told

    def memory(self) -> str:
        """Whether the model would fit, found without loading it."""
        free, total = memory_left()
        there = f"{size(free)} of {size(total)} free"
        needed = self._size_of_model()
        if needed is None:
            return there
        self.missing = max(0, needed - free)
        if self.missing:
            raise CheckFailed(f"{there}, and the model's weights alone take {size(needed)}")
        return f"{there}; the model's weights take {size(needed)}"

    def model(self) -> str:
        """Whether it loads, how long that takes and what it takes up."""
        if self.source is None:
            return NO_MODEL
        if self.missing:
            raise CheckFailed(f"{self.source} was not loaded: it does not fit into memory")
        from ....common.models.base_model import load_base_model

        began = time.monotonic()
        precision = self.site.trainer.precision or "fp32"
        settings = ModelSettings(self.source, device=self.device, precision=precision)
        self.base = load_base_model(settings, generates=TASKS[self.site.data.task].needs_causal_lm)
        seconds, model = time.monotonic() - began, self.base.language_model or self.base.backbone
        tensors = [*model.parameters(), *model.buffers()]
        parameters, taken = sum(p.numel() for p in model.parameters()), sum(t.nbytes for t in tensors)
        told = f"{parameters:,} parameters, loaded in {seconds:.1f} s, {size(taken)} of memory taken"
        return f"{self.source}: {told} ({self.device})"

    def tokens(self) -> str:
        """How long the texts are in this model's tokens, and how many would be cut."""
        if TASKS[self.site.data.task].input_column is None:
            return f"none: the task is {self.site.data.task}"
        if self.source is None:
            return NO_MODEL
        if self.base is None or self.rows is None:
            return f"not checked: there {'are no rows' if self.rows is None else 'is no model'} to look at"
        from ....common.tasks import build_task

        model = ModelSettings(self.source, max_length=ENDLESS)
        plan = Plan("check", 1, model, evaluation=EvaluationSettings(batch_size=1))
        task = build_task(self.rows, self.base, plan)
        examples = [*task.train.examples, *task.test.examples]
        lengths = sorted(int(batch["attention_mask"].sum()) for batch in task.batches(examples))
        dropped = task.train.dropped + task.test.dropped
        if not lengths:
            raise CheckFailed(f"none of {dropped} rows has anything to learn from: they are all empty")
        limit, whose = self.site.allow.max_tokens, "allow.max_tokens"
        if limit is None:
            limit, whose = ModelSettings("").max_length, "model.max_length of a recipe that does not set it"
        cut = sum(length > limit for length in lengths)
        spread = f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
        told = f"{spread}; {cut} of {len(lengths)} texts would be cut at {limit} ({whose})"
        return told + (f"; {dropped} rows are empty and would be left out" if dropped else "")

    def _columns(self, source: str) -> list[str]:
        return [str(name) for name in next(iter(read_rows(source, self.site.name)))]

    def _without_values(self, error: DataError) -> str:
        """What is wrong with the rows, in the error's words where they quote none."""
        row = re.search(r"row \d+$", error.found)
        where = f" in {row[0]}" if row else ""
        if error.expected.startswith("a column "):
            for source in filter(None, (self.site.data.source, self.site.data.test_source)):
                columns = self._columns(source)
                if error.expected not in {f"a column {name!r}" for name in columns}:
                    return f"{error.field}: expected {error.expected}, found {_few(columns)} in {source}"
            return f"{error.field}: expected {error.expected}, found none{where}"
        if error.field == "data.label":
            expected = error.expected.partition(" (")[0]
            return f"{error.field}: expected {expected}, found something else{where} (values are not shown)"
        return _without_site(error)

    def _size_of_model(self) -> int | None:
        """Bytes of its weights in the precision that the site wants; None where they cannot be told."""
        from ....common.models.base_model import skeleton

        if self.source is None:
            return None
        try:
            each = BYTES[self.site.trainer.precision or "fp32"]
            return round(sum(each * p.numel() for p in skeleton(ModelSettings(self.source)).parameters()))
        except Exception:  # what is wrong with the model is the next finding
            return None


def _way_out(site: SiteSettings) -> list[Check]:
    """The checks of what the SuperNode needs."""
    coordinator = site.coordinator

    def missing() -> str:
        raise CheckFailed("the site file has no table [coordinator] with address, ca and key")

    if coordinator is None:
        return [("coordinator", missing)]
    way: Check = ("coordinator", lambda: check_coordinator(coordinator))
    if coordinator.insecure:
        return [("key", lambda: INSECURE), ("CA", lambda: INSECURE), way]
    return [
        ("key", lambda: check_key(Path(coordinator.key))),
        ("CA", lambda: check_ca(Path(coordinator.ca))),
        way,
    ]


def _finding(name: str, check: Callable[[], str]) -> CheckResult:
    """Whatever a check meets is its own finding, and no other's."""
    try:
        return CheckResult(name, True, check())
    except CheckFailed as error:
        return CheckResult(name, False, str(error))
    except ColoraError as error:
        return CheckResult(name, False, _without_site(error))
    except Exception as error:  # whose text may quote a row
        return CheckResult(name, False, f"an unexpected {type(error).__name__}")


def _without_site(error: ColoraError) -> str:
    return str(error).removeprefix(f"site {error.site}: ")


def _few(names: list[str]) -> str:
    """Names of columns, cut: a file without a header line has a row there."""
    cut = [name if len(name) <= LONGEST_COLUMN else name[:LONGEST_COLUMN] + "…" for name in names]
    return ", ".join(cut[:MOST_COLUMNS]) + (", …" if len(names) > MOST_COLUMNS else "")
