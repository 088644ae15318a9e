"""Rules of a recipe that span keys."""

from __future__ import annotations

import dataclasses

from ..dataset import TASKS
from ..errors import ConfigError
from ..methods import GROUPS, Method, Role
from .privacy_rules import check_privacy, check_secure_recipe, check_site_privacy
from .schema import Recipe, TrainSettings


def check_rules(recipe: Recipe) -> None:
    """Check rules that span keys. Raises ConfigError."""
    row = recipe.row()
    _check_phases(recipe, row)
    _check_epochs(recipe.train)
    _check_sites(recipe)
    _check_init(recipe, row)
    _check_groups(recipe)
    _check_aggregator(recipe, row)
    _check_broadcast(recipe)
    _check_warmup(recipe.train)
    _check_label_loss(recipe)
    _check_fallback(recipe, row)
    _check_head(recipe, row)
    _check_validation(recipe)
    _check_privacy(recipe)


def _check_privacy(recipe: Recipe) -> None:
    if recipe.privacy.enabled and recipe.server.groups != "none":
        message = f'server.groups = "{recipe.server.groups}" is not possible with [privacy]: its trial has no noise.'
        hint = "Remove one of the two."
        raise ConfigError("server.groups", "none with [privacy]", recipe.server.groups, message=message, hint=hint)
    if recipe.privacy.enabled and recipe.server.weights == "benefit":
        message = 'server.weights = "benefit" is not possible with [privacy]: its ratio has no noise.'
        hint = "Choose other weights."
        raise ConfigError("server.weights", "other weights with [privacy]", "benefit", message=message, hint=hint)
    if recipe.privacy.withholds_metrics and recipe.server.validates:
        key = "server.keep" if recipe.server.keep == "best" else "server.patience"
        message = f"{key} is not possible with [privacy]: it needs losses of the validation rows, which have no noise."
        hint = f'Remove {key}. A simulation can set privacy.metrics = "all".'
        raise ConfigError(key, "unset with [privacy]", "set", message=message, hint=hint)
    check_privacy(recipe.plan)
    check_secure_recipe(recipe)
    check_site_privacy(recipe)


def _check_groups(recipe: Recipe) -> None:
    if recipe.server.groups != "none" and recipe.adapter.init == "spectral":
        raise ConfigError(
            "server.groups",
            'none with adapter.init = "spectral"',
            recipe.server.groups,
            message=f'server.groups = "{recipe.server.groups}" cannot compare updates that begin with cores of zero.',
            hint='Use adapter.init = "kaiming", or server.weights = "benefit" instead of groups.',
        )


def _check_aggregator(recipe: Recipe, row: Method) -> None:
    fits = row.averages_products and row.scale is Role.ABSENT
    if recipe.server.aggregator == "product" and row.shares and not fits:  # where nothing is shared, it has no effect
        raise ConfigError(
            "server.aggregator",
            "another one, or a method that shares A and B and no scales",
            f"product with method {recipe.method.name}",
            message=f"The aggregator product averages B·A, but {recipe.method.name!r} does not share just A and B.",
            hint='Use method "fedit" or "colora", or server.aggregator = "mean".',
        )


def _check_broadcast(recipe: Recipe) -> None:
    codec, bits = recipe.communication.codec, recipe.communication.broadcast_bits
    if bits is not None and codec != "safetensors":
        message = f'communication.codec = "{codec}" is not possible with communication.broadcast_bits.'
        hint = "Remove one of the two: a site without the last adapter receives the whole one in fp32."
        raise ConfigError("communication.codec", "safetensors with broadcast_bits", codec, message=message, hint=hint)


def _check_warmup(train: TrainSettings) -> None:
    if train.warmup_steps and train.warmup_ratio:
        message = "The recipe sets both train.warmup_steps and train.warmup_ratio."
        raise ConfigError("train.warmup_ratio", "one of the two", "both", message=message, hint="Remove one of them.")


def _check_validation(recipe: Recipe) -> None:
    key = "server.keep" if recipe.server.keep == "best" else "server.patience"
    if recipe.server.validates and recipe.transfer.source_federation is not None:
        raise ConfigError(
            key,
            "unset in a transfer",
            recipe.transfer.source_federation,
            message=f"{key} is not possible in a transfer, whose sites train on generated texts.",
            hint=f"Remove {key}.",
        )

    measured = [recipe.data, *(site.data for site in recipe.site)]
    if recipe.server.validates and any(data.evaluate_on == "validation" for data in measured):
        raise ConfigError(
            "data.evaluate_on",
            f"test, with {key}",
            "validation",
            message=f'data.evaluate_on = "validation" measures models on the rows by which {key} compares rounds.',
            hint=f"Remove data.evaluate_on or {key}.",
        )


def _check_head(recipe: Recipe, row: Method) -> None:
    for key, value, other in (
        ("train.head_init", recipe.train.head_init, "random"),
        ("train.final_head", recipe.train.final_head, "trained"),
    ):
        if value == "probe" and row.head is not Role.PERSONAL:
            raise ConfigError(
                key,
                f"{other} or unset",
                "probe",
                message=f'{key} = "probe" needs personal heads, but the head is shared.',
                hint=f"Remove {key} or method.head.",
            )
    if row.head is Role.SHARED and len({site.data.labels for site in recipe.site} or {recipe.data.labels}) > 1:
        raise ConfigError(
            "method.head",
            "one list of labels at all sites",
            "different lists",
            message="A shared head needs one list of labels, but the sites have different ones.",
            hint="Set data.labels for all sites, or leave the head personal.",
        )


