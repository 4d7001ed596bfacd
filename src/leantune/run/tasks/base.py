"""The interface that every task implements."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from leantune.errors import UserError, shown
from leantune.recipes import Recipe

DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input: a row of `predictions.jsonl`."""

    input: str
    predicted: str | float
    score: float | None = None
    label: str | float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without what is not known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Task(ABC):
    """One kind of task. `fit` comes first in training; a finished run's config replaces it afterwards."""

    name: ClassVar[str]
    auto_class: ClassVar[Any]
    peft_task_type: ClassVar[str]
    main_metric: ClassVar[str]
    # Whether the head's loss is a sum over tokens that is divided by their number in all micro-batches.
    counts_tokens: ClassVar[bool] = False
    # With `counts_tokens`: whether the head itself divides by the number of its own batch all the same.
    head_averages: ClassVar[bool] = False

    def __init__(self, recipe: Recipe, config: PretrainedConfig | None = None) -> None:
        self.recipe = recipe
        self.data = recipe.data

    def fit(self, splits: DatasetDict) -> dict[str, Any]:
        """See the data once, before the model is built.

        Returns:
            Changes to the model's config (number and names of labels).

        Raises:
            UserError: Columns or labels are not what the task needs.
        """
        return {}

    def without_labels(self, splits: DatasetDict) -> list[str]:
        """Names of splits to leave out because they cannot be scored (a test set with hidden labels)."""
        return []

    @abstractmethod
    def encode(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str
    ) -> Dataset:
        """Rows → features (`input_ids`, `attention_mask`, `labels` …) with all other columns dropped.

        Raises:
            UserError: A row cannot be used; the line names `where` and the row.
        """

    @abstractmethod
    def collator(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Features of a batch → padded tensors."""

    @abstractmethod
    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics over a whole split."""

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What to keep of a batch's logits for `metrics` (all of them, unless they are large)."""
        return logits[0] if isinstance(logits, tuple) else logits

    def fixed_inputs(self, encoded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokenised texts → what a forward pass needs, to compare two models' outputs."""
        return encoded

    @abstractmethod
    def predict(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Sequence[tuple[str, str | None]],
        max_length: int,
    ) -> Iterator[Prediction]:
        """Say something of each input (text, second text or None)."""

    @abstractmethod
    def read_input(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
        """The input of a data row, as `predict` takes it."""

    def as_input(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What a person types, in the form that the model was trained on."""
        return text

    @abstractmethod
    def read_label(self, row: dict[str, Any]) -> str | float | None:
        """The expected answer in a data row, as `predict` would say it; None where there is none."""


def effective_max_length(recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a row is cut to.

    Raises:
        UserError: The recipe asks for more than the model has positions.
    """
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    limit = min((value for value in limits if value and value < 10**9), default=None)
    asked = recipe.data.max_length
    if asked is None:
        return min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if limit is not None and asked > limit:
        raise UserError(f"data.max_length = {asked}: the model reads at most {limit} tokens")
    return asked


def positions_of(model: PreTrainedModel) -> int:
    """Tokens that a sequence of the model can have: no more than there are learned positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else sys.maxsize


def check_texts(values: Sequence[Any], column: str, where: str, first_row: int) -> list[str]:
    """See that a batch of a column is text.

    Raises:
        UserError: The first row that is not, by number (from 0).
    """
    for number, value in enumerate(values, first_row):
        if not isinstance(value, str):
            raise UserError(f"{where}, row {number}: column {column!r} is {shown(value)}, not text")
    return list(values)
