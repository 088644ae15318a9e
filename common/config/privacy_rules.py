"""What differential privacy excludes: settings by which something about the data would leave without noise."""

from __future__ import annotations

from ..errors import ConfigError
from .privacy_schema import PrivacySettings
from .schema import Plan, Recipe


def check_privacy(plan: Plan) -> None:
    """Raise ConfigError for the first setting of a private plan that would break its guarantee.

    The coordinator checks its recipe, and every site checks the plan that it receives.
    """
    if not plan.privacy.enabled:
        if plan.privacy != PrivacySettings():
            message = "[privacy] sets neither epsilon nor noise_multiplier, so it would have no effect."
            hint = "Set privacy.epsilon."
            raise ConfigError(
                "privacy.epsilon", "a budget, or a noise_multiplier", "neither", message=message, hint=hint
            )
        return
    train = plan.train
    excluded = (
        ("adapter.init", plan.adapter.init, plan.adapter.init == "spectral", "another one"),
        ("train.report_benefit", "true", train.report_benefit, "false"),
        ("train.fallback", train.fallback, train.fallback is not None, "unset"),
        ("train.head_init", "probe", plan.probes_head, "random"),
        ("train.class_weights", train.class_weights, train.class_weights is not None, "unset"),
        ("model.precision", plan.model.precision, plan.model.precision == "fp16", "fp32 or bf16"),
        (
            "transfer.source_federation",
            plan.transfer.source_federation,
            plan.transfer.source_federation is not None,
            "unset",
        ),
        (
            "evaluation.validation_loss",
            "true",
            plan.evaluation.validation_loss and plan.privacy.metrics == "none",
            'false, or privacy.metrics = "all"',
        ),
    )
    for key, found, breaks, expected in excluded:
        if breaks:
            raise ConfigError(
                key,
                f"{expected}, with differential privacy",
                found,
                message=f"{key} is {found}, which is not possible with [privacy]: it must be {expected}.",
                hint="Change it, or remove [privacy].",
            )


def check_site_privacy(recipe: Recipe) -> None:
    """Raise ConfigError for the first setting that would break the guarantee of ``[server.privacy]``.

    The sensitivity is known for a mean of clipped updates only. What else the sites' data decide would have no noise.
    """
    server, privacy = recipe.server, recipe.server.privacy
    if privacy is None:
        return
    if privacy.epsilon is None and privacy.noise_multiplier is None:
        message = "[server.privacy] sets neither epsilon nor noise_multiplier, so it would have no effect."
        hint = "Set server.privacy.epsilon."
        key = "server.privacy.epsilon"
        raise ConfigError(key, "a budget, or a noise_multiplier", "neither", message=message, hint=hint)
    excluded = (
        ("server.aggregator", server.aggregator, "mean"),
        ("server.weights", server.weights or "uniform", "uniform"),
        ("server.groups", server.groups, "none"),
        ("server.keep", server.keep, "last"),
        ("server.patience", server.patience, None),
        ("adapter.init", "spectral" if recipe.adapter.init == "spectral" else None, None),
    )
    for key, found, expected in excluded:
        if found != expected:
            needed = "another one" if key == "adapter.init" else expected or "unset"
            raise ConfigError(
                key,
                f"{needed}, with [server.privacy]",
                found,
                message=f"{key} is {found}, which is not possible with [server.privacy]: it must be {needed}.",
                hint="Change it, or remove [server.privacy].",
            )
