"""``colora client SITE.toml --check --recipe RECIPE``: what a recipe would ask of this site, before it takes part."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ....common.config.loader import load_recipe
from ....common.config.schema import Plan
from ....common.config.site_schema import SiteSettings
from ....common.errors import ConfigError, RefusedError


def check_recipe(path: Path, site: SiteSettings, examples: int | None) -> str:
    """Describe a recipe that the site accepts. ``examples`` is its number of training examples, if it is known.

    Raises ConfigError for a recipe that is wrong by itself, and RefusedError for one that ``[allow]`` refuses.
    """
    from ...trainer_service.lower_bounds import check_lower_bounds, out_of_the_ordinary
    from ...trainer_service.plan_bounds import check_bounds
    from ...trainer_service.policy import check_allowed

    plan = load_recipe(path).plan
    if plan.privacy.enabled and site.trainer.seeds != "secret":
        message = 'trainer.seeds must be "secret" with [privacy].'
        raise ConfigError("trainer.seeds", "secret", site.trainer.seeds, message=message)
    check_bounds(plan, site)
    check_allowed(plan, plan.name, site)
    check_lower_bounds(plan, site, examples)
    unusual = "; ".join(out_of_the_ordinary(plan, site, examples))
    privacy, look = (_privacy(plan, site, examples), _secure(plan, site)), f"LOOK: {unusual}" if unusual else ""
    return ". ".join(filter(None, (f"{plan.name}: accepted", *privacy, look)))


def _secure(plan: Plan, site: SiteSettings) -> str:
    """How many sites the roster has, and its hash, which other sites can compare. Raises ConfigError."""
    if not plan.privacy.secure_aggregation:
        return ""
    from ....common.secure_aggregation.identity import read_identity

    roster = Path(site.trainer.roster)
    count = len(read_identity(site.name, Path(site.trainer.aggregation_key), roster).roster)
    text = hashlib.sha256(roster.read_bytes()).hexdigest()
    return f"secure aggregation: a roster of {count} sites with the SHA-256 {text}"


def _privacy(plan: Plan, site: SiteSettings, examples: int | None) -> str:
    """What the recipe would spend. Raises RefusedError where the site allows less."""
    if not plan.privacy.enabled:
        return "no differential privacy"
    if not examples:
        return "differential privacy: ε is unknown without rows"
    from ...training.privacy_budget import LEDGER, PrivacyForecast, PrivacyLedger, check_delta, epsilon_of

    forecast, others = (
        PrivacyForecast(plan, examples),
        PrivacyLedger(Path(site.trainer.state) / LEDGER).others(plan.name),
    )
    check_delta(plan, examples, site.name)
    epsilon, limit = forecast.epsilon(*others), site.allow.max_epsilon
    if limit is not None and epsilon > limit:
        raise RefusedError("privacy.epsilon", f"at most {limit:g} (allow.max_epsilon)", f"{epsilon:.3g}")
    spent = epsilon_of(others, plan.privacy.delta)
    before = f"; with other federations, which have spent {spent:.3g}, ε = {epsilon:.3g}" if spent else ""
    noise = f"noise multiplier {forecast.noise_multiplier:.3g}"
    return f"differential privacy: ε = {forecast.epsilon():.3g} at δ = {plan.privacy.delta:g}, {noise}{before}"
