"""The site's policy: checks a coordinator's plan against the ``[allow]`` table of the site file."""

from __future__ import annotations

from collections.abc import Iterator

from ...common.config.schema import ModelSettings, Plan, TransferSettings
from ...common.config.site_schema import SiteSettings
from ...common.dataset import TASKS
from ...common.errors import RefusedError
from ...common.foreign_text import clean
from ...common.methods import ABSENT, GROUPS, METHODS, SHARED
from ..training.smaller_rank import plan_at_rank

ALTERNATING = "train.personal_steps + train.shared_steps"
MAX_STEPS, MAX_RANK = 1_000_000, 4096  # of a round and of an adapter, whatever the site allows
TOTALS = {"max_steps": MAX_STEPS, "max_rank": MAX_RANK}  # bounds on sums and products of a plan's numbers
MAX_SHOWN = 200  # characters of a coordinator's value in an error


def check_allowed(plan: Plan, federation: str, site: SiteSettings) -> None:
    """Raise RefusedError for the first setting that ``[allow]`` forbids, naming the plan's key and the site's key.

    The error's public part is the plan's key only: the coordinator learns what was refused, not what is allowed. But it
    learns the rank of a smaller adapter.
    ``plan_bounds.py`` checks the limits on single numbers, and ``time_limit.py`` enforces ``max_seconds``.
    """
    _check_choice("federation", federation, "federations", site)
    _check_model(plan.model, site)
    if site.trainer.precision is None:  # otherwise the site uses its own
        _check_choice("model.precision", plan.model.precision, "precision", site)
    _check_method(plan, site)
    _check_transfer(plan, site)
    for field, value, key in (*round_limits(plan, site), *_preparation_limits(plan.transfer)):
        _check_limit(field, value, key, site)


def check_epochs(plan: Plan, site: SiteSettings, examples: int) -> None:
    """Check the steps of ``train.epochs``, which depend on the site's number of training examples.

    Raises RefusedError.
    """
    if plan.train.by_epochs:
        steps = plan.train.models * plan.train.steps_per_round(examples)
        if steps > MAX_STEPS:
            raise RefusedError("train.epochs", f"at most {MAX_STEPS} steps", steps, site=site.name)
        _check_limit("train.epochs", steps, "max_steps", site)


def _check_limit(field: str, value: int, key: str, site: SiteSettings) -> None:
    limit = getattr(site.allow, key)
    if limit is not None and value > limit:
        raise RefusedError(field, f"at most {limit} (allow.{key})", value, site=site.name)
    if value > TOTALS.get(key, value):
        raise RefusedError(field, f"at most {TOTALS[key]}", value, site=site.name)


def round_limits(plan: Plan, site: SiteSettings) -> Iterator[tuple[str, int, str]]:
    """Yield (plan's key, its value, key of the limit in ``[allow]``) for the rounds, without those of ``epochs``."""
    train = plan.train
    steps = {"joint": "train.steps", "phases": "train.phase.steps"}.get(train.schedule, ALTERNATING)
    modules = plan.adapter.modules if plan.row().scale is not ABSENT else 1
    plan = plan_at_rank(plan, site.allow.max_rank)
    rank = max(plan.adapter.rank, *(plan.adapter.rank_pattern or {}).values(), 1)
    yield "adapter.rank", rank * modules, "max_rank"
    yield (
        "private.rank",
        0 if site.private else plan.private.total_rank,
        "max_rank",
    )  # not the site's own choice
    if not train.by_epochs:
        yield steps, train.models * train.steps_per_round(0), "max_steps"
    yield "train.final_steps", train.models * train.final_steps, "max_steps"
    yield "model.max_length", plan.model.max_length, "max_tokens"


def _preparation_limits(transfer: TransferSettings) -> Iterator[tuple[str, int, str]]:
    """Yield the same for the preparation of a transfer."""
    if not transfer.prepare:
        return
    yield "transfer.seeds", transfer.seeds, "max_seeds"
    yield "transfer.discriminator.rank", transfer.discriminator.rank, "max_rank"
    if transfer.filter == "discriminator":
        yield "transfer.discriminator.steps", transfer.discriminator.steps, "max_steps"
    if transfer.generator.mode == "tuned":
        yield "transfer.generator.tuning_steps", transfer.generator.tuning_steps, "max_steps"


def _check_transfer(plan: Plan, site: SiteSettings) -> None:
    """Check what the site would keep for a transfer, and which model would read its texts.

    What a site keeps of its texts outlives its data, so both are the site's decision.
    """
    transfer = plan.transfer
    if transfer.source_federation:
        _check_choice("transfer.source_federation", transfer.source_federation, "federations", site)
    tuned = (transfer.prepare or transfer.source_federation) and transfer.generator.mode == "tuned"
    if tuned and not site.allow.tuned_generator:
        wanted = "target or source (or true in allow.tuned_generator)"
        raise RefusedError("transfer.generator.mode", wanted, "tuned", site=site.name)
    if transfer.prepare and transfer.generator.model and not TASKS[site.data.task].needs_causal_lm:
        _check_choice("transfer.generator.model", transfer.generator.model, "models", site)


def _check_model(model: ModelSettings, site: SiteSettings) -> None:
    """Check the base model and its revision.

    An entry of ``allow.models`` is a model at its default branch, or ``NAME@REVISION``: other branches and the pull
    requests of a hub repository may be of other people than its files.
    """
    allowed, source, revision = site.allow.models, model.source, model.revision
    if allowed is None or (revision is not None and f"{source}@{revision}" in allowed):
        return
    _check_choice("model.source", source, "models", site)
    if revision is not None:
        entry = clean(f"{source}@{revision}")
        raise RefusedError("model.revision", f'unset (or "{entry}" in allow.models)', revision, site=site.name)


def _check_choice(field: str, value: str, key: str, site: SiteSettings) -> None:
    allowed = getattr(site.allow, key)
    if allowed is not None and value not in allowed:
        raise RefusedError(field, _one_of(allowed, key), repr(value[:MAX_SHOWN]), site=site.name)


def _check_method(plan: Plan, site: SiteSettings) -> None:
    """Check the method and the groups that the plan shares.

    An entry of ``allow.methods`` is a method, or ``METHOD+GROUP`` for a plan that also shares a group which the method
    keeps at the site. Without ``allow.methods`` every method is allowed, but no additional group.
    """
    allowed, name = site.allow.methods, plan.method.name
    entries = [entry.split("+") for entry in (METHODS if allowed is None else allowed)]
    allowed_groups = [set(groups) for method, *groups in entries if method == name]
    if allowed is not None and not allowed_groups:
        raise RefusedError("method.name", _one_of(allowed, "methods"), repr(name[:MAX_SHOWN]), site=site.name)
    requested, default = plan.method.row(), METHODS[name]  # ConfigError for an unknown method
    additional = [group for group in GROUPS if getattr(requested, group) is SHARED is not getattr(default, group)]
    if not any(groups.issuperset(additional) for groups in allowed_groups):
        group = additional[0]
        entry = "+".join((name, *additional))
        expected = f'{getattr(default, group).value} as in {name} (or "{entry}" in allow.methods)'
        raise RefusedError(f"method.{group}", expected, SHARED.value, site=site.name)


def _one_of(allowed: tuple[str, ...], key: str) -> str:
    return f"one of {', '.join(allowed)} (allow.{key})" if allowed else f"nothing (allow.{key} is empty)"
