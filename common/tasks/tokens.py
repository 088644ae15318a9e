"""Token ids of the texts of a classification task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..dataset import Row
from ..errors import ModelError

CHUNK = 1000  # rows tokenized at a time; what a tokenizer keeps of a text is many times larger than its ids


class Tokens(list[int]):
    """Token ids of a text, with their ``types`` for pairs of texts, and whether the text was ``truncated``."""

    def __init__(self, ids: Sequence[int], truncated: bool = False, types: Sequence[int] = ()) -> None:
        super().__init__(ids)
        self.truncated, self.types = truncated, types


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizes texts or pairs of texts, cut to ``limit`` tokens. A pair loses the end of its longer text.

    ``end`` is the token at which the classifier reads a text, as those of encoder-decoders do; None for others, which
    read the first token, the last one or all of them.
    """

    tokenizer: Any
    limit: int
    end: int | None = None

    def __call__(self, rows: Sequence[Row]) -> list[Tokens]:
        """Return the token ids of each row, in order."""
        paired = any("text_pair" in row for row in rows)
        chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        tokens = [each for chunk in chunks for each in self._chunk(chunk, paired=paired)]
        if self.end is None or not tokens:
            return tokens
        ends = self.ends(paired=paired)
        return [self._without_surplus(each, ends) for each in tokens]

    def _chunk(self, rows: Sequence[Row], *, paired: bool) -> list[Tokens]:
        texts = [row["text"] for row in rows]
        pairs = [row.get("text_pair", "") for row in rows] if paired else None
        cut = self.tokenizer(texts, pairs, truncation=True, max_length=self.limit)
        types = cut.get("token_type_ids") if paired else None
        if cut.encodings:
            truncated = [bool(encoding.overflowing) for encoding in cut.encodings]
        else:  # a tokenizer in Python does not say what it left out
            truncated = [len(ids) > self.limit for ids in self.tokenizer(texts, pairs, verbose=False)["input_ids"]]
        return [Tokens(*each) for each in zip(cut["input_ids"], truncated, types or [()] * len(rows), strict=True)]

    def ends(self, *, paired: bool = False) -> int:
        """The number of end tokens that the tokenizer adds to a text or a pair."""
        return self.tokenizer("a", "a" if paired else None)["input_ids"].count(self.end)

    def check_end(self, family: str) -> None:
        """Raise ModelError if the tokenizer does not add the token at which the classifier reads a text."""
        if self.end is None or self.ends():
            return
        token = self.tokenizer.convert_ids_to_tokens(self.end)
        message = f"Classifiers of the family {family} read a text at {token}, which the tokenizer does not add."
        hint = "Choose a base model whose tokenizer appends its end token to every text."
        raise ModelError("model.source", "a tokenizer that appends the end token", token, message=message, hint=hint)

    def _without_surplus(self, tokens: Tokens, ends: int) -> Tokens:
        """Leave out end tokens that a text has of itself, since the classifier needs as many in each text."""
        surplus = tokens.count(self.end) - ends  # type: ignore[arg-type]
        if surplus <= 0:
            return tokens
        out = [i for i, token in enumerate(tokens) if token == self.end][:surplus]
        types = [kind for i, kind in enumerate(tokens.types) if i not in out]
        return Tokens([token for i, token in enumerate(tokens) if i not in out], tokens.truncated, types)
