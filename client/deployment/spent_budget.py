"""What a site has spent of its privacy budget in a federation, for its status."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ...common.config.schema import Plan, parse
from ...common.config.site_schema import SiteSettings
from ...common.training.accountant import epsilon_of
from ..training.privacy_budget import PrivacyLedger


@dataclass(frozen=True)
class SpentBudget:
    """ε at δ by the ledger, and its limits; None for no limit.

    ``epsilon`` and ``budget`` are of one federation; ``in_all`` and ``max_epsilon`` are of all federations of the site.
    """

    epsilon: float
    delta: float
    budget: float | None
    in_all: float
    max_epsilon: float | None

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" of {self.budget:g}"
        text = f"ε = {self.epsilon:.3g}{budget} at δ = {self.delta:g}"
        if self.max_epsilon is not None:
            text += f"; all federations {self.in_all:.3g} of {self.max_epsilon:g}"
        return text


def spent_budget(plan_text: str, ledger: PrivacyLedger, site: SiteSettings) -> SpentBudget | None:
    """Return what has been spent in the federation of a plan, given as JSON; None without differential privacy.

    Raises DamagedError or StateError for a ledger that cannot be read, ConfigError without Opacus or for another text,
    and RefusedError where ε cannot be computed.
    """
    plan = parse(Plan, json.loads(plan_text or "{}"))
    if not plan.privacy.enabled or not plan.row().shares:
        return None
    delta = plan.privacy.delta
    epsilon, in_all = (epsilon_of(ledger.spendings(name), delta) for name in (plan.name, None))
    return SpentBudget(epsilon, delta, plan.privacy.epsilon, in_all, site.allow.max_epsilon)
