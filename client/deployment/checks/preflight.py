"""``colora client SITE.toml --check``: checks everything a site needs before it takes part.

A failed check prevents no other check unless that one needs its result. No result shows the content of a row: only
counts, lengths, column names and short label names are printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ....common.config.loader import load_site
from ....common.config.schema import EvaluationSettings, ModelSettings, Plan
from ....common.config.site_schema import SiteSettings
from ....common.dataset import TASKS, SiteDataset
from ....common.errors import ColoraError, DataError
from ...data.early_check import check_sources
from ...data.label_counts import describe_labels
from ...data.readers import read_rows
from ...data.selection import load_site_rows
from ...data.unknown_tokens import NOTED_UNKNOWN, unknown_share
from .credentials import check_ca, check_coordinator, check_key, check_link
from .plans import check_plans
from .recipe import accepted_plan, check_recipe, model_at
from .result import CheckFailed, CheckResult, print_checks, size
from .system import check_device, check_socket, check_state, check_threads, memory_left

if TYPE_CHECKING:
    from ....common.models.base_model import BaseModel


__all__ = ["preflight", "print_checks"]

UNIX = "unix:"
MAX_COLUMNS, MAX_COLUMN_LENGTH = 20, 30  # more columns are left out, longer names are cut
UNLIMITED = 1 << 30  # tokens
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}  # per weight
NO_MODEL = "not checked: the model is unknown (give --model SOURCE, or exactly one entry in allow.models)"
INSECURE = "not needed: coordinator.insecure is true"
Check = tuple[str, Callable[[], str]]  # name, and a function that returns the detail or raises
Component = Literal["trainer", "supernode"]
COMPONENTS: tuple[Component, ...] = ("trainer", "supernode")


def preflight(
    path: Path, model: str | None = None, component: Component | None = None, recipe: Path | None = None
) -> Iterator[CheckResult]:
    """Check a site file and everything it names, and yield each result at once.

    ``component`` limits the checks to what one of the site's two processes needs. ``model`` is the base model to load;
    the default is that of ``recipe``, else the entry of ``allow.models`` if there is exactly one. ``recipe`` is
    compared with ``[allow]``.
    """
    try:
        site = load_site(path)
    except ColoraError as error:
        yield CheckResult("site file", False, str(error))
        return
    checks: list[Check] = [("site file", lambda: f"site {site.name}, {path}")]
    if component != "supernode":
        checks += TrainerChecks(site, model, recipe).checks()
    if site.trainer.listen.startswith(UNIX):
        checks += [("socket", lambda: check_socket(Path(site.trainer.listen.removeprefix(UNIX))))]
    else:
        components = COMPONENTS if component is None else (component,)
        checks += [("link", lambda: check_link(Path(site.trainer.link), components))]
    if component != "trainer":
        checks += _supernode_checks(site)
    yield from (_run(name, check) for name, check in checks)


class TrainerChecks:
    """Checks of what the trainer needs. They run in order, and later ones use the results of earlier ones."""

    def __init__(self, site: SiteSettings, model: str | None, recipe: Path | None = None) -> None:
        self.site, self.recipe = site, recipe
        self.plan: Plan | None = None
        if recipe:
            with contextlib.suppress(ColoraError):  # the last check says why
                self.plan = accepted_plan(recipe, site)
        self.settings = self._model_settings(model)
        self.source = self.settings.source if self.settings else None
        self.rows: SiteDataset | None = None
        self.base: BaseModel | None = None
        self.device = "cpu"
        self.missing = 0  # bytes of memory that the model needs beyond what is free

    def checks(self) -> list[Check]:
        """Return the checks in the order in which they must run."""
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
            ("plans", lambda: check_plans(Path(trainer.state))),
            *([("recipe", self.agreement)] if self.recipe else []),
        ]

    def data(self) -> str:
        """Read the rows. Missing files and columns are found before torch is imported, which takes seconds."""
        source = self.site.data.source
        if not source:
            raise CheckFailed("data.source is empty; it must name a file, an asset or a data set")
        try:
            check_sources(self.site.data, self.site.name)
            self.rows = load_site_rows(self.site, self.plan.seed if self.plan else 0)
        except DataError as error:
            raise CheckFailed(self._without_values(error)) from None
        columns = _abbreviate(self._columns(source))
        found = f"{len(self.rows.train)} training rows, {len(self.rows.test)} test rows; columns {columns}"
        return "; ".join([found, *self.rows.notes])

    def labels(self) -> str:
        """Count the rows of every label."""
        if not TASKS[self.site.data.task].has_labels:
            return f"none: the task is {self.site.data.task}"
        if self.rows is None:
            return "not checked: no rows"
        return f"{describe_labels(self.rows)} (train+test)"

    def find_device(self) -> str:
        """Check the device. The model is loaded on the CPU when the device is not available."""
        self.device, description = check_device(self.site.trainer.device)
        return description

    def memory(self) -> str:
        """Compare the size of the model's weights with the free memory, without loading them."""
        free, total = memory_left()
        available = f"{size(free)} of {size(total)} free"
        needed = self._model_size()
        if needed is None:
            return available
        self.missing = max(0, needed - free)
        if self.missing:
            raise CheckFailed(f"{available}, but the model's weights alone need {size(needed)}")
        return f"{available}; the model's weights need {size(needed)}"

    def model(self) -> str:
        """Load the model; measure time and memory."""
        if self.settings is None:
            return NO_MODEL
        if self.missing:
            raise CheckFailed(f"{self.source} was not loaded: not enough memory")
        from ....common.models.base_model import load_base_model

        began = time.monotonic()
        settings = dataclasses.replace(self.settings, device=self.device)
        self.base = load_base_model(settings, generates=TASKS[self.site.data.task].needs_causal_lm)
        seconds, model = time.monotonic() - began, self.base.language_model or self.base.backbone
        tensors = [*model.parameters(), *model.buffers()]
        parameters, used = sum(p.numel() for p in model.parameters()), sum(t.nbytes for t in tensors)
        detail = f"{parameters:,} parameters, loaded in {seconds:.1f} s, uses {size(used)} of memory"
        return f"{self.source}: {detail} ({self.device})"

    def tokens(self) -> str:
        """Measure the lengths of the texts in tokens, and how many would be truncated."""
        if TASKS[self.site.data.task].input_column is None:
            return f"none: the task is {self.site.data.task}"
        if self.settings is None:
            return NO_MODEL
        if self.base is None or self.rows is None:
            return f"not checked: no {'rows' if self.rows is None else 'model'}"
        from ....common.tasks import build_task

        model = dataclasses.replace(self.settings, max_length=UNLIMITED)
        plan = Plan("check", 1, model, evaluation=EvaluationSettings(batch_size=1))
        task = build_task(self.rows, self.base, plan)
        examples = [*task.train.examples, *task.test.examples]
        lengths = sorted(int(batch["attention_mask"].sum()) for batch in task.batches(examples))
        dropped = task.train.dropped + task.test.dropped
        if not lengths:
            raise CheckFailed(f"all {dropped} rows are empty")
        limit, key = self.site.allow.max_tokens, "allow.max_tokens"
        if self.plan:
            limit, key = self.plan.model.max_length, "the recipe's model.max_length"
        elif limit is None:
            limit, key = ModelSettings("").max_length, "the default of model.max_length"
        if self.base.positions and self.base.positions < limit:
            limit, key = self.base.positions, "the model's positions"
        truncated = sum(length > limit for length in lengths)
        spread = f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
        detail = f"{spread}; {truncated} of {len(lengths)} texts would be truncated to {limit} ({key})"
        unknown = unknown_share(self.rows, self.base.tokenizer)
        detail += f"; {unknown:.0%} of the tokens are unknown to the tokenizer" if unknown > NOTED_UNKNOWN else ""
        return detail + (f"; {dropped} empty rows would be left out" if dropped else "")

    def agreement(self) -> str:
        """Compare the recipe with ``[allow]``, and say what it would spend of the privacy budget."""
        assert self.recipe is not None
        return check_recipe(self.plan or accepted_plan(self.recipe, self.site), self.site, self._examples())

    def _examples(self) -> int | None:
        """Count the training examples that the recipe's model and maximum length leave of the rows, if both are here.

        Empty texts, and answers that do not fit, are no examples. So the number of rows would be too large, and ε and
        the steps of ``train.epochs`` wrong.
        """
        plan = self.plan
        if plan is None or self.rows is None or self.base is None or self.settings != model_at(plan, self.site):
            return None
        from ....common.tasks import build_task

        return len(build_task(self.rows, self.base, plan).train.examples)

    def _model_settings(self, model: str | None) -> ModelSettings | None:
        """Return the base model to check, as this site loads it; None if nothing names exactly one."""
        models, own = self.site.allow.models or (), self.site.trainer
        if self.plan and model in (None, self.plan.model.source):
            return model_at(self.plan, self.site)
        source = model or (models[0] if len(models) == 1 else None)
        if source is None:
            return None
        # The coordinator decides the maximum length.
        return ModelSettings(source, max_length=1, device=own.device, precision=own.precision or "fp32")

    def _columns(self, source: str) -> list[str]:
        return [str(name) for name in next(iter(read_rows(source, self.site.name, self.site.data)))]

    def _without_values(self, error: DataError) -> str:
        """Describe a data error without the values of rows, which its own text may quote."""
        row = re.search(r"(rows? [\d, ]+( and \d+ more)?|every row)$", error.found)
        where = f" in {row[0]}" if row else ""
        if error.expected.startswith("a column "):
            for source in filter(None, (self.site.data.source, self.site.data.test_source)):
                columns = self._columns(source)
                if error.expected not in {f"a column {name!r}" for name in columns}:
                    return f"{error.field}: expected {error.expected}, found {_abbreviate(columns)} in {source}"
            return f"{error.field}: expected {error.expected}, found none{where}"
        if error.field == "data.label" or (error.field == "data.messages" and error.found[0] in "'\""):
            expected = error.expected.partition(" (")[0]
            return f"{error.field}: expected {expected}, found another value{where} (values are not shown)"
        return _without_site(error)

    def _model_size(self) -> int | None:
        """Return the bytes of the model's weights in their precision, or None where that is unknown."""
        from ....common.models.architecture import skeleton

        if self.settings is None:
            return None
        try:
            bytes_per_weight = BYTES[self.settings.precision]
            return round(sum(bytes_per_weight * p.numel() for p in skeleton(self.settings).parameters()))
        except Exception:  # the next check reports what is wrong with the model
            return None


