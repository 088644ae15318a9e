"""What a coordinator may ask of this site: the plan it sends against the limits of the site file."""

from __future__ import annotations

from collections.abc import Iterator

from ...common.config.schema import Plan, TransferSettings
from ...common.config.site_schema import SiteSettings
from ...common.dataset import TASKS
from ...common.errors import RefusedError
from ...common.methods import ABSENT, GROUPS, METHODS, SHARED

ALTERNATING = "train.personal_steps + train.shared_steps"
SHOWN = 200  # characters of what a coordinator sent


def check_allowed(plan: Plan, federation: str, site: SiteSettings) -> None:
    """Raises RefusedError, naming the plan's key and the site's, at the first thing that ``[allow]`` does not allow.

    The error's public part is the plan's own key: a coordinator learns what was refused, not what would be allowed.
    ``max_seconds`` is the trainer's to watch while it runs.
    """
    allow = site.allow
    _check_choice("federation", federation, "federations", site)
    _check_choice("model.source", plan.model.source, "models", site)
    if site.trainer.precision is None:  # else the site has its own
        _check_choice("model.precision", plan.model.precision, "precision", site)
    _check_method(plan, site)
    _check_kept(plan, site)
    for field, found, key in (*_asked(plan, site), *_asked_to_keep(plan.transfer)):
        limit = getattr(allow, key)
        if limit is not None and found > limit:
            raise RefusedError(field, f"at most {limit} (allow.{key})", found, site=site.name)


def _asked(plan: Plan, site: SiteSettings) -> Iterator[tuple[str, int, str]]:
    """What rounds ask for: the plan's key, its value, and the site's key with the limit."""
    train = plan.train
    steps = {"joint": "train.steps", "phases": "train.phase.steps"}.get(train.schedule, ALTERNATING)
    modules = plan.adapter.modules if plan.row().scale is not ABSENT else 1
    yield "adapter.rank", plan.adapter.rank * modules, "max_rank"
    yield "private.rank", 0 if site.private else plan.private.total_rank, "max_rank"  # its own needs no permission
    yield steps, train.steps_per_round, "max_steps"
    yield "train.final_steps", train.final_steps, "max_steps"
    yield "model.max_length", plan.model.max_length, "max_tokens"


def _asked_to_keep(transfer: TransferSettings) -> Iterator[tuple[str, int, str]]:
    """The same of a preparation."""
    if not transfer.prepare:
        return
    yield "transfer.seeds", transfer.seeds, "max_seeds"
    yield "transfer.rank", transfer.rank, "max_rank"
    if transfer.filter == "discriminator":
        yield "transfer.steps", transfer.steps, "max_steps"
    if transfer.writer == "tuned":
        yield "transfer.writer_steps", transfer.writer_steps, "max_steps"


def _check_kept(plan: Plan, site: SiteSettings) -> None:
    """What a site keeps of its texts outlives its data: that is its own decision, and so is which model reads them."""
    transfer = plan.transfer
    if (transfer.prepare or transfer.of) and transfer.writer == "tuned" and not site.allow.tuned_writer:
        wanted = "target or source (or true in allow.tuned_writer)"
        raise RefusedError("transfer.writer", wanted, "tuned", site=site.name)
    if transfer.prepare and transfer.generator and not TASKS[site.data.task].needs_causal_lm:
        _check_choice("transfer.generator", transfer.generator, "models", site)


def _check_choice(field: str, found: str, key: str, site: SiteSettings) -> None:
    allowed = getattr(site.allow, key)
    if allowed is not None and found not in allowed:
        raise RefusedError(field, _one_of(allowed, key), repr(found[:SHOWN]), site=site.name)


def _check_method(plan: Plan, site: SiteSettings) -> None:
    """An entry is a method, or ``METHOD+GROUP`` where a recipe may also share a group that the table's row does not.

    A method's name alone must not be a way to a head or a matrix that the method leaves at the site, and a site that
    names no methods has agreed to every method as it stands in the table, and to no more.
    """
    allowed, name = site.allow.methods, plan.method.name
    entries = [entry.split("+") for entry in (METHODS if allowed is None else allowed)]
    extras = [set(groups) for method, *groups in entries if method == name]
    if allowed is not None and not extras:
        raise RefusedError("method.name", _one_of(allowed, "methods"), repr(name[:SHOWN]), site=site.name)
    row, usual = plan.method.row(), METHODS[name]  # ConfigError where this is no method
    moved = [group for group in GROUPS if getattr(row, group) is SHARED is not getattr(usual, group)]
    if not any(extra.issuperset(moved) for extra in extras):
        group = moved[0]
        entry = "+".join((name, *moved))
        expected = f'{getattr(usual, group).value} as in {name} (or "{entry}" in allow.methods)'
        raise RefusedError(f"method.{group}", expected, SHARED.value, site=site.name)


def _one_of(allowed: tuple[str, ...], key: str) -> str:
    return f"one of {', '.join(allowed)} (allow.{key})" if allowed else f"nothing at all (allow.{key} is empty)"
