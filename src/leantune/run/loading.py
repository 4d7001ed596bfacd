"""Open a finished run: base + adapter (or its own full weights), with its tokenizer, ready to use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from leantune.baselines import opened
from leantune.errors import UserError, first_line
from leantune.lightpeft import PruningPlan, Weights, load_pruned
from leantune.recipes import Recipe
from leantune.run.folder import RunFolder
from leantune.run.models import DTYPES, load_base, quiet_transformers, resolve
from leantune.run.tasks import Task, make_task


@dataclass
class LoadedRun:
    """Everything that evaluating, predicting and exporting need."""

    folder: RunFolder
    recipe: Recipe
    task: Task
    config: PretrainedConfig
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan | None = None


def load(run: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a finished run.

    Args:
        run: The run folder.

    Returns:
        (model in evaluation mode, on the GPU where there is one; tokenizer). The model is a `PeftModel`, or
        a plain transformers model after full fine-tuning.

    Raises:
        UserError: The folder holds no finished run, or its base model is not to be had.
    """
    loaded = open_run(run)
    return loaded.model, loaded.tokenizer


def open_run(run: str | Path | RunFolder) -> LoadedRun:
    """As `load`, with the recipe and the task."""
    folder = run if isinstance(run, RunFolder) else RunFolder.existing(run)
    recipe = folder.recipe()
    weights = folder.saved_weights()
    folder.check_undamaged()
    config, task, tokenizer = open_saved(recipe, weights)
    model: nn.Module
    plan = PruningPlan.load(folder.plan_file) if recipe.lean.prune is not None else None
    if weights == folder.model:
        with told_in_a_line(f"{weights}: the model cannot be loaded"):
            model = load_base(recipe.model, task.auto_class, config, source=str(weights))
    else:
        with told_in_a_line(f"{weights}: the saved config does not fit the base"):
            base = base_for_run(recipe, task, config, plan)
        model = attach_saved(base, weights)
    model = cast(nn.Module, model).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedRun(folder, recipe, task, config, model.eval(), tokenizer, plan)


def open_saved(recipe: Recipe, weights: Path) -> tuple[PretrainedConfig, Task, PreTrainedTokenizerBase]:
    """What lies beside a run's weights: the config with its label names, the task made of it, the tokenizer.

    Raises:
        UserError: A file is missing or damaged.
    """
    with told_in_a_line(f"{weights}: the config cannot be opened"):
        config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
        task = make_task(recipe, config)
    with told_in_a_line(f"{weights}: the tokenizer cannot be opened"):
        tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=False)
    return config, task, tokenizer


@contextmanager
def told_in_a_line(what: str) -> Iterator[None]:
    """Files that are damaged make libraries raise whatever comes: to a person it means one thing.

    Raises:
        UserError: Anything went wrong; with its first line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def base_for_run(
    recipe: Recipe,
    task: Task,
    config: PretrainedConfig,
    plan: PruningPlan | None = None,
    weights: Weights | None = None,
) -> PreTrainedModel:
    """The run's base model with its head's shape, quantised as it was trained on.

    The head's weights come with the adapter.

    Args:
        recipe: The run's.
        task: The run's.
        config: The run's, with the names of the labels.
        plan: Prune by it, while reading.
        weights: The base's, if they are in memory already.
    """
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        if plan is None and weights is None:
            return load_base(recipe.model, task.auto_class, config, quantize=recipe.lean.quantize)
        source = resolve(recipe.model.path)
        return load_pruned(
            task.auto_class,
            config,
            plan,
            weights or Weights.from_files(source),
            source,
            dtype=DTYPES[recipe.model.dtype],
            attn_implementation=recipe.model.attention,
        )


def attach_saved(base: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base.

    Raises:
        UserError: The adapter's files are damaged or do not fit the base.
    """
    with told_in_a_line(f"{folder}: the adapter cannot be loaded"):
        return opened(PeftModel.from_pretrained(base, str(folder), is_trainable=trainable))
