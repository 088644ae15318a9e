"""How many positions a base model has."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..config.schema import ModelSettings
from ..errors import ConfigError

logger = logging.getLogger("colora.models")
TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions", "positions_embed")
SPARE = 2  # OPT and BART have two rows more than positions


def trained_positions(config: Any) -> int | None:
    """Return the number of positions in a configuration; None where the architecture has no such number."""
    number = getattr(config.get_text_config(), "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None


def learned_positions(model: nn.Module, config: Any) -> int | None:
    """Return the number of tokens that a model has learned positions for; None where positions are computed."""
    count = trained_positions(config)
    if count is None:
        return None
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or name.rpartition(".")[2] not in TABLES:
            continue
        if 0 <= module.num_embeddings - count <= SPARE:
            # Where the table has a row for padding, as in RoBERTa, positions begin after it.
            return count - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def check_max_length(settings: ModelSettings, model: nn.Module, config: Any) -> None:
    """Raise ConfigError where ``max_length`` is beyond the model's learned positions; warn of computed positions."""
    limit, trained, length = learned_positions(model, config), trained_positions(config), settings.max_length
    if limit is not None and length > limit:
        message = f"model.max_length is {length}, but {settings.source!r} has positions for {limit} tokens."
        hint = f"Set model.max_length to at most {limit}."
        raise ConfigError("model.max_length", f"at most {limit}", length, message=message, hint=hint)
    if limit is None and trained is not None and length > trained:
        told = "model.max_length is %d, but %s was trained with %d positions."
        logger.warning(told, length, settings.source, trained)
