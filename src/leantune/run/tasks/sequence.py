"""Tasks with one answer for a sequence: classification and regression, of one text or a pair."""

from __future__ import annotations

import difflib
import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from leantune.errors import UserError, shown
from leantune.recipes import Recipe
from leantune.run.data import check_columns, find_column
from leantune.run.tasks.base import Prediction, Task, check_texts

TEXT_COLUMNS = ("text", "sentence", "sentence1", "question", "question1", "premise", "content")
LABEL_COLUMNS = ("label", "labels", "target", "score")
PREDICT_BATCH = 64


class SequenceTask(Task):
    """What classification and regression share: columns, tokenising, batching."""

    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"

    def fit(self, splits: DatasetDict) -> dict[str, Any]:
        """See that the columns exist, and give the head's size and names."""
        for name, split in splits.items():
            check_columns(
                split,
                {"text": self.data.text, "text_pair": self.data.text_pair, "label": self.data.label},
                f"the {name} split",
            )
        self._columns(splits["train"], "the train split")
        return self._head(splits["train"])

    def without_labels(self, splits: DatasetDict) -> list[str]:
        """`test`, if its label column is missing, or null or -1 throughout."""
        test = splits.get("test")
        if test is None or "train" not in splits:
            return []
        columns = [self.data.label] if self.data.label else list(LABEL_COLUMNS)
        label = next((name for name in columns if name in splits["train"].column_names), None)
        hidden = label is not None and (
            label not in test.column_names or all(value in (None, -1) for value in test.unique(label))
        )
        return ["test"] if hidden else []

    @abstractmethod
    def _head(self, train: Dataset) -> dict[str, Any]:
        """Config of the head."""

    @abstractmethod
    def _target(self, value: Any, where: str) -> Any:
        """A label as the model's loss takes it."""

    def _columns(self, split: Dataset, where: str) -> tuple[str, str | None, str]:
        text = self.data.text or find_column(split, TEXT_COLUMNS, "text", where)
        label = self.data.label or find_column(split, LABEL_COLUMNS, "label", where)
        return text, self.data.text_pair, label

    def encode(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str
    ) -> Dataset:
        """Tokenise; labels become class numbers or floats. Rows are cut to `max_length`, not padded."""
        check_columns(
            split,
            {"text": self.data.text, "text_pair": self.data.text_pair, "label": self.data.label},
            where,
        )
        text, pair, label = self._columns(split, where)

        def features(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            texts = [
                check_texts(rows[column], column, where, numbers[0]) for column in (text, pair) if column
            ]
            encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
            encoded["labels"] = [
                self._target(value, f"{where}, row {number}, column {label!r}")
                for number, value in zip(numbers, rows[label], strict=True)
            ]
            return encoded

        return split.map(
            features,
            batched=True,
            with_indices=True,
            remove_columns=split.column_names,
            desc=f"tokenize {where}",
        )

    def collator(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad to the batch's longest row."""
        return DataCollatorWithPadding(tokenizer)

    def read_input(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
        """The text column(s)."""
        text = self.data.text or next(name for name in TEXT_COLUMNS if name in row)
        return row[text], row[self.data.text_pair] if self.data.text_pair else None

    def _raw_label(self, row: dict[str, Any]) -> Any:
        """What stands in a row's label column; None where there is none."""
        column = self.data.label or next((name for name in LABEL_COLUMNS if name in row), None)
        return row.get(column) if column else None

    @torch.no_grad()
    def predict(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Sequence[tuple[str, str | None]],
        max_length: int,
    ) -> Iterator[Prediction]:
        """One answer for each input, in order."""
        model.eval()
        for start in range(0, len(inputs), PREDICT_BATCH):
            batch = inputs[start : start + PREDICT_BATCH]
            texts = [text for text, _ in batch]
            pairs = [pair for _, pair in batch] if self.data.text_pair else None
            encoded = tokenizer(
                texts, pairs, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
            )
            logits = model(**encoded.to(model.device)).logits.float()  # (batch, labels)
            for text, row in zip(texts, logits, strict=True):
                yield self._say(text, row)

    @abstractmethod
    def _say(self, text: str, logits: torch.Tensor) -> Prediction:
        """Logits (labels,) in words."""


class Classification(SequenceTask):
    """One of a set of labels. The names come from the train split and stay in the model's config."""

    name = "classification"
    main_metric: ClassVar[str] = "accuracy"

    def __init__(self, recipe: Recipe, config: PretrainedConfig | None = None) -> None:
        super().__init__(recipe, config)
        self.labels: list[str] = [] if config is None else label_names(config)
        self.index = {name: number for number, name in enumerate(self.labels)}
        self._feature_names: list[str] | None = None  # of a ClassLabel column: its numbers stand for these

    def _head(self, train: Dataset) -> dict[str, Any]:
        column = self._columns(train, "the train split")[2]
        feature = train.features[column]
        if isinstance(feature, ClassLabel):
            self.labels = list(feature.names)
        else:
            values = _distinct(train[column], column)
            unusable = [value for value in values if isinstance(value, float | list | dict) or value is None]
            if unusable:
                accepted = "text, a whole number, true or false"
                raise UserError(
                    f"data.label = {column!r}: {shown(unusable[0])} is no class label ({accepted})"
                )
            self.labels = [str(value) for value in sorted(values)]
        if len(self.labels) < 2:
            raise UserError(
                f"data.label = {column!r}: only one label in the train split ({shown(self.labels[0])})"
            )
        self.index = {name: number for number, name in enumerate(self.labels)}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": dict(self.index),
            "problem_type": "single_label_classification",
        }

    def encode(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str
    ) -> Dataset:
        """As `SequenceTask.encode`; a ClassLabel column's numbers are read as their names."""
        column = self._columns(split, where)[2]
        feature = split.features.get(column)
        self._feature_names = feature.names if isinstance(feature, ClassLabel) else None
        return super().encode(split, tokenizer, max_length, where)

    def _target(self, value: Any, where: str) -> int:
        name = str(value)
        if self._feature_names is not None and isinstance(value, int):
            if value < 0:
                raise UserError(f"{where}: this row has no label")
            name = self._feature_names[value]
        if name not in self.index:
            near = difflib.get_close_matches(name, self.labels, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{where}: label {shown(name)} is not among the {len(self.labels)} labels of train{guess}"
            )
        return self.index[name]

    def read_label(self, row: dict[str, Any]) -> str | None:
        """The label's name."""
        value = self._raw_label(row)
        if value is None:
            return None
        names = self._feature_names
        return names[value] if names is not None and isinstance(value, int) else str(value)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy and macro-averaged F1; for two classes also F1 of the second and Matthews' correlation."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        predicted, labels = np.argmax(prediction.predictions, axis=-1), prediction.label_ids
        result = {
            "accuracy": accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
        }
        if len(self.labels) == 2:
            result["f1"] = f1_score(labels, predicted, zero_division=0)
            result["matthews_correlation"] = matthews_corrcoef(labels, predicted)
        return {name: float(value) for name, value in result.items()}

    def _say(self, text: str, logits: torch.Tensor) -> Prediction:
        score, number = torch.softmax(logits, dim=-1).max(dim=-1)
        return Prediction(text, self.labels[int(number)], score=float(score))


def label_names(config: PretrainedConfig) -> list[str]:
    """A config's label names, by number."""
    names: dict[Any, str] = config.id2label or {}
    return [names[number] for number in sorted(names)]


def _distinct(values: Iterable[Any], column: str) -> list[Any]:
    """The different values of a column.

    Raises:
        UserError: They are of more than one type, which in a label column is a slip.
    """
    found: dict[Any, None] = {}
    for value in values:
        found[value if isinstance(value, Hashable) else str(value)] = None
    kinds = {type(value): value for value in found if value is not None}
    if len(kinds) > 1:
        told = " and ".join(f"{shown(value)} ({kind.__name__})" for kind, value in kinds.items())
        raise UserError(f"data.label = {column!r}: labels of different types: {told}")
    return list(found)


class Regression(SequenceTask):
    """One number."""

    name = "regression"
    main_metric: ClassVar[str] = "pearson"

    def _head(self, train: Dataset) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def _target(self, value: Any, where: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{where}: {shown(value)} is no number")
        return number

    def read_label(self, row: dict[str, Any]) -> float | None:
        """The target value."""
        value = self._raw_label(row)
        return None if value is None else float(value)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Pearson's and Spearman's correlation (0 where one side is constant) and the mean squared error."""
        from scipy.stats import pearsonr, spearmanr

        predicted = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
        labels = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
        constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
        return {
            "pearson": 0.0 if constant else float(pearsonr(predicted, labels)[0]),
            "spearman": 0.0 if constant else float(spearmanr(predicted, labels)[0]),
            "mean_squared_error": float(np.mean((predicted - labels) ** 2)),
        }

    def _say(self, text: str, logits: torch.Tensor) -> Prediction:
        return Prediction(text, float(logits[0]))
