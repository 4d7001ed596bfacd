"""Metrics of a run on labelled data."""

from __future__ import annotations

import tempfile
from pathlib import Path

from datasets import Dataset, DatasetDict

from leantune.errors import UserError
from leantune.run.arguments import training_arguments
from leantune.run.callbacks import plain_metrics
from leantune.run.data import SPLITS, open_splits
from leantune.run.loading import LoadedRun, open_run
from leantune.run.tasks.base import effective_max_length
from leantune.run.trainer import build_trainer


def evaluate(
    run: str | Path, data: str | None = None, split: str | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate a finished run.

    Args:
        run: The run folder.
        data: Other data with the same columns; default: the recipe's.
        split: One split's name; default: each of validation and test that is there.

    Returns:
        Split → metric → value: for the recipe's own data the very values in `metrics.json`.

    Raises:
        UserError: There is no such run, data or split.
    """
    loaded = open_run(run)
    if data is not None:
        changes = {"path": data, "validation_fraction": 0.0, "train_rows": None, "evaluation_rows": None}
        loaded.task.data = loaded.recipe.data.model_copy(update=changes)
    splits = open_splits(loaded.task.data, loaded.recipe.train.seed, need_train=False)
    return {name: evaluate_split(loaded, splits[name], name) for name in _wanted(splits, split)}


def _wanted(splits: DatasetDict, split: str | None) -> list[str]:
    if split is not None:
        if split not in splits:
            raise UserError(f"--split {split}: the data has no such split (found: {', '.join(splits)})")
        return [split]
    return [name for name in SPLITS[1:] if name in splits] or list(splits)


def evaluate_split(loaded: LoadedRun, split: Dataset, name: str) -> dict[str, float]:
    """Metrics on one split of raw rows."""
    length = effective_max_length(loaded.recipe, loaded.config, loaded.tokenizer)
    encoded = loaded.task.encode(split, loaded.tokenizer, length, f"the {name} split")
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = training_arguments(loaded.recipe, Path(nowhere), has_validation=False)
        collator = loaded.task.collator(loaded.tokenizer)
        trainer = build_trainer(loaded.model, arguments, loaded.task, loaded.tokenizer, collator, [])
        return plain_metrics(trainer.evaluate(encoded, metric_key_prefix=name), name)
