"""Read recipes and site files: TOML, overrides, inherited keys, and rules that span keys."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from ..dataset import TASKS
from ..errors import ConfigError
from ..methods import GROUPS, Method, Role
from .diagnostics import at_named_site, did_you_mean
from .peft_spelling import in_own_words
from .schema import DataSettings, Recipe, SimulatedSiteSettings, parse
from .site_schema import SiteSettings


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides (values in TOML, bare words as text).

    Raises ConfigError that names the wrong key and the nearest known one.
    """
    return recipe_from(with_overrides(read_toml(path), overrides))


def with_base_model(recipe: Recipe, model: str) -> Recipe:
    """Return the recipe of a transfer to another base model.

    It has a new name, since a federation has one base model. Raises ConfigError if ``model`` is the current one.
    """
    if model == recipe.model.source:
        raise ConfigError(
            "--transfer-to",
            "another base model",
            repr(model),
            message=f"The recipe already uses the base model {model!r}.",
            hint="Name another base model in --transfer-to.",
        )
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-._")[-30:].strip("-._")
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name[:30]}-on-{slug}",
        model=dataclasses.replace(recipe.model, source=model, revision=None),
        transfer=dataclasses.replace(recipe.transfer, source_federation=recipe.name),
        simulation=dataclasses.replace(recipe.simulation, baseline=False),
    )


def with_overrides(raw: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """Apply ``key.path=value`` overrides to parsed settings, in place, and return them. Raises ConfigError."""
    for override in overrides:
        _apply(raw, override)
    return raw


def recipe_from(raw: dict[str, Any]) -> Recipe:
    """Build a recipe from a parsed TOML document. A ``[[site]]`` inherits from ``[data]`` what it does not set."""
    own = {f.name for f in dataclasses.fields(SimulatedSiteSettings)}
    sites = raw.get("site", [])
    if not isinstance(sites, list) or not all(isinstance(site, dict) for site in sites):
        message = f"site must be a list of [[site]] tables, not {sites!r}."
        raise ConfigError("site", "tables written [[site]]", sites, message=message)
    raw = _in_own_words(raw)
    sites = [{**site, **_private_in_own_words(site)} for site in sites]
    shared = _data_table(raw)
    merged = [
        {k: v for k, v in site.items() if k in own and k != "data"}
        | {"data": {**shared, **_data_table(site, site.get("name")), **{k: v for k, v in site.items() if k not in own}}}
        for site in sites
    ]
    try:
        recipe = parse(Recipe, {**raw, "site": merged})
    except ConfigError as error:
        raise at_named_site(error, sites) from None
    _check(recipe)
    return recipe


def load_site(path: Path) -> SiteSettings:
    """Read a site file and make its relative paths absolute. Raises ConfigError."""
    raw = read_toml(path)
    site, folder = parse(SiteSettings, {**raw, **_private_in_own_words(raw)}), path.resolve().parent
    coordinator, trainer = site.coordinator, site.trainer
    if coordinator:
        coordinator = dataclasses.replace(
            coordinator, ca=str(folder / coordinator.ca), key=str(folder / coordinator.key)
        )
    scheme, colon, place = trainer.listen.partition("unix:")
    listen = f"unix:{folder / place}" if colon and not scheme else trainer.listen
    trainer = dataclasses.replace(
        trainer, listen=listen, link=str(folder / trainer.link), state=str(folder / trainer.state)
    )
    data = resolve_paths(site.data, folder)
    return dataclasses.replace(site, data=data, coordinator=coordinator, trainer=trainer)


def resolve_paths(data: DataSettings, folder: Path) -> DataSettings:
    """Make sources that are files or folders below ``folder`` absolute."""

    def resolve(source: str | None) -> str | None:
        if not source:
            return source
        name, colon, split = source.rpartition(":")  # FOLDER:SPLIT
        if colon and (folder / name).is_dir():
            return f"{(folder / name).resolve()}:{split}"
        return str((folder / source).resolve()) if (folder / source).exists() else source

    return dataclasses.replace(data, source=resolve(data.source) or "", test_source=resolve(data.test_source))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as plain dictionaries. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"The file {path} cannot be read: {reason}."
        raise ConfigError(str(path), "a readable TOML file", reason, message=message) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "valid TOML", error, message=f"{path} is not valid TOML: {error}.") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        message = f"--set needs key.path=value, not {override!r}."
        raise ConfigError("--set", "key.path=value", repr(override), message=message)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table, (*parents, leaf) = _table_to_set(raw, key.strip())
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            message = f"--set {key} is not possible, since {parent} is not a table."
            raise ConfigError(f"--set {key}", "a key inside a table", f"{parent} is not a table", message=message)
    table[leaf] = value


