"""Reading recipes and site files: TOML, overrides, what sites inherit, and rules that span keys."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..methods import GROUPS, Method, Role
from .diagnostics import naming_the_site
from .schema import DataSettings, Recipe, SimulatedSiteSettings, parse
from .site_schema import SiteSettings


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe and applies ``key.path=value`` overrides (values in TOML, bare words as text).

    Raises ConfigError naming the key, the nearest known key, and what was expected and found.
    """
    return recipe_from(with_overrides(read_toml(path), overrides))


def with_base_model(recipe: Recipe, model: str) -> Recipe:
    """The recipe of the same federation on another base model, to which its sites transfer what they have.

    It has a name of its own, as a federation has one base model. Raises ConfigError for the model it has already.
    """
    if model == recipe.model.source:
        raise ConfigError("--transfer-to", "another base model", f"{model!r}, as in the recipe")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-._")[-30:].strip("-._")
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name[:30]}-on-{slug}",
        model=dataclasses.replace(recipe.model, source=model, revision=None),
        transfer=dataclasses.replace(recipe.transfer, source_federation=recipe.name),
        simulation=dataclasses.replace(recipe.simulation, baseline=False),
    )


def with_overrides(raw: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """Parsed settings with ``key.path=value`` overrides (values in TOML, bare words as text). Raises ConfigError."""
    for override in overrides:
        _apply(raw, override)
    return raw


def recipe_from(raw: dict[str, Any]) -> Recipe:
    """A recipe from a parsed TOML document; a ``[[site]]`` inherits what its own keys leave open from ``[data]``."""
    own = {f.name for f in dataclasses.fields(SimulatedSiteSettings)}
    sites = raw.get("site", [])
    if not isinstance(sites, list) or not all(isinstance(site, dict) for site in sites):
        raise ConfigError("site", "tables written [[site]]", sites)
    shared = _data_table(raw)
    merged = [
        {k: v for k, v in site.items() if k in own and k != "data"}
        | {"data": {**shared, **_data_table(site, site.get("name")), **{k: v for k, v in site.items() if k not in own}}}
        for site in sites
    ]
    try:
        recipe = parse(Recipe, {**raw, "site": merged})
    except ConfigError as error:
        raise naming_the_site(error, sites) from None
    _check(recipe)
    return recipe


def load_site(path: Path) -> SiteSettings:
    """Reads a site file; relative paths are made absolute."""
    site, folder = parse(SiteSettings, read_toml(path)), path.resolve().parent
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
    """The same settings with paths that exist below ``folder`` made absolute."""

    def resolve(source: str | None) -> str | None:
        return str((folder / source).resolve()) if source and (folder / source).is_file() else source

    return dataclasses.replace(data, source=resolve(data.source) or "", test_source=resolve(data.test_source))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain dictionaries. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), "a readable TOML file", error.strerror or error) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "valid TOML", error) from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("--set", "key.path=value", repr(override))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.strip().split(".")
    table = raw
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}", "a key inside a table", f"{parent}, which is no table")
    table[leaf] = value


def _data_table(owner: dict[str, Any], site: str | None = None) -> dict[str, Any]:
    data = owner.get("data", {})
    if not isinstance(data, dict):
        raise ConfigError("data", "a table", repr(data), site=site)
    return data


def _check(recipe: Recipe) -> None:
    """Rules that span keys."""
    row = recipe.row()
    _check_phases(recipe, row)
    if not recipe.site and recipe.partition is None:
        raise ConfigError("site", "[[site]] tables, or a [partition] that makes them", "neither")
    if recipe.site and recipe.partition is not None:
        raise ConfigError("partition", "either [[site]] tables or [partition]", "both")
    if recipe.train.head_init == "probe" and row.head is not Role.PERSONAL:
        raise ConfigError("train.head_init", "random (or none) where the head is not a site's own", "probe")
    names = [site.name for site in recipe.site]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError("site.name", "a name of its own for every site", f"{twice!r} twice")
    if recipe.partition and recipe.partition.by == "column" and not recipe.partition.column:
        raise ConfigError("partition.column", 'the column to split by, as partition.by is "column"', "nothing")
    for site in recipe.site:
        if not site.data.source:
            raise ConfigError("data.source", "a file, asset or data set", "nothing", site=site.name)
    if recipe.partition and not recipe.data.source:
        raise ConfigError("data.source", "a file, asset or data set", "nothing")
    if row.head is Role.SHARED and len({site.data.labels for site in recipe.site} or {recipe.data.labels}) > 1:
        raise ConfigError("method.head", "one list of labels at all sites for a shared head", "different lists")


def _check_phases(recipe: Recipe, row: Method) -> None:
    train = recipe.train
    if (train.schedule == "phases") is not bool(train.phase):
        found = "none" if train.schedule == "phases" else f'some with train.schedule = "{train.schedule}"'
        raise ConfigError("train.phase", '[[train.phase]] tables with train.schedule = "phases"', found)
    own = any(site.private and site.private.present for site in recipe.site)
    row = dataclasses.replace(row, private=Role.PERSONAL) if own else row
    trained = {group for group in GROUPS if getattr(row, group) in (Role.SHARED, Role.PERSONAL)}
    for phase in train.phase:
        if not trained.intersection(phase.groups):
            found = ", ".join(phase.groups) or "none"
            raise ConfigError("train.phase.groups", f"some of {', '.join(sorted(trained))}", found)
    foreign = [group for group in train.final_groups or () if getattr(row, group) is not Role.PERSONAL]
    if foreign:
        wanted = f"personal groups of {recipe.method.name}"
        raise ConfigError("train.final_groups", wanted, foreign[0])
