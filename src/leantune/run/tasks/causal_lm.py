"""Causal language modelling: raw text, prompt–completion, alpaca and chat rows; prompts are masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from leantune.errors import UserError
from leantune.run.data import check_columns, find_column
from leantune.run.tasks.base import Prediction, check_texts, positions_of
from leantune.run.tasks.formats import ALPACA, Segment, find_format, prompt_ids, segments
from leantune.run.tasks.token_metrics import IGNORED, row_sums
from leantune.run.tasks.writing import MAX_NEW_TOKENS, Writing


class CausalLM(Writing):
    """Predict the next token: of every text, or of the answers alone."""

    name = "causal-lm"
    auto_class = AutoModelForCausalLM
    peft_task_type = "CAUSAL_LM"
    usual_form = "text"

    def _check(self, split: Dataset, where: str) -> str:
        named = {"text": self.data.text, "prompt": self.data.prompt, "completion": self.data.completion}
        check_columns(split, named, where)
        return find_format(self.data, split.column_names, where)

    def encode(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str
    ) -> Dataset:
        """Tokenise; `labels` are the input ids with prompts masked by -100."""
        form = self._check(split, where)
        options = {"batched": True, "with_indices": True, "remove_columns": split.column_names}
        if form == "text":
            column = self.data.text or find_column(split, ("text",), "text", where)
            encoded = split.map(
                self._raw(tokenizer, max_length, column, where), desc=f"tokenize {where}", **options
            )
        else:
            encoded = split.map(
                self._supervised(tokenizer, max_length, form, where), desc=f"tokenize {where}", **options
            )
        if len(encoded) == 0:
            raise UserError(
                f"{where}: no row has a token to learn from within data.max_length = {max_length}"
            )
        return encoded

    def _raw(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, column: str, where: str
    ) -> Callable[..., dict[str, Any]]:
        """Texts → each cut to `max_length`, or joined (an end token between) and cut into full sequences."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

        def features(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            texts = check_texts(rows[column], column, where, numbers[0])
            ids = [row + end for row in tokenizer(texts)["input_ids"]]
            if self.data.pack:
                joined = list(chain.from_iterable(ids))
                ids = [joined[start : start + max_length] for start in range(0, len(joined), max_length)]
            ids = [row[:max_length] for row in ids if len(row) > 1]
            return _features(ids, ids)

        return features

    def _supervised(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, form: str, where: str
    ) -> Callable[..., dict[str, Any]]:
        """Prompt and answer segments → ids, with labels on the answers alone."""

        def features(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            inputs, labels = [], []
            for position, number in enumerate(numbers):
                row = {column: values[position] for column, values in rows.items()}
                parts = segments(self.data, form, row, tokenizer, f"{where}, row {number}")
                ids, targets = _join(parts, max_length)
                if any(target != IGNORED for target in targets[1:]):
                    inputs.append(ids)
                    labels.append(targets)
            return _features(inputs, labels)

        return features

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """(batch, n, vocabulary) → (batch, 3): each row's summed loss, tokens counted, tokens right."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return row_sums(logits[:, :-1], labels[:, 1:])

    def read_input(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
        """The prompt; of raw text its first half."""
        if self.form == "text":
            text = row[self.data.text or "text"]
            return text[: len(text) // 2], None
        parts = segments(self.data, self.form, row, tokenizer, "the data")
        return "".join(part.text for part in parts[:-1]), None

    def as_input(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """An instruction in alpaca's words, or a user's turn in the chat template."""
        if self.form == "alpaca":
            return ALPACA.format(instruction=text)
        if self.form == "messages":
            turn = [{"role": "user", "content": text}]
            return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        return text

    def read_label(self, row: dict[str, Any]) -> str | None:
        """The completion; of raw text its second half."""
        if self.form == "text":
            text = row[self.data.text or "text"]
            return text[len(text) // 2 :]
        return segments(self.data, self.form, row, None, "the data")[-1].text

    @torch.no_grad()
    def predict(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Sequence[tuple[str, str | None]],
        max_length: int,
    ) -> Iterator[Prediction]:
        """Greedy continuation of each prompt, at most 128 new tokens."""
        model.eval()
        positions = positions_of(model)
        for text, _ in inputs:
            room = min(max_length, positions - 1)  # a token at least is written
            prompt = prompt_ids(tokenizer, text, special=self.form != "messages")[-room:]
            ids = torch.tensor([prompt], device=model.device)  # (1, n)
            generate = cast(Any, model).generate
            written = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(MAX_NEW_TOKENS, positions - len(prompt)),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )[0, len(prompt) :]
            yield Prediction(text, str(tokenizer.decode(written, skip_special_tokens=True)))


def _features(inputs: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
    return {"input_ids": inputs, "attention_mask": [[1] * len(row) for row in inputs], "labels": labels}


def _join(parts: list[Segment], max_length: int) -> tuple[list[int], list[int]]:
    """Segments → (ids, labels). Too long: the prompt's beginning goes first, then the answer's end."""
    ids = list(chain.from_iterable(part.ids for part in parts))
    labels = list(
        chain.from_iterable(part.ids if part.learned else [IGNORED] * len(part.ids) for part in parts)
    )
    first_learned = next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))
    cut = min(max(len(ids) - max_length, 0), max(first_learned - 1, 0))  # one prompt token predicts the first
    return ids[cut:][:max_length], labels[cut:][:max_length]
