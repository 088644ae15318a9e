"""What a coordinator may ask of this site: the plan it sends against the limits of the site file."""

from __future__ import annotations

from ..common.errors import RefusedError
from ..common.methods import ABSENT, GROUPS, METHODS, SHARED
from ..common.settings import Plan
from ..common.site import SiteSettings

ALTERNATING = "train.personal_steps + train.shared_steps"
SHOWN = 200  # characters of what a coordinator sent


def check_allowed(plan: Plan, federation: str, site: SiteSettings) -> None:
    """Raises RefusedError, naming the plan's key and the site's, at the first thing that ``[allow]`` does not allow.

    The error's public part is the plan's own key: a coordinator learns what was refused, not what would be allowed.
    ``max_seconds`` is the trainer's to watch while it runs.
    """
    allow, train = site.allow, plan.train
    _check_choice("federation", federation, "federations", site)
    _check_choice("model.source", plan.model.source, "models", site)
    if site.trainer.precision is None:  # else the site has its own
        _check_choice("model.precision", plan.model.precision, "precision", site)
    _check_method(plan, site)
    _check_kept(plan, site)
    steps = {"joint": "train.steps", "phases": "train.phase.steps"}.get(train.schedule, ALTERNATING)
    modules = plan.adapter.modules if plan.row().scale is not ABSENT else 1
    private_rank = 0 if site.private else plan.private.total_rank  # a site's own choice needs no permission
    for field, found, limit, key in (
        ("adapter.rank", plan.adapter.rank * modules, allow.max_rank, "max_rank"),
        ("private.rank", private_rank, allow.max_rank, "max_rank"),
        (steps, train.steps_per_round, allow.max_steps, "max_steps"),
        ("train.final_steps", train.final_steps, allow.max_steps, "max_steps"),
        ("transfer.steps", plan.transfer.prepare * plan.transfer.steps, allow.max_steps, "max_steps"),
        ("transfer.writer_steps", plan.transfer.prepare * plan.transfer.writer_steps, allow.max_steps, "max_steps"),
        ("model.max_length", plan.model.max_length, allow.max_tokens, "max_tokens"),
    ):
        if limit is not None and found > limit:
            raise RefusedError(field, f"at most {limit} (allow.{key})", found, site=site.name)


def _check_kept(plan: Plan, site: SiteSettings) -> None:
    """What a site keeps of its texts outlives its data: that is its own decision, and so is which model reads them."""
    transfer, keep = plan.transfer, site.allow.keep
    if not transfer.prepare:
        return
    if "seeds" not in keep:
        raise RefusedError("transfer.prepare", 'false (or "seeds" in allow.keep)', "true", site=site.name)
    if transfer.writer == "tuned" and "writer" not in keep:
        raise RefusedError("transfer.writer", 'target or source (or "writer" in allow.keep)', "tuned", site=site.name)
    if transfer.generator:
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
    row, usual = plan.method.row(), METHODS[name]  # RecipeError where this is no method
    moved = [group for group in GROUPS if getattr(row, group) is SHARED is not getattr(usual, group)]
    if not any(extra.issuperset(moved) for extra in extras):
        group = moved[0]
        entry = "+".join((name, *moved))
        expected = f'{getattr(usual, group).value} as in {name} (or "{entry}" in allow.methods)'
        raise RefusedError(f"method.{group}", expected, SHARED.value, site=site.name)


def _one_of(allowed: tuple[str, ...], key: str) -> str:
    return f"one of {', '.join(allowed)} (allow.{key})" if allowed else f"nothing at all (allow.{key} is empty)"
