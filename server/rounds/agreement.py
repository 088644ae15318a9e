"""What all sites of a federation must have in common, decided when they join: fingerprints, labels and weighting.

The recipe and the coordinator's own copy of the base model decide where they can. Only what neither says is decided by
the sites, by majority, and no site decides alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...common.config.schema import Recipe
from ...common.methods import SHARED
from ...common.protocol.types import SiteInfo, hash_labels
from .admission import PINNED

Pins = Mapping[str, str]


def agree_on_pins(recipe: Recipe, joined: Sequence[SiteInfo], own: Pins) -> dict[str, str]:
    """Return the fingerprints that every site must have, by field of ``SiteInfo``.

    ``own`` are those of the coordinator's copy of the base model. With a shared head, the labels' names and order are
    pinned as well.
    """
    stated: dict[str, str] = {**own, **dict(recipe.server.fingerprints or {})}
    fitting = [info for info in joined if all(getattr(info, key) == value for key, value in stated.items())]
    pins = {**most_common(fitting, PINNED), **stated}
    if recipe.row().head is SHARED:
        fitting = matching(fitting, pins)
        labels = recipe.data.labels
        pins |= {"labels": hash_labels(labels)} if labels else most_common(fitting, ("labels",))
    return pins


def matching(joined: Sequence[SiteInfo], pins: Pins) -> list[SiteInfo]:
    """Return the sites that have all of these pins."""
    return [info for info in joined if all(getattr(info, key) == value for key, value in pins.items())]


def most_common(infos: Sequence[SiteInfo], fields: Sequence[str]) -> dict[str, str]:
    """The values of ``fields`` that most sites have together; in a tie, those of the site first in the roster."""
    found = [tuple(getattr(info, field) for field in fields) for info in infos]
    return dict(zip(fields, max(found, key=found.count), strict=True)) if found else {}


def number_of_classes(recipe: Recipe, joined: Sequence[SiteInfo], pins: Pins) -> int:
    """The size of a shared head: that of the recipe's labels, else that of most sites that fit the pins."""
    if recipe.data.labels:
        return len(recipe.data.labels)
    counts = [info.classes for info in matching(joined, pins)]
    return max(counts, key=counts.count) if counts else 0


def has_mixed_tasks(recipe: Recipe, sites: Sequence[SiteInfo]) -> bool:
    """Whether the sites have different tasks, so that their numbers of loss terms cannot be compared.

    The tasks are those of the recipe if it describes most sites. Otherwise their own claims count.
    """
    if describes(recipe, sites):
        return len({declared_task(recipe, info.site) for info in sites}) > 1
    return len({info.task for info in sites}) > 1


def declared_task(recipe: Recipe, site: str) -> str:
    """The task that the recipe declares for a site: that of its ``[[site]]`` table, else ``data.task``."""
    return next((table.data.task for table in recipe.site if table.name == site), recipe.data.task)


def describes(recipe: Recipe, sites: Sequence[SiteInfo]) -> bool:
    """Whether more than half of the sites have the task that the recipe declares for them.

    Deployed sites take their task from their own site file, so a recipe need not describe them.
    """
    return 2 * sum(info.task == declared_task(recipe, info.site) for info in sites) > len(sites)


def agreed_tasks(recipe: Recipe, weights: str, sites: Sequence[SiteInfo], before: str = "") -> dict[str, str]:
    """The task that each site of the recipe must have, by name; empty if a reply does not weigh its loss terms.

    A generation example has up to ``model.max_length`` terms and any other has one, so with ``weights = "tokens"`` no
    site may choose its task alone. It is that of the recipe if this describes most sites, else ``before`` (that of the
    run before a restart), else that of most sites.
    """
    if weights != "tokens" or not sites:
        return {}
    names = {table.name for table in recipe.site} | {info.site for info in sites}
    if describes(recipe, sites):
        return {name: declared_task(recipe, name) for name in names}
    return dict.fromkeys(names, before or most_common(sites, ("task",))["task"])


def own_fingerprints(recipe: Recipe) -> dict[str, str]:
    """Return the fingerprints of the coordinator's copy of the base model; none of a copy without weights.

    Raises ModelError or AssetError if it has no copy at all.
    """
    from ...common.models.model_files import file_names, weight_files
    from ...common.models.sources import fingerprint, source_folder

    if recipe.model.source.startswith("synthetic:"):
        return {}
    folder = source_folder(recipe.model)
    if not weight_files(file_names(folder)):
        return {}
    own = fingerprint(folder)
    return {field: getattr(own, field) for field in PINNED}
