"""Read recipes and site files: TOML, overrides and inherited keys."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .diagnostics import at_named_site, did_you_mean
from .peft_spelling import in_own_words
from .rules import check_rules
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
    check_rules(recipe)
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
    paths = {key: str(folder / getattr(trainer, key)) for key in ("link", "state", "aggregation_key", "roster")}
    trainer = dataclasses.replace(trainer, listen=listen, **paths)
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