def _check_epochs(train: TrainSettings) -> None:
    if train.epochs is None:
        return
    if train.steps is not None:
        message = "The recipe sets both train.steps and train.epochs."
        raise ConfigError("train.epochs", "one of the two", "both", message=message, hint="Remove one of them.")
    if train.schedule != "joint":
        message = f'train.epochs needs train.schedule = "joint", not {train.schedule!r}.'
        hint = "Set the steps of each phase instead."
        raise ConfigError("train.epochs", "the schedule joint", train.schedule, message=message, hint=hint)


def _check_label_loss(recipe: Recipe) -> None:
    """Refuse settings of the loss over labels where no site has labels."""
    tasks = {site.data.task for site in recipe.site} or {recipe.data.task}
    for key in ("class_weights", "label_smoothing"):
        if getattr(recipe.train, key) and not any(TASKS[task].has_labels for task in tasks):
            message = f"train.{key} has no effect: no site of the recipe classifies texts."
            raise ConfigError(
                f"train.{key}", "a task with labels", ", ".join(tasks), message=message, hint="Remove it."
            )


def _check_fallback(recipe: Recipe, row: Method) -> None:
    if recipe.train.fallback is None:
        return
    if row.scale is Role.SHARED:
        raise ConfigError(
            "train.fallback",
            "unset with shared scales",
            recipe.train.fallback,
            message=f"train.fallback is not possible with method {recipe.method.name!r}: its scales are shared.",
            hint="Remove train.fallback, or use another method.",
        )
    if recipe.transfer.source_federation is not None:
        raise ConfigError(
            "train.fallback",
            "unset in a transfer",
            recipe.transfer.source_federation,
            message="train.fallback is not possible in a transfer, whose sites train on generated texts.",
            hint="Remove train.fallback.",
        )


def _check_init(recipe: Recipe, row: Method) -> None:
    if recipe.adapter.init == "spectral" and (row.A, row.B, row.core) != (Role.SHARED, Role.SHARED, Role.PERSONAL):
        raise ConfigError(
            "adapter.init",
            "kaiming, or a method with shared A and B and a core",
            f"spectral with method {recipe.method.name}",
            message=f'adapter.init = "spectral" needs shared A and B and a core, which {recipe.method.name!r} lacks.',
            hint='Use method.name = "colora", or adapter.init = "kaiming".',
        )
    adapter = recipe.adapter
    if adapter.init in ("gaussian", "orthogonal") and row.scale is not Role.ABSENT:
        message = f'adapter.init = "{adapter.init}" is not possible with the scales of {recipe.method.name!r}.'
        hint = 'Use adapter.init = "kaiming".'
        raise ConfigError("adapter.init", "kaiming", adapter.init, message=message, hint=hint)
    odd = [rank for rank in (adapter.rank, *(adapter.rank_pattern or {}).values()) if rank % 2]
    if adapter.init == "orthogonal" and odd:
        message = f'adapter.init = "orthogonal" needs even ranks, not {odd[0]}.'
        raise ConfigError("adapter.rank", "an even number", odd[0], message=message, hint="Use an even rank.")


def _check_sites(recipe: Recipe) -> None:
    partition = recipe.partition
    if not recipe.site and partition is None:
        message = "The recipe has no sites."
        hint = "Add [[site]] tables, or a [partition] that makes sites out of one data set."
        raise ConfigError("site", "[[site]] tables or a [partition]", "neither", message=message, hint=hint)
    if recipe.site and partition is not None:
        message = "The recipe has both [[site]] tables and a [partition]."
        raise ConfigError("partition", "[[site]] tables or [partition]", "both", message=message, hint="Remove one.")
    names = [site.name for site in recipe.site]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        message = f"Two sites are named {repeated!r}."
        raise ConfigError("site.name", "unique names", repr(repeated), message=message, hint="Rename one of them.")
    if partition and partition.by == "column" and not partition.column:
        message = 'partition.by = "column" needs partition.column.'
        raise ConfigError("partition.column", "a column name", "nothing", message=message)
    if partition and not recipe.data.source:
        raise missing_source(None)


def missing_source(site: str | None) -> ConfigError:
    """The error of a recipe that says nowhere where the rows of a site are."""
    return ConfigError(
        "data.source",
        "a file, asset or hub data set",
        "nothing",
        site=site,
        message="data.source is missing.",
        hint="Set it to a file, asset:NAME/PART or a hub data set, in [data] or at the site.",
    )


def _check_phases(recipe: Recipe, row: Method) -> None:
    train = recipe.train
    if (train.schedule == "phases") is not bool(train.phase):
        message = (
            'train.schedule = "phases" needs [[train.phase]] tables.'
            if train.schedule == "phases"
            else f'[[train.phase]] tables need train.schedule = "phases", not {train.schedule!r}.'
        )
        expected = '[[train.phase]] tables with train.schedule = "phases"'
        raise ConfigError("train.phase", expected, f"{len(train.phase)} tables", message=message)
    any_private = any(site.private and site.private.present for site in recipe.site)
    row = dataclasses.replace(row, private=Role.PERSONAL) if any_private else row
    trained = sorted(group for group in GROUPS if getattr(row, group) in (Role.SHARED, Role.PERSONAL))
    for phase in train.phase:
        if not set(trained).intersection(phase.groups):
            found = ", ".join(phase.groups) or "none"
            message = f"A phase trains none of its groups ({found})."
            hint = f"The method {recipe.method.name!r} trains {', '.join(trained)}."
            raise ConfigError("train.phase.groups", f"some of {', '.join(trained)}", found, message=message, hint=hint)
    shared = [group for group in train.final_groups or () if getattr(row, group) is not Role.PERSONAL]
    if shared:
        expected = f"personal groups of {recipe.method.name}"
        message = f"train.final_groups may name only {expected}, and {shared[0]} is not one."
        raise ConfigError("train.final_groups", expected, shared[0], message=message)