def _supernode_checks(site: SiteSettings) -> list[Check]:
    """Return the checks of what the SuperNode needs."""
    coordinator = site.coordinator

    def no_coordinator() -> str:
        raise CheckFailed("the site file has no table [coordinator] with address, ca and key")

    if coordinator is None:
        return [("coordinator", no_coordinator)]
    connection: Check = ("coordinator", lambda: check_coordinator(coordinator))
    if coordinator.insecure:
        return [("key", lambda: INSECURE), ("CA", lambda: INSECURE), connection]
    return [
        ("key", lambda: check_key(Path(coordinator.key))),
        ("CA", lambda: check_ca(Path(coordinator.ca))),
        connection,
    ]


def _run(name: str, check: Callable[[], str]) -> CheckResult:
    """Run one check. An error of any kind is the result of this check only."""
    try:
        return CheckResult(name, True, check())
    except CheckFailed as failure:
        return CheckResult(name, False, str(failure))
    except ColoraError as error:
        return CheckResult(name, False, _without_site(error))
    except Exception as error:  # its text may quote a row
        return CheckResult(name, False, f"unexpected {type(error).__name__}")


def _without_site(error: ColoraError) -> str:
    return str(error).removeprefix(f"site {error.site}: ")


def _abbreviate(columns: list[str]) -> str:
    """Join column names, cut to a length: the first row of a file without a header is data."""
    names = [name if len(name) <= MAX_COLUMN_LENGTH else name[:MAX_COLUMN_LENGTH] + "…" for name in columns]
    return ", ".join(names[:MAX_COLUMNS]) + (", …" if len(names) > MAX_COLUMNS else "")
