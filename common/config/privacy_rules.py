"""What differential privacy excludes: settings by which something about the training rows would leave without noise."""

from __future__ import annotations

from ..errors import ConfigError
from .privacy_schema import PrivacySettings
from .schema import Plan


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
