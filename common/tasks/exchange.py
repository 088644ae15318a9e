"""Prompts and answers as token ids: a chat template's texts, the boundary of an answer, and what a cut keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..dataset import Row
from ..errors import DataError
from ..models.tokenizer import before_end
from .conversations import Turn

Piece = tuple[str, bool]  # a part of a text, and whether it belongs to an answer
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError)
ANOTHER_TEXT = "the chat template writes the answer in another form than its content"


class RowRefused(Exception):
    """A row that the chat template does not accept. The text is the reason."""


@dataclass(frozen=True)
class Exchange:
    """Token ids, which of them belong to the answer, and prompt and reference text for generated metrics."""

    ids: list[int]
    answer: list[bool]
    prompt: list[int]
    reference: str


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt. A cut keeps the first ``head`` of them: the first token of the text, or a system turn."""

    ids: list[int]
    head: int


class ExchangeEncoder:
    """Encodes rows of prompt and completion, or of messages, with the tokenizer of the base model ``source``.

    Every answer ends with one of the tokens ``ends``: the one that the chat template writes, or otherwise the
    tokenizer's.
    """

    def __init__(self, tokenizer: Any, source: str, ends: Sequence[int] = ()) -> None:
        self.tokenizer, self.source, self.ends = tokenizer, source, ends

    def exchange(self, row: Row, limit: int, prompt_limit: int) -> tuple[Exchange | None, bool]:
        """Return a row as at most ``limit`` tokens, its prompt as at most ``prompt_limit``, and whether it was cut.

        None for a row without an answer. A long prompt loses what follows its head; an answer that alone is too long
        loses its end. Raises RowRefused for messages that the chat template does not accept.
        """
        pieces, ends = self._chat_pieces(row) if "messages" in row else self._plain_pieces(row)
        encoded = self._encoded(pieces, special="messages" not in row)
        if not any(ids for ids, is_answer in encoded if is_answer):
            return None, False
        *before, (last, _) = encoded
        reference = self.tokenizer.decode(before_end(last, self.ends), skip_special_tokens=True)
        if not (ends and last and last[-1] in self.ends) and self.tokenizer.eos_token_id is not None:
            last = [*last, self.tokenizer.eos_token_id]
        prompt = Prompt([i for ids, _ in before for i in ids], self._head(row, before[0][0]))
        mask = [is_answer for ids, is_answer in before for _ in ids]
        ids, answer = _cut(prompt, mask, last, limit)
        cut = len(prompt.ids) + len(last) > limit
        return Exchange(ids, answer, keep_head(prompt, prompt_limit), reference), cut

    def prompt(self, row: Row) -> Prompt:
        """Return the tokens that an answer to the row follows. Raises RowRefused."""
        if "messages" in row:
            ids = self._tokens(self._rendered(self._accepted(row), row, True), special=False)
        else:
            ids = self._tokens(row["prompt"], special=True) or [self.tokenizer.eos_token_id]
        return Prompt(ids, self._head(row, ids))

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        """Token ids, with ``special`` those that begin a text but not those that end it."""
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        ends = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id} - {None}
        if special and ids and ids[-1] in ends and ids[-1] in self.tokenizer("")["input_ids"]:
            return ids[:-1]
        return ids

    def _encoded(self, pieces: Sequence[Piece], *, special: bool) -> list[tuple[list[int], bool]]:
        """The pieces' tokens, as they are in the whole text where a piece begins with a token of its own."""
        written, text = [], ""
        encoded: list[tuple[list[int], bool]] = []
        for piece, is_answer in pieces:
            text += piece
            whole = self._tokens(text, special=special) or [self.tokenizer.eos_token_id]
            begins = whole[: len(written)] == written
            ids = whole[len(written) :] if begins else self._tokens_inside(piece)
            encoded.append((ids, is_answer))
            written += ids
        return encoded

    def _tokens_inside(self, piece: str) -> list[int]:
        """Tokens of a piece inside a text: without the space that some tokenizers put before every text."""
        before, whole = (self._tokens(text, special=False) for text in ("\n", f"\n{piece}"))
        return whole[len(before) :] if before and whole[: len(before)] == before else self._tokens(piece, special=False)

    def _head(self, row: Row, ids: Sequence[int]) -> int:
        """The number of tokens at the start of a prompt that a cut keeps."""
        first = int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)
        if "messages" not in row or row["messages"][0]["role"] != "system":
            return first
        try:
            system = self._tokens(self._rendered(row["messages"][:1], row, False), special=False)
        except RowRefused:
            return first
        return len(system) if list(ids[: len(system)]) == system else first

    def _plain_pieces(self, row: Row) -> tuple[list[Piece], bool]:
        if not row["completion"].strip():
            return [], False
        return [(row["prompt"], False), (row["completion"], True)], False

    def _chat_pieces(self, row: Row) -> tuple[list[Piece], bool]:
        """Pieces in which every assistant turn after a first turn of the user is an answer, and whether they end.

        Turns after the last answer are left out. Where the template writes earlier turns in another form once the
        conversation continues, as some do with thoughts, only the last answer is learned.
        """
        messages = self._accepted(row)
        last = max((i for i, turn in enumerate(messages) if _is_answer(turn)), default=-1)
        asked = next((i for i, turn in enumerate(messages) if turn["role"] not in ("system", "assistant")), last + 1)
        answers = [i for i in range(asked, last + 1) if _is_answer(messages[i])]
        if not answers:
            return [], False
        spans = {}
        for i in answers:
            try:
                spans[i] = self._answer(messages, row, i)
            except RowRefused:
                if i == last:
                    raise
        pieces, written = [], ""
        for before, answer in spans.values():
            if len(spans) < len(answers) or not before.startswith(written):
                pieces = [(spans[last][0], False), (spans[last][1], True)]
                break
            pieces += [(before[len(written) :], False), (answer, True)]
            written = before + answer
        content = messages[last]["content"].strip()
        return pieces, not content or not pieces[-1][0].rstrip().endswith(content)

    def _answer(self, messages: Sequence[Turn], row: Row, i: int) -> tuple[str, str]:
        """The text before the answer in turn ``i``, as a generated answer follows it, and the answer with its end."""
        before = self._rendered(messages[:i], row, True)
        after = self._rendered(messages[: i + 1], row, False).rstrip("\n")
        if after.startswith(before):
            return before, after[len(before) :]
        content = messages[i]["content"].strip()  # the template opens an answer in another form than it writes one
        start = after.rfind(content) if content else -1
        if start < 0:
            raise RowRefused(ANOTHER_TEXT)
        return before, after[start:]

    def _accepted(self, row: Row) -> list[Turn]:
        """The messages in the first form that the template accepts. Raises RowRefused where it accepts none."""
        reason: RowRefused | None = None
        for messages in _forms(row["messages"]):
            try:
                self._rendered(messages, row, False)
            except RowRefused as refused:
                reason = reason or refused
            else:
                return messages
        raise reason or RowRefused("the row has no messages")

    def _rendered(self, messages: Sequence[Turn], row: Row, open_turn: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "messages",
                "a base model with a chat template",
                self.source,
                message=f"The rows have chat messages, but {self.source} has no chat template.",
                hint="Use prompt and completion, or a base model with a chat template.",
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=row.get("tools"), tokenize=False, add_generation_prompt=open_turn
            )
        except TEMPLATE_ERRORS as error:
            raise RowRefused(f"the chat template does not accept the conversation ({error})") from None


