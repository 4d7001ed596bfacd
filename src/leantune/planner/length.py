"""How long a recipe's longest row is: read off the data where that is at hand, else its limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PretrainedConfig

from leantune.errors import UserError
from leantune.planner.known import is_shape
from leantune.recipes import Recipe
from leantune.run.data import open_splits
from leantune.run.models import load_tokenizer, resolve
from leantune.run.tasks import make_task
from leantune.run.tasks.base import DEFAULT_MAX_LENGTH, effective_max_length

# Rows with the most characters that are tokenised to find the longest; the most tokens are among them.
LONGEST_ROWS = 256


@dataclass(frozen=True)
class Length:
    """Tokens of the longest row.

    Attributes:
        tokens: How many.
        why: Where the number comes from, for a person.
        padded: Whether the rows of a batch have different lengths.
        evaluates: Whether there is a split to evaluate on; where the data were not opened, yes.
    """

    tokens: int
    why: str
    padded: bool
    evaluates: bool = True


def find_length(recipe: Recipe, config: PretrainedConfig) -> Length:
    """The longest batch that the recipe's run will see.

    Only what is on this machine is opened: a data set or tokenizer that would have to be downloaded is not.

    Raises:
        UserError: `data.max_length` is above what the model reads.
    """
    packed = recipe.model.task == "causal-lm" and recipe.data.pack
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    here = Path(recipe.data.path).expanduser().exists() and not is_shape(recipe.model.path)
    if not (here and Path(resolve(recipe.model.path)).is_dir()):
        return _by_limit(recipe, limit, packed)
    try:
        tokenizer = load_tokenizer(recipe.model)
        splits = open_splits(recipe.data, recipe.train.seed)
    except UserError:
        return _by_limit(recipe, limit, packed)
    longest = effective_max_length(recipe, config, tokenizer)
    task = make_task(recipe)
    for name in task.without_labels(splits):
        del splits[name]
    task.fit(splits)
    rows = task.encode(_longest_rows(splits["train"]), tokenizer, longest, "the train split")
    tokens = max(len(ids) for ids in rows["input_ids"])
    why = "data.max_length" if tokens == longest else "the longest row of the data"
    return Length(tokens, why, not (packed and tokens == longest), len(splits) > 1)


def given_length(recipe: Recipe, tokens: int) -> Length:
    """A length that was asked for."""
    return Length(tokens, "as given", not (recipe.model.task == "causal-lm" and recipe.data.pack))


def _by_limit(recipe: Recipe, limit: int | None, packed: bool) -> Length:
    asked = recipe.data.max_length
    if asked is not None:
        if limit is not None and asked > limit:
            raise UserError(f"data.max_length = {asked}: the model reads at most {limit} tokens")
        return Length(asked, "data.max_length", not packed)
    if limit is not None and limit <= DEFAULT_MAX_LENGTH:
        return Length(limit, "the model's limit", not packed)
    return Length(DEFAULT_MAX_LENGTH, "data.max_length's default", not packed)


def _longest_rows(split: Dataset) -> Dataset:
    """The rows with the most text in them."""
    columns = [split[name] for name in split.column_names]
    sizes = [sum(len(str(value)) for value in row) for row in zip(*columns, strict=True)]
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    return split.select(order[:LONGEST_ROWS])
