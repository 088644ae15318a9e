"""Tokens of a site's rows that the tokenizer does not know, and which all look the same to the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from ...common.dataset import Row, SiteDataset

logger = logging.getLogger("colora.data")
NOTED_UNKNOWN = 0.03  # share of unknown tokens from which a site is told
SAMPLE = 500  # rows that are looked at


def unknown_share(rows: SiteDataset, tokenizer: Any) -> float:
    """Return the share of unknown tokens in the texts of the first rows; 0 without texts or an unknown token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    texts = [text for row in [*rows.train, *rows.test][:SAMPLE] for text in _texts(row) if text.strip()]
    if unknown is None or not texts:
        return 0.0
    ids = [i for each in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for i in each]
    return ids.count(unknown) / len(ids) if ids else 0.0


def tell_unknown(rows: SiteDataset, tokenizer: Any, source: str) -> None:
    """Log a warning where more than a few tokens of a site's rows are unknown to the tokenizer."""
    share = unknown_share(rows, tokenizer)
    if share > NOTED_UNKNOWN:
        told = "site %s: %.0f %% of the tokens of its rows are unknown to the tokenizer of %s"
        logger.warning(told, rows.site, 100 * share, source)


def _texts(row: Row) -> Iterator[str]:
    for key in ("text", "text_pair", "prompt", "completion"):
        if isinstance(row.get(key), str):
            yield row[key]
    yield from (turn["content"] for turn in row.get("messages", ()))
