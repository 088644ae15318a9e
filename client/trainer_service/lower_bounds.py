"""Lower bounds of a plan: what keeps one update from showing one text.

The fewer examples and tokens an update sums over, and the simpler the optimizer, the easier it is to compute the inputs
from it (``tests/client/trainer_service/test_inversion.py``). The bounds are those of ``[allow]``. ``ORDINARY`` has the
values that ``colora provision`` writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...common.config.schema import Plan
from ...common.config.site_schema import ORDINARY, AllowSettings, SiteSettings
from ...common.errors import RefusedError
from ...common.methods import GROUPS, SHARED
from ..training.privacy_budget import PrivacyForecast
from .policy import round_limits


@dataclass(frozen=True)
class Finding:
    """A key of a plan that is outside a site's limits."""

    key: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.key} is {self.found}, ordinarily {self.expected}"


def check_lower_bounds(plan: Plan, site: SiteSettings, examples: int | None = None) -> None:
    """Raise RefusedError for the first key of the plan that is below a bound of the site.

    ``examples`` is the site's number of training examples; None where it is unknown and ``train.epochs`` is not judged.
    """
    for finding in below(plan, site.allow, examples):
        raise RefusedError(finding.key, finding.expected, finding.found, site=site.name)


def out_of_the_ordinary(plan: Plan, site: SiteSettings, examples: int | None = None) -> tuple[str, ...]:
    """What a person should see of a plan, whatever the site allows: one sentence for each unusual key."""
    high = (
        Finding(key, f"at most {ORDINARY.max_rank}", str(value))
        for key, value, limit in round_limits(plan, site)
        if limit == "max_rank" and value > (ORDINARY.max_rank or value)
    )
    return tuple(str(finding).partition(" (allow.")[0] for finding in (*below(plan, ORDINARY, examples), *high))


def below(plan: Plan, allow: AllowSettings, examples: int | None = None) -> Iterator[Finding]:
    """Yield what is below the bounds. Only the metrics matter for a method that shares nothing."""
    train = plan.train
    if allow.metrics == "none" and train.report_benefit:
        yield Finding("train.report_benefit", "false (allow.metrics is none)", "true")
    if allow.metrics == "none" and plan.evaluation.validation_loss:
        yield Finding("evaluation.validation_loss", "false (allow.metrics is none)", "true")
    yield from _below_privacy(plan, allow, examples)
    if not plan.row().shares:
        return
    secure = plan.privacy.secure_aggregation
    if allow.require_secure_aggregation and not secure:
        yield Finding("privacy.secure_aggregation", "true (allow.require_secure_aggregation)", "false")
    if secure and plan.privacy.min_sites < allow.min_sites:
        yield Finding("privacy.min_sites", f"at least {allow.min_sites} (allow.min_sites)", str(plan.privacy.min_sites))
    sizes = (
        ("train.batch_size", train.batch_size, "min_batch_size"),
        ("model.max_length", plan.model.max_length, "min_max_length"),
    )
    least = allow.min_examples
    if least is not None and (found := _too_few(plan, least, examples)):
        key = "train.epochs" if train.by_epochs else _steps_key(plan)
        yield Finding(key, f"at least {least} examples (allow.min_examples)", found)
    for key, value, limit in sizes:
        least = getattr(allow, limit)
        if least is not None and value < least:
            yield Finding(key, f"at least {least} (allow.{limit})", str(value))
    if allow.optimizers is not None and train.optimizer not in allow.optimizers:
        names = ", ".join(allow.optimizers)
        yield Finding("train.optimizer", f"one of {names} (allow.optimizers)", train.optimizer)
    if allow.require_clipping and train.max_update_norm is None:
        yield Finding("train.max_update_norm", "a number (allow.require_clipping)", "none")


def _below_privacy(plan: Plan, allow: AllowSettings, examples: int | None) -> Iterator[Finding]:
    """Yield what is below the bounds on privacy. The noise that spends a budget depends on the number of examples."""
    privacy = plan.privacy
    insists = {"max_epsilon": allow.max_epsilon, "min_noise": allow.min_noise}
    for key in (key for key, limit in insists.items() if limit is not None and not privacy.enabled):
        yield Finding("privacy", f"differential privacy (allow.{key})", "none")
    if not privacy.enabled:
        return
    if privacy.metrics != "none":
        yield Finding("privacy.metrics", "none (all is for simulations)", privacy.metrics)
    if privacy.delta > allow.max_delta:
        yield Finding("privacy.delta", f"at most {allow.max_delta:g} (allow.max_delta)", f"{privacy.delta:g}")
    if allow.min_noise is None or (privacy.noise_multiplier is None and not examples):
        return
    noise = PrivacyForecast(plan, examples or 0).noise_multiplier
    if noise < allow.min_noise:
        key = "privacy.noise_multiplier" if privacy.noise_multiplier else "privacy.epsilon"
        yield Finding(key, f"noise of at least {allow.min_noise:g} (allow.min_noise)", f"{noise:.3g}")


def _too_few(plan: Plan, least: int, examples: int | None) -> str:
    """The number of examples behind one update in words, if there are fewer than ``least``; else an empty text."""
    train = plan.train
    if train.by_epochs:
        behind = least if examples is None else train.examples_per_round(examples)
        return "" if behind >= least else f"{train.epochs:g} passes over {examples} examples"
    steps = shared_steps(plan)
    return "" if steps * train.batch_size >= least else f"{steps} × batch size {train.batch_size}"


def shared_steps(plan: Plan) -> int:
    """The fewest optimizer steps of a round on a shared group that is trained at all, where they are fixed."""
    train, row = plan.train, plan.row()
    if train.schedule == "joint":
        return train.steps_per_round(0)
    if train.schedule == "alternating":
        return train.shared_steps
    shared = [group for group in GROUPS if getattr(row, group) is SHARED]
    steps = [sum(phase.steps for phase in train.phase if group in phase.groups) for group in shared]
    return min(filter(None, steps), default=0)


def _steps_key(plan: Plan) -> str:
    return {"joint": "train.steps", "alternating": "train.shared_steps"}.get(plan.train.schedule, "train.phase.steps")
