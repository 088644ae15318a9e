"""What differential privacy and secure aggregation exclude.

With the former, settings by which something about the training rows would leave without noise. With the latter,
settings that need single updates, or other numbers than the integers of the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import ConfigError
from .privacy_schema import PrivacySettings
from .schema import Plan, Recipe, ServerSettings


def check_privacy(plan: Plan) -> None:
    """Raise ConfigError for the first setting of a private plan that would break its guarantee.

    The coordinator checks its recipe, and every site checks the plan that it receives.
    """
    _check_secure_plan(plan)
    if not plan.privacy.enabled:
        secure = {name: getattr(plan.privacy, name) for name in ("secure_aggregation", "min_sites")}
        if plan.privacy != dataclasses.replace(PrivacySettings(), **secure):
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


def _check_secure_plan(plan: Plan) -> None:
    """Raise ConfigError for the first setting of a plan that secure aggregation excludes. Every site checks it, too."""
    privacy = plan.privacy
    if not privacy.secure_aggregation:
        if privacy.min_sites != PrivacySettings().min_sites:
            message = "privacy.min_sites has no effect without privacy.secure_aggregation."
            raise ConfigError(
                "privacy.min_sites", "unset", privacy.min_sites, message=message, hint="Remove one of them."
            )
        return
    bits = {key: getattr(plan.communication, key) for key in ("update_bits", "broadcast_bits")}
    excluded = (
        ("train.max_update_norm", "unset", plan.train.max_update_norm is None, "a number"),
        *((f"communication.{key}", number, number is not None, "unset") for key, number in bits.items()),
        ("adapter.init", plan.adapter.init, plan.adapter.init == "spectral", "another one"),
        ("method", "one without shared parameters", not plan.row().shares, "one that has them"),
    )
    _refuse(excluded, "privacy.secure_aggregation")


def check_site_count(privacy: PrivacySettings, sites: int) -> None:
    """Raise ConfigError if so many sites are too few for a secure sum."""
    if privacy.secure_aggregation and sites < privacy.min_sites:
        raise ConfigError(
            "privacy.min_sites",
            f"at most {sites}",
            privacy.min_sites,
            message=f"privacy.min_sites is {privacy.min_sites}, but the number of sites is {sites}.",
            hint="Lower privacy.min_sites, or add sites.",
        )


def check_secure_recipe(recipe: Recipe) -> None:
    """Raise ConfigError for the first setting of a recipe's ``[server]`` that secure aggregation excludes."""
    if not recipe.privacy.secure_aggregation:
        return
    server, fresh = recipe.server, ServerSettings()
    limits = [
        (f"server.{key}", getattr(server, key), getattr(fresh, key)) for key in ("max_relative_norm", "max_update_norm")
    ]
    excluded = (
        ("server.aggregator", server.aggregator, server.aggregator != "mean", "mean"),
        ("server.weights", "benefit", server.weights == "benefit", "tokens, examples or uniform"),
        ("server.groups", server.groups, server.groups != "none", "none"),
        *(
            (key, found, found != default, "unset, since the coordinator sees no update")
            for key, found, default in limits
        ),
    )
    _refuse(excluded, "privacy.secure_aggregation")


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
    secure, spectral = recipe.privacy.secure_aggregation, recipe.adapter.init == "spectral"
    excluded = (
        ("server.aggregator", server.aggregator, server.aggregator != "mean", "mean"),
        ("server.weights", server.weights, server.weights not in (None, "uniform"), "uniform"),
        ("server.groups", server.groups, server.groups != "none", "none"),
        ("server.keep", server.keep, server.keep != "last", "last"),
        ("server.patience", server.patience, server.patience is not None, "unset"),
        ("adapter.init", "spectral", spectral, "another one"),
        ("privacy.secure_aggregation", secure, secure, "unset, since the coordinator must clip every update"),
    )
    _refuse(excluded, "[server.privacy]")


def _refuse(excluded: Sequence[tuple[str, object, bool, str]], other: str) -> None:
    for key, found, breaks, expected in excluded:
        if breaks:
            message = f"{key} is {found}, which is not possible with {other}: it must be {expected}."
            hint = f"Change it, or remove {other}."
            raise ConfigError(key, f"{expected}, with {other}", found, message=message, hint=hint)
