"""The sections about the setup: groups of sites, the recipe and the versions."""

from __future__ import annotations

import json
from typing import Any

import tomli_w

from .formats import number
from .history import History
from .markup import Html, details, element, table
from .placement import Placement

MAX_RECIPE = 40_000  # characters of a recipe
MAX_HEAT = 60  # sites in the table of cosines
SHADES = 5  # of its cells


def groups(history: History, place: Placement) -> Html | None:
    """The groups of sites with an adapter of their own, the tests that made them, and the cosines of first updates."""
    found = history.summary.groups
    if not found:
        return None
    parts: list[object] = []
    if len(found) == 1:
        parts.append(element("p", "The permutation test supports no division: all sites share one adapter."))
    else:
        words = "The first updates of the sites have different directions. Each group has a shared adapter of its own."
        items = [element("li", ", ".join(group)) for group in found]
        parts += [element("p", words), element("ol", *items)]
    tested = [_test_row(test) for test in history.tests]
    if tested:
        parts.append(table(["group", "other group", "p value"], tested, caption="Tests of a division into two groups"))
    sites = [site for group in found for site in group if site in history.cosines]
    if 1 < len(sites) <= MAX_HEAT:
        parts.append(details("Cosines between the first updates of two sites", _cosines(history, sites)))
    return place.section("groups", "Groups of sites", *parts)


def _test_row(test: dict[str, Any]) -> list[object]:
    names = [", ".join(group) for group in test["groups"]]
    return [*(element("td", name, class_="words") for name in names), number(test["p_value"])]


def _cosines(history: History, sites: list[str]) -> Html:
    body: list[list[object]] = []
    for site in sites:
        values = [history.cosines[site].get(other) or 0.0 for other in sites]
        shades = [min(SHADES, max(0, round(SHADES * value))) for value in values]
        cells = [element("td", f"{v:.2f}", class_=f"heat{s}") for v, s in zip(values, shades, strict=True)]
        body.append([site, *cells])
    return table(["site", *sites], body, caption="Cosines between first updates", class_="matrix")


def _as_toml(settings: dict[str, Any]) -> str:
    try:
        return tomli_w.dumps(settings)
    except (TypeError, ValueError):  # null, which only a damaged log has
        return json.dumps(settings, indent=1)


def recipe(history: History, place: Placement) -> Html:
    """The recipe as TOML, and the versions that the coordinator ran."""
    parts: list[object] = []
    if history.settings:
        text = _as_toml(history.settings)
        cut = len(text) > MAX_RECIPE
        code = [element("code", line) for line in text[:MAX_RECIPE].splitlines()]
        lines = Html("\n".join(code))
        parts.append(details("Recipe with all defaults", element("pre", lines, tabindex=0)))
        if cut:
            parts.append(element("p", "The rest of the recipe is in recipe.toml.", class_="note"))
    else:
        words = "The event log does not contain the recipe, because an older version of colora wrote it."
        parts.append(element("p", words, class_="note"))
    known = {"method": history.summary.method, "base model": history.summary.model}
    known |= {f"train.{name}": f"{rate:g}" for name, rate in history.summary.learning_rates.items()}
    known |= {"hash of the recipe": history.identity} if history.identity else {}
    body = [[name, element("td", value, class_="words")] for name, value in known.items()]
    parts.append(table(["setting", element("th", "value", scope="col", class_="words")], body, caption="Main settings"))
    if history.versions:
        owner = f"software of the {'site' if history.at_site else 'coordinator'}"
        body = [[name, element("td", version, class_="words")] for name, version in history.versions.items()]
        parts.append(
            table(
                [
                    owner,
                    element("th", "version", scope="col", class_="words"),
                ],
                body,
                caption="Versions",
            )
        )
    return place.section("setup", "Recipe and versions", *parts)
