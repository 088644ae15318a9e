"""Text generation from prompt and completion, or from chat messages. The loss is on the answer's tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..config.schema import DataSettings
from ..dataset import Row
from ..errors import DataError
from ..models.tokenizer import before_end
from .base import Batch, Encoded, Metrics, Prediction, Task, pad
from .columns import RawRow
from .conversations import parse_example, parse_input
from .exchange import ExchangeEncoder, Prompt, RowRefused, keep_head
from .words import WordTokenizer

MASKED = -100  # the label that Hugging Face models ignore in the loss


class Generation(Task):
    """Generates answers to prompts. Metrics: ``loss`` (per answer token), ``exact_match`` and ``rouge_l``."""

    @staticmethod
    def parse_row(raw: RawRow, data: DataSettings) -> Row | None:
        """``{"messages": [{"role", "content"}, …]}``, or ``{"prompt", "completion"}`` (see ``conversations.py``)."""
        return parse_example(raw, data)

    @staticmethod
    def parse_input(raw: RawRow, data: DataSettings) -> Row | None:
        """``{"prompt"}``, or the ``{"messages"}`` before the answer; None for a blank prompt."""
        return parse_input(raw, data)

    def _build(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        assert self.base.language_model is not None
        self.encoder = ExchangeEncoder(self.base.tokenizer, self.plan.model.source, self.base.ends)
        return self.base.language_model, {}

    @property
    def new_tokens(self) -> int:
        """Maximum length of a generated answer: ``max_new_tokens``, at most half of the model's positions."""
        positions, wanted = self.base.positions, self.plan.evaluation.max_new_tokens
        return min(wanted, max(1, positions // 2)) if positions else wanted

    @property
    def prompt_limit(self) -> int:
        """Maximum length of a prompt in tokens. An answer of ``new_tokens`` ends at the model's last position."""
        positions, limit = self.base.positions, max(1, self.plan.model.max_length - 1)
        return min(limit, max(1, positions - self.new_tokens)) if positions else limit

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Tokenize rows. A long prompt loses its middle; rows without an answer are dropped.

        Raises DataError where the chat template refuses every row.
        """
        examples, truncated, refused = [], 0, []
        for i, row in enumerate(rows):
            try:
                exchange, cut = self.encoder.exchange(row, self.plan.model.max_length, self.prompt_limit)
            except RowRefused as error:
                refused.append((i, str(error)))
                continue
            if exchange is not None:
                examples.append(exchange)
                truncated += cut
        if refused and len(refused) == len(rows):
            message = f"No conversation can be used: {refused[0][1]}."
            raise DataError(
                "messages",
                "conversations that the template accepts",
                refused[0][1],
                site=self.rows.site,
                message=message,
            )
        return Encoded(tuple(examples), truncated, len(rows) - len(examples), tuple(refused))

    def collate(self, examples: Sequence[Any]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels`` (n, longest); prompt and padding are masked."""
        labels = [[i if a else MASKED for i, a in zip(e.ids, e.answer, strict=True)] for e in examples]
        batch = {
            "input_ids": pad([e.ids for e in examples], self.base.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(e.ids) for e in examples], 0),
            "labels": pad(labels, MASKED),
        }
        return {key: value.to(self.base.device) for key, value in batch.items()}

    def made_up(self) -> tuple[Any, Any]:
        """Prompts and answers of one word and of several."""
        rows = [{"prompt": "a", "completion": "a"}, {"prompt": "a a a a", "completion": "a a a a"}]
        short, long = self.encode(rows).examples
        return short, long

    def outputs(self, batch: Batch) -> torch.Tensor:
        """The logits (n, longest, vocabulary)."""
        return self.module(**{key: value for key, value in batch.items() if key != "labels"}).logits

    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy per answer token. The first token of a text is never predicted."""
        module: Any = self.module
        labels = batch["labels"]
        loss = module.loss_function(
            logits=outputs, labels=labels, vocab_size=module.config.get_text_config().vocab_size
        )
        return loss, _terms(labels)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """The loss as the model computes it: some architectures add terms of their own."""
        return self.module(**batch).loss, _terms(batch["labels"])

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

        scorer = RougeScorer(["rougeL"], tokenizer=WordTokenizer())
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
        size, limit = self.plan.evaluation.batch_size, self.prompt_limit
        for start in range(0, len(rows), size):
            prompts = [self._prompt(row) for row in rows[start : start + size]]
            answers = self.answers([keep_head(prompt, limit) for prompt in prompts])
            for prompt, answer in zip(prompts, answers, strict=True):
                yield {"completion": answer, "truncated": len(prompt.ids) > limit}

    def _prompt(self, row: Row) -> Prompt:
        try:
            return self.encoder.prompt(row)
        except RowRefused as error:
            raise DataError("messages", "a conversation that the template accepts", str(error)) from None

    def answers(self, prompts: Sequence[list[int]]) -> list[str]:
        """Greedy continuations of tokenized prompts up to the token that ends an answer, as text."""
        texts: dict[int, str] = {}
        for chunk in self._chunks(prompts):
            out, length = self._generate([prompts[i] for i in chunk], max_new_tokens=self.new_tokens)
            for i, ids in zip(chunk, out.sequences[:, length:].tolist(), strict=True):
                texts[i] = self.base.tokenizer.decode(before_end(ids, self.base.ends), skip_special_tokens=True)
        return [texts[i] for i in range(len(prompts))]

    def _generate(self, prompts: Sequence[list[int]], **options: Any) -> tuple[Any, int]:
        """Greedy output for prompts that are padded on the left, and the length of the padded prompts."""
        padding = self.base.tokenizer.pad_token_id
        ids = pad(prompts, padding, left=True).to(self.base.device)
        mask = pad([[1] * len(p) for p in prompts], 0, left=True).to(self.base.device)
        options |= {"do_sample": False, "pad_token_id": padding, "return_dict_in_generate": True}
        return self.module.generate(input_ids=ids, attention_mask=mask, **options), ids.shape[1]  # type: ignore[operator]

    def _chunks(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Positions of the prompts of each batch; of equal lengths where the model does not see what is padding."""
        size, groups = self.plan.evaluation.batch_size, [list(range(len(prompts)))]
        if len(set(map(len, prompts))) > 1 and not self._reads_mask:
            groups = [[i for i, p in enumerate(prompts) if len(p) == n] for n in sorted(set(map(len, prompts)))]
        for group in groups:
            yield from (group[start : start + size] for start in range(0, len(group), size))

    @cached_property
    def _reads_mask(self) -> bool:
        """Whether padding leaves the next token's logits as they are. Some recurrent models ignore the mask."""
        token = next(i for i in range(len(self.base.tokenizer)) if i not in self.base.tokenizer.all_special_ids)
        options: dict[str, Any] = {"max_new_tokens": 1, "output_logits": True}
        alone, beside = (
            self._generate(prompts, **options)[0].logits[0][0].float()
            for prompts in ([[token]], [[token], [token] * 8])
        )
        return bool((alone - beside).abs().max() < 0.1 * alone.std())


def _terms(labels: torch.Tensor) -> int:
    """The number of answer tokens that are predicted."""
    return int((labels[:, 1:] != MASKED).sum())
