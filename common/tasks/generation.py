"""Text generation from prompt and completion, or from chat messages. The loss is on the answer's tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config.schema import DataSettings
from ..dataset import Row
from ..errors import DataError
from .base import Batch, Encoded, Metrics, Prediction, Task, pad
from .columns import RawRow

MASKED = -100  # the label that Hugging Face models ignore in the loss


@dataclass(frozen=True)
class Exchange:
    """Token ids, which of them belong to the answer, and prompt and reference text for generated metrics."""

    ids: list[int]
    answer: list[bool]
    prompt: list[int]
    reference: str


class Generation(Task):
    """Generates answers to prompts. Metrics: ``loss`` (per answer token), ``exact_match`` and ``rouge_l``."""

    @staticmethod
    def parse_row(raw: RawRow, data: DataSettings) -> Row | None:
        """``{"messages": [{"role", "content"}, …]}``, or ``{"prompt", "completion"}``."""
        if data.messages:
            messages = raw.column(data.messages, "messages")
            if not isinstance(messages, list) or not all(_is_turn(turn) for turn in messages):
                raise raw.error("messages", "a list of {role, content}", type(messages).__name__)
            return {"messages": messages}
        prompt, completion = raw.text(data.prompt, "prompt"), raw.text(data.completion, "completion")
        if data.chat:
            turns = (("user", prompt), ("assistant", completion))
            return {"messages": [{"role": role, "content": content} for role, content in turns]}
        return {"prompt": prompt, "completion": completion}

    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        assert self.base.language_model is not None
        return self.base.language_model, {}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Tokenize rows. A prompt that is too long loses its beginning; rows without an answer are dropped."""
        examples, truncated, dropped = [], 0, 0
        for row in rows:
            exchange, cut = self._exchange(row)
            if exchange is None:
                dropped += 1
                continue
            examples.append(exchange)
            truncated += cut
        return Encoded(tuple(examples), truncated, dropped)

    def collate(self, examples: Sequence[Any]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels`` (n, longest); prompt and padding are masked."""
        labels = [[i if a else MASKED for i, a in zip(e.ids, e.answer, strict=True)] for e in examples]
        batch = {
            "input_ids": pad([e.ids for e in examples], self.base.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(e.ids) for e in examples], 0),
            "labels": pad(labels, MASKED),
        }
        return {key: value.to(self.base.device) for key, value in batch.items()}

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy per answer token. The first token of a text is never predicted."""
        terms = int((batch["labels"][:, 1:] != MASKED).sum())
        return self.module(**batch).loss, terms

    @torch.no_grad()
    def measure(self, *, generate: bool) -> Metrics:
        """Loss per answer token, and with ``generate`` also exact match and ROUGE-L of greedily generated answers."""
        self.module.eval()
        if not self.test.examples:
            return {}
        metrics = {"loss": self.mean_loss(self.test.examples)}
        return metrics | self._compare() if generate else metrics

    def _compare(self) -> Metrics:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        references = [e.reference for e in self.test.examples]
        answers = self.answers([e.prompt for e in self.test.examples])
        pairs = list(zip(references, answers, strict=True))
        rouge = [scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]
        self.row_scores = rouge
        exact = [reference.strip() == answer.strip() for reference, answer in pairs]
        return {"rouge_l": sum(rouge) / len(rouge), "exact_match": sum(exact) / len(exact)}

    @torch.no_grad()
    def predict(self, rows: Sequence[Row]) -> Iterator[Prediction]:
        """Generate greedy completions of at most ``evaluation.max_new_tokens`` tokens."""
        self.module.eval()
        size, limit = self.plan.evaluation.batch_size, max(1, self.plan.model.max_length - 1)
        for start in range(0, len(rows), size):
            prompts = [self._prompt(row) for row in rows[start : start + size]]
            answers = self.answers([prompt[-limit:] for prompt in prompts])
            for prompt, answer in zip(prompts, answers, strict=True):
                yield {"completion": answer, "truncated": len(prompt) > limit}

    def _prompt(self, row: Row) -> list[int]:
        tokenizer = self.base.tokenizer
        if "messages" in row:
            return tokenizer(self._render(row["messages"], True), add_special_tokens=False)["input_ids"]
        return tokenizer(row["prompt"])["input_ids"] or [tokenizer.eos_token_id]

    def answers(self, prompts: Sequence[list[int]]) -> list[str]:
        """Greedy continuations of tokenized prompts, as text."""
        tokenizer, settings, texts = self.base.tokenizer, self.plan.evaluation, []
        for start in range(0, len(prompts), settings.batch_size):
            chunk = prompts[start : start + settings.batch_size]
            ids = pad(chunk, tokenizer.pad_token_id, left=True).to(self.base.device)
            mask = pad([[1] * len(p) for p in chunk], 0, left=True).to(self.base.device)
            out = self.module.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return texts

    def _exchange(self, row: Row) -> tuple[Exchange | None, bool]:
        pieces = self._chat_pieces(row["messages"]) if "messages" in row else self._plain_pieces(row)
        if not any(ids for ids, is_answer in pieces if is_answer):
            return None, False
        ids = [i for piece, _ in pieces for i in piece]
        answer = [is_answer for piece, is_answer in pieces for _ in piece]
        *before, (last, _) = pieces
        prompt, limit = [i for piece, _ in before for i in piece], self.plan.model.max_length
        reference = self.base.tokenizer.decode(last, skip_special_tokens=True)
        cut = len(ids) > limit
        if cut and len(last) < limit:
            ids, answer = ids[-limit:], answer[-limit:]
        elif cut:  # the answer alone is too long: keep its beginning after one token of the prompt
            ids, answer = (
                (prompt[-1:] + last)[:limit],
                ([False] * len(prompt[-1:]) + [True] * len(last))[:limit],
            )
        return Exchange(ids, answer, prompt[-max(1, limit - 1) :], reference), cut

    def _plain_pieces(self, row: Row) -> list[tuple[list[int], bool]]:
        if not row["completion"].strip():
            return []
        tokenizer = self.base.tokenizer
        prompt = self._prompt({"prompt": row["prompt"]})
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        return [(prompt, False), ([*completion, tokenizer.eos_token_id], True)]

    def _chat_pieces(self, messages: Sequence[dict[str, str]]) -> list[tuple[list[int], bool]]:
        """Every assistant turn is an answer. Turns after the last one are left out."""
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        turns = [i for i, m in enumerate(messages[: last + 1]) if m["role"] == "assistant" and m["content"].strip()]
        pieces: list[tuple[str, bool]] = []
        written = ""
        for i in turns:
            before, after = (
                self._render(messages[:i], True),
                self._render(messages[: i + 1], False).rstrip("\n"),
            )
            if not (before.startswith(written) and after.startswith(before)):
                raise DataError(
                    "chat template",
                    "a conversation to be a prefix of its continuation",
                    "another text",
                    message="The chat template renders a conversation differently once it continues.",
                    hint="Use a base model whose chat template renders earlier turns the same way.",
                )
            pieces += [(before[len(written) :], False), (after[len(before) :], True)]
            written = after
        tokenizer = self.base.tokenizer
        return [(tokenizer(text, add_special_tokens=False)["input_ids"], answer) for text, answer in pieces]

    def _render(self, messages: Sequence[dict[str, str]], open_turn: bool) -> str:
        if not self.base.tokenizer.chat_template:
            raise DataError(
                "messages",
                "a base model with a chat template",
                self.plan.model.source,
                message=f"The rows have chat messages, but {self.plan.model.source} has no chat template.",
                hint="Use prompt and completion, or a base model with a chat template.",
            )
        return self.base.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_turn)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
