"""What a run reads before it builds a model: data, task, tokenizer, config, and the rows as features."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset, DatasetDict
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from leantune.recipes import Recipe
from leantune.run.data import open_splits
from leantune.run.models import load_config, load_tokenizer
from leantune.run.tasks import Task, make_task
from leantune.run.tasks.base import effective_max_length


@dataclass
class Inputs:
    """All of a recipe's run that does not depend on its methods."""

    splits: DatasetDict
    task: Task
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    encoded: dict[str, Dataset]


def read_inputs(recipe: Recipe, console: Console) -> Inputs:
    """Open and check data and model; writes nothing.

    Args:
        recipe: The run's.
        console: Is told which splits are left out.

    Raises:
        UserError: Data, tokenizer or config do not fit the recipe.
    """
    splits = open_splits(recipe.data, recipe.train.seed)
    task = make_task(recipe)
    for name in task.without_labels(splits):
        console.print(f"the {name} split has no labels: it is left out")
        del splits[name]
    changes = task.fit(splits)
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe.model, pad_token_id=tokenizer.pad_token_id, **changes)
    length = effective_max_length(recipe, config, tokenizer)
    encoded = {
        name: task.encode(split, tokenizer, length, f"the {name} split") for name, split in splits.items()
    }
    return Inputs(splits, task, config, tokenizer, encoded)
