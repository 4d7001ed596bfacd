"""Sequence to sequence: an encoder reads the prompt, a decoder writes the answer (T5, BART and the like)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from leantune.errors import UserError
from leantune.run.data import check_columns
from leantune.run.tasks.base import Prediction, positions_of
from leantune.run.tasks.formats import ALPACA, find_format, segments
from leantune.run.tasks.token_metrics import row_sums
from leantune.run.tasks.writing import MAX_NEW_TOKENS, Writing

PREDICT_BATCH = 16
FORMATS = ("prompt-completion", "alpaca")


class Seq2Seq(Writing):
    """Write the answer to a prompt: summaries, translations, answers to questions."""

    name = "seq2seq"
    auto_class = AutoModelForSeq2SeqLM
    peft_task_type = "SEQ_2_SEQ_LM"
    # BART, T5 and their kind take the mean over the batch at hand, whatever the other micro-batches hold.
    head_averages = True
    usual_form = "prompt-completion"

    def _check(self, split: Dataset, where: str) -> str:
        check_columns(split, {"prompt": self.data.prompt, "completion": self.data.completion}, where)
        form = find_format(self.data, split.column_names, where)
        if form not in FORMATS:
            raise UserError(
                f"data.format = {form!r}: seq2seq wants what is read and what is written apart "
                f"(accepted: {', '.join(FORMATS)}; or name data.prompt and data.completion)"
            )
        return form

    def encode(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str
    ) -> Dataset:
        """Prompts → `input_ids`, answers → `labels`, each with the tokenizer's own end and cut at it."""
        form = self._check(split, where)

        def features(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            prompts, answers = [], []
            for position, number in enumerate(numbers):
                row = {column: values[position] for column, values in rows.items()}
                prompt, answer = segments(self.data, form, row, None, f"{where}, row {number}")
                prompts.append(prompt.text)
                answers.append(answer.text)
            encoded = dict(tokenizer(prompts, truncation=True, max_length=max_length))
            written = tokenizer(text_target=answers, truncation=True, max_length=max_length)
            return encoded | {"labels": written["input_ids"]}

        return split.map(
            features,
            batched=True,
            with_indices=True,
            remove_columns=split.column_names,
            desc=f"tokenize {where}",
        )

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """(batch, n, vocabulary) → (batch, 3): each row's summed loss, tokens counted, tokens right."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return row_sums(logits, labels)

    def read_input(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
        """What the encoder reads."""
        return segments(self.data, self.form, row, None, "the data")[0].text, None

    def as_input(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """An instruction in alpaca's words, if the model was trained on those."""
        return ALPACA.format(instruction=text) if self.form == "alpaca" else text

    def read_label(self, row: dict[str, Any]) -> str | None:
        """The answer."""
        return segments(self.data, self.form, row, None, "the data")[1].text

    def fixed_inputs(self, encoded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The decoder is given what the encoder reads: any text will do to compare two models."""
        return encoded | {"decoder_input_ids": encoded["input_ids"]}

    @torch.no_grad()
    def predict(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Sequence[tuple[str, str | None]],
        max_length: int,
    ) -> Iterator[Prediction]:
        """Greedy answer to each prompt, at most 128 new tokens."""
        model.eval()
        generate = cast(Any, model).generate
        for start in range(0, len(inputs), PREDICT_BATCH):
            texts = [text for text, _ in inputs[start : start + PREDICT_BATCH]]
            encoded = tokenizer(
                texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
            ).to(model.device)
            written = generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=min(MAX_NEW_TOKENS, positions_of(model) - 1),
                do_sample=False,
                num_beams=1,
            )
            for text, ids in zip(texts, written, strict=True):
                yield Prediction(text, str(tokenizer.decode(ids, skip_special_tokens=True)))