def _table_to_set(raw: dict[str, Any], key: str) -> tuple[dict[str, Any], list[str]]:
    """Return the table that an override's key starts at, and the rest of the key: ``site.NAME.`` is a site's table."""
    first, _, rest = key.partition(".")
    if first != "site" or not rest:
        return raw, key.split(".")
    sites = raw.get("site")
    tables = {site["name"]: site for site in sites if "name" in site} if isinstance(sites, list) else {}
    for name in sorted(tables, key=len, reverse=True):  # names may have dots
        if rest.startswith(f"{name}."):
            return tables[name], rest.removeprefix(f"{name}.").split(".")
    if rest in tables:
        message, hint = f"--set {key} names no key of the site.", f"Write for example --set {key}.train=16."
        raise ConfigError(f"--set {key}", "site.NAME.KEY", "no key", message=message, hint=hint)
    wanted = rest.partition(".")[0]
    names = f"The sites are {', '.join(tables)}." if tables else "The recipe has no [[site]] tables."
    raise ConfigError(
        f"--set {key}",
        "site.NAME.KEY",
        repr(wanted),
        message=f"--set {key}: there is no site {wanted!r}.",
        hint=f"{did_you_mean(wanted, tables)}{names}",
    )


def _in_own_words(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with colora's names for PEFT's keys. Raises ConfigError for a key with both names."""
    adapter = {"adapter": in_own_words(raw["adapter"], "adapter")} if "adapter" in raw else {}
    return {**raw, **adapter, **_private_in_own_words(raw)}


def _private_in_own_words(table: dict[str, Any]) -> dict[str, Any]:
    return {"private": in_own_words(table["private"], "private")} if "private" in table else {}


def _data_table(owner: dict[str, Any], site: str | None = None) -> dict[str, Any]:
    data = owner.get("data", {})
    if not isinstance(data, dict):
        hint = f'Write data.source = "{data}", or a table [data].' if isinstance(data, str) else None
        message = f"data must be a table, not {data!r}."
        raise ConfigError("data", "a table", repr(data), site=site, message=message, hint=hint)
    return data


def _check(recipe: Recipe) -> None:
    """Check rules that span keys. Raises ConfigError."""
    row = recipe.row()
    _check_phases(recipe, row)
    _check_sites(recipe)
    if recipe.adapter.init == "spectral" and (row.A, row.B, row.core) != (Role.SHARED, Role.SHARED, Role.PERSONAL):
        raise ConfigError(
            "adapter.init",
            "kaiming, or a method with shared A and B and a core",
            f"spectral with method {recipe.method.name}",
            message=f'adapter.init = "spectral" needs shared A and B and a core, which {recipe.method.name!r} lacks.',
            hint='Use method.name = "colora", or adapter.init = "kaiming".',
        )
    _check_orthogonal(recipe, row)
    if recipe.server.groups != "none" and recipe.adapter.init == "spectral":
        raise ConfigError(
            "server.groups",
            'none with adapter.init = "spectral"',
            recipe.server.groups,
            message=f'server.groups = "{recipe.server.groups}" cannot compare updates that begin with cores of zero.',
            hint='Use adapter.init = "kaiming", or server.weights = "benefit" instead of groups.',
        )
    if recipe.server.groups != "none" and not recipe.row().shares:
        raise ConfigError(
            "server.groups",
            "none, or a method that shares parameters",
            f"{recipe.server.groups} with method {recipe.method.name}",
            message=f"server.groups needs shared parameters, which method {recipe.method.name!r} lacks.",
            hint="Use another method, or remove server.groups.",
        )
    if recipe.train.warmup_steps and recipe.train.warmup_ratio:
        message = "The recipe sets both train.warmup_steps and train.warmup_ratio."
        raise ConfigError("train.warmup_ratio", "one of the two", "both", message=message, hint="Remove one of them.")
    _check_label_loss(recipe)
    _check_fallback(recipe, row)
    if recipe.train.head_init == "probe" and row.head is not Role.PERSONAL:
        raise ConfigError(
            "train.head_init",
            "random or unset",
            "probe",
            message='train.head_init = "probe" needs personal heads, but the head is shared.',
            hint="Remove train.head_init or method.head.",
        )
    if row.head is Role.SHARED and len({site.data.labels for site in recipe.site} or {recipe.data.labels}) > 1:
        raise ConfigError(
            "method.head",
            "one list of labels at all sites",
            "different lists",
            message="A shared head needs one list of labels, but the sites have different ones.",
            hint="Set data.labels for all sites, or leave the head personal.",
        )


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


def _check_orthogonal(recipe: Recipe, row: Method) -> None:
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
    missing = [site.name for site in recipe.site if not site.data.source]
    if missing or (partition and not recipe.data.source):
        raise ConfigError(
            "data.source",
            "a file, asset or hub data set",
            "nothing",
            site=missing[0] if missing else None,
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