def keep_head(prompt: Prompt, limit: int) -> list[int]:
    """At most ``limit`` (≥ 1) tokens of a prompt: its head, and its end."""
    return [prompt.ids[i] for i in _kept(prompt, limit)]


def _kept(prompt: Prompt, limit: int) -> list[int]:
    """Positions of the tokens that a cut to ``limit`` keeps: all of the head, or its first token, and the end."""
    count = len(prompt.ids)
    if count <= limit:
        return list(range(count))
    head = prompt.head if prompt.head < limit else min(prompt.head, 1, limit - 1)
    return [*range(head), *range(count - limit + head, count)]


def _cut(prompt: Prompt, mask: Sequence[bool], last: Sequence[int], limit: int) -> tuple[list[int], list[bool]]:
    """At most ``limit`` tokens of prompt and last answer, and which of them belong to an answer.

    An answer that fills ``limit`` alone keeps its beginning, after the token before it and the first of the text.
    """
    shortest = 2 if prompt.head and limit > 2 else 1
    kept = _kept(prompt, max(limit - len(last), shortest))
    ids, answer = [prompt.ids[i] for i in kept], [mask[i] for i in kept]
    return [*ids, *last][:limit], [*answer, *[True] * len(last)][:limit]


def _is_answer(turn: Turn) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))


def _forms(messages: Sequence[Turn]) -> Iterator[list[Turn]]:
    """The messages as they are; with the system message at the start of the user's; without leading answers."""
    yield list(messages)
    system = [turn for turn in messages[:1] if turn["role"] == "system"]
    rest = list(messages[len(system) :])
    first = next((i for i, turn in enumerate(rest) if turn["role"] == "user"), None)
    if first is None:
        return
    merged = [dict(turn) for turn in rest]
    if system:
        merged[first]["content"] = f"{system[0]['content']}\n\n{merged[first]['content']}"
        yield merged
    if first:
        yield [*system, *rest[first:]]
        yield merged[first:]
