"""Checks of a recipe that need the sites' rows or the structure of the base model."""

from __future__ import annotations

from collections.abc import Sequence

from ..client.data.unknown_tokens import tell_unknown
from ..client.training.smaller_rank import plan_at_rank
from ..client.training.validation_rows import require_validation_rows
from ..common.adapters.fit import check_fit
from ..common.adapters.initialization import head_layout, initial_shared_state
from ..common.config.privacy_rules import check_site_count
from ..common.config.schema import Recipe
from ..common.errors import ConfigError, QuorumError
from ..common.methods import SHARED
from ..common.models.architecture import skeleton
from ..common.models.synthetic import PREFIX
from ..common.models.tokenizer import load_tokenizer
from ..transfer.preparation import check_preparation
from .partition import SiteShare


def check_simulation(recipe: Recipe, sites: Sequence[SiteShare]) -> None:
    """Check everything that can be checked before the run folder is written.

    Raises QuorumError, ConfigError, or ModelError (no such base model, or the adapter does not fit it).
    """
    _check_quorum(recipe, sites)
    _check_from_round(recipe, sites)
    _check_ranks(recipe, sites)
    labels = {site.rows.labels for site in sites if site.rows.labels}
    if recipe.method.row().head is SHARED and len(labels) > 1:
        raise ConfigError(
            "method.head",
            "one list of labels at all sites for a shared head",
            "different lists",
            message="method.head is shared, but the sites have different lists of labels.",
            hint="Give all sites the same data.labels, or keep the head personal.",
        )
    if labels:
        head_layout(skeleton(recipe.model), 2)
    if recipe.server.validates:
        for site in (site for site in sites if site.rows.train):
            require_validation_rows(site.rows.validation, site.settings.name)
    privates = {recipe.private, *(site.settings.private for site in sites if site.settings.private)}
    check_fit(recipe.plan, {site.rows.task for site in sites}, privates)
    _tell_unknown_tokens(recipe, sites)
    initial_shared_state(recipe.plan, max(map(len, labels), default=0))
    if recipe.transfer.prepare:
        for site in sites:
            check_preparation(recipe.plan, site.rows)


def _check_ranks(recipe: Recipe, sites: Sequence[SiteShare]) -> None:
    """Check that each site can have the rank that it is limited to, as a deployed site does."""
    rank = recipe.adapter.rank
    for site in sites:
        name, limit = site.settings.name, site.settings.max_rank
        if limit is not None and plan_at_rank(recipe.plan, limit).adapter.rank > limit:
            message = f"With this recipe, the adapter of rank {rank} cannot have a rank of {limit} at site {name}."
            hint = "The guide on methods says what smaller ranks need. Or remove max_rank."
            raise ConfigError("max_rank", f"at least {rank}", limit, site=name, message=message, hint=hint)


def _tell_unknown_tokens(recipe: Recipe, sites: Sequence[SiteShare]) -> None:
    if recipe.model.source.startswith(PREFIX):
        return
    tokenizer = load_tokenizer(recipe.model)
    for site in sites:
        tell_unknown(site.rows, tokenizer, recipe.model.source)


def _check_quorum(recipe: Recipe, sites: Sequence[SiteShare]) -> None:
    quorum = recipe.server.quorum or 1
    starting = sum(site.settings.from_round == 1 for site in sites)
    sampled = max(1, round(recipe.server.fraction * starting)) if starting else 0
    if sampled < quorum:
        raise QuorumError(
            "server.quorum",
            f"at least {quorum} sites in round 1",
            sampled,
            message=f"server.quorum is {quorum}, but round 1 has only {sampled} of {len(sites)} sites.",
            hint="Lower server.quorum, raise server.fraction, or let more sites start in round 1.",
        )
    check_site_count(recipe.privacy, sampled)


def _check_from_round(recipe: Recipe, sites: Sequence[SiteShare]) -> None:
    last = recipe.rounds + 1  # the final personalization, which a site may join in
    for site in sites:
        first = site.settings.from_round
        if first > last:
            raise ConfigError(
                "from_round",
                f"at most {last}",
                first,
                site=site.settings.name,
                message=f"from_round is {first}, but the run ends after round {recipe.rounds}.",
                hint=f"Use a round of the run, or {last} to join for the final personalization.",
            )
    joins_last = next((site for site in sites if site.settings.from_round > recipe.rounds), None)
    if joins_last and not recipe.train.final_steps:
        name = joins_last.settings.name
        raise ConfigError(
            "train.final_steps",
            "at least 1",
            0,
            message=f"train.final_steps is 0, but site {name} joins after the last round and has no other steps.",
            hint="Set train.final_steps, or lower from_round of the site.",
        )
