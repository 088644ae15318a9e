"""``colora client SITE.toml --check --recipe RECIPE``: what a recipe would ask of this site, before it takes part."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from ....common.config.loader import load_recipe
from ....common.config.privacy_rules import check_site_count
from ....common.config.schema import ModelSettings, Plan
from ....common.config.site_schema import SiteSettings
from ....common.errors import ConfigError, RefusedError


def accepted_plan(path: Path, site: SiteSettings) -> Plan:
    """Return the plan of a recipe that the site accepts as far as this does not depend on its rows.

    Raises ConfigError for a recipe that is wrong by itself, and RefusedError for one that ``[allow]`` refuses.
    """
    from ...trainer_service.lower_bounds import check_lower_bounds
    from ...trainer_service.plan_bounds import check_bounds
    from ...trainer_service.policy import check_allowed

    plan = load_recipe(path).plan
    if plan.privacy.enabled and site.trainer.seeds != "secret":
        message = 'trainer.seeds must be "secret" with [privacy].'
        raise ConfigError("trainer.seeds", "secret", site.trainer.seeds, message=message)
    check_bounds(plan, site)
    check_allowed(plan, plan.name, site)
    check_lower_bounds(plan, site)
    return plan


def model_at(plan: Plan, site: SiteSettings) -> ModelSettings:
    """Return the base model of a plan as this site loads it."""
    precision = site.trainer.precision or plan.model.precision
    return dataclasses.replace(plan.model, device=site.trainer.device, precision=precision)


def check_recipe(plan: Plan, site: SiteSettings, examples: int | None) -> str:
    """Describe an accepted plan. ``examples`` is the number of training examples with its base model, if known.

    Raises ConfigError and RefusedError for what the site's rows do not allow.
    """
    from ...trainer_service.lower_bounds import check_lower_bounds, out_of_the_ordinary
    from ...trainer_service.policy import check_epochs

    if examples:
        check_epochs(plan, site, examples)
        check_lower_bounds(plan, site, examples)
    unusual = "; ".join(out_of_the_ordinary(plan, site, examples))
    privacy, look = (_privacy(plan, site, examples), _secure(plan, site)), f"LOOK: {unusual}" if unusual else ""
    return ". ".join(filter(None, (f"{plan.name}: accepted", _rank(plan, site), *privacy, look)))


def _rank(plan: Plan, site: SiteSettings) -> str:
    """The rank of the site's adapter, where it is smaller than the recipe's."""
    from ...training.smaller_rank import plan_at_rank

    rank = plan_at_rank(plan, site.allow.max_rank).adapter.rank
    return (
        f"Adapter of rank {rank} in place of {plan.adapter.rank} (allow.max_rank)" if rank < plan.adapter.rank else ""
    )


def _secure(plan: Plan, site: SiteSettings) -> str:
    """How many sites the roster has, and its hash, which other sites can compare. Raises ConfigError."""
    if not plan.privacy.secure_aggregation:
        return ""
    from ....common.secure_aggregation.identity import read_identity

    roster = Path(site.trainer.roster)
    count = len(read_identity(site.name, Path(site.trainer.aggregation_key), roster).roster)
    check_site_count(plan.privacy, count)
    text = hashlib.sha256(roster.read_bytes()).hexdigest()
    return f"Secure aggregation: a roster of {count} sites with the SHA-256 {text}"


def _privacy(plan: Plan, site: SiteSettings, examples: int | None) -> str:
    """What the recipe would spend. Raises RefusedError where the site allows less."""
    if not plan.privacy.enabled:
        return "No differential privacy"
    if not plan.row().shares:
        return "Differential privacy spends nothing: the method shares nothing"
    if not examples:
        return "Differential privacy: ε is unknown without the rows and the recipe's base model"
    from ....common.training.accountant import epsilon_of
    from ...training.privacy_budget import LEDGER, PrivacyForecast, PrivacyLedger, check_delta

    forecast, others = (
        PrivacyForecast(plan, examples),
        PrivacyLedger(Path(site.trainer.state) / LEDGER).others(plan.name),
    )
    check_delta(plan, examples, site.name)
    delta, limit = plan.privacy.delta, site.allow.max_epsilon
    epsilon, steps = forecast.epsilon(*others), forecast.of_rounds(plan.rounds).steps
    if limit is not None and epsilon > limit:
        raise RefusedError("privacy.epsilon", f"at most {limit:g} (allow.max_epsilon)", f"{epsilon:.3g}")
    sentence = (
        f"Differential privacy: all {plan.rounds} rounds would spend ε = {forecast.epsilon():.3g} at δ = {delta:g}, in "
        f"{steps} steps that draw each of the {examples} training examples with probability {forecast.sample_rate:.3g} "
        f"(noise multiplier {forecast.noise_multiplier:.3g})"
    )
    if spent := epsilon_of(others, delta):
        sentence += f". Other federations have spent {spent:.3g}, so ε would be {epsilon:.3g} in all"
    return sentence
