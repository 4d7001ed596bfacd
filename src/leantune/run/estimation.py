"""The first stage of a pruned run: train with masks, decide what goes, prune, hand over to the second stage.

What it leaves: `pruning/` (the plan) and `checkpoints/warm-start/` (the adapter, trained so far and cut to
the plan). The second stage starts from these two alone, as a run that is resumed there does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PretrainedConfig

from leantune.errors import UserError
from leantune.lightpeft import Adapter, PruningPlan
from leantune.recipes import Recipe
from leantune.run import lean, processes
from leantune.run.folder import RunFolder, whole_folder
from leantune.run.loading import attach_saved, base_for_run
from leantune.run.models import quiet_transformers
from leantune.run.tasks import Task

STAGE = "estimation"


def estimation_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the first stage; a share counts the steps of the second, as the Trainer does."""
    assert recipe.lean.prune is not None
    wanted = recipe.lean.prune.estimate_steps
    if isinstance(wanted, int):
        return wanted
    return max(2, math.ceil(wanted * training_steps(recipe, rows)))


def training_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps that `train` asks for on so many rows, as the Trainer counts them."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    accumulation = int((train.model_extra or {}).get("gradient_accumulation_steps", 1))
    batches = math.ceil(rows / (train.batch_size * processes.count()))
    an_epoch = max(batches // accumulation + int(batches % accumulation > 0), 1)
    return math.ceil(train.epochs * an_epoch)


def write_plan(folder: RunFolder, model: nn.Module, recipe: Recipe, console: Console) -> None:
    """Decide what goes and write it down; the plan's folder appears last and says that the stage is done.

    Every process must call it: what FSDP2 shares out is gathered tensor by tensor. All know the same, so all
    decide alike; the main one writes.
    """
    try:
        plan = lean.pruning_plan(model, recipe)
        adapter = lean.shrunk_adapter(model, plan)
    except UserError as error:
        raise processes.shared(error) from None
    processes.from_main(lambda: _write(folder, plan, adapter))
    console.print(str(plan), highlight=False)


def _write(folder: RunFolder, plan: PruningPlan, adapter: Adapter) -> None:
    with whole_folder(folder.warm_start, sealed=True) as place:
        adapter.save(place)
    with whole_folder(folder.pruning, sealed=True) as place:
        plan.save(place / folder.plan_file.name)


def pruned_model(folder: RunFolder, recipe: Recipe, task: Task, config: PretrainedConfig) -> nn.Module:
    """The base, pruned as it is read, with the adapter as the first stage left it, ready to be trained on."""
    folder.check_undamaged()
    plan = PruningPlan.load(folder.plan_file)
    with quiet_transformers():
        model = attach_saved(base_for_run(recipe, task, config, plan), folder.warm_start, trainable=True)
    return lean.attach_tokens(model, recipe)


def removed_fractions(
    recipe: Recipe, task: Task, config: PretrainedConfig, plan: PruningPlan
) -> dict[str, Any]:
    """How much of the base is gone: of all its parameters, and of those in attention and FFN blocks."""
    with torch.device("meta"):
        whole = task.auto_class.from_config(config)
    base, blocks, gone = plan.sizes(whole)
    return {"base_removed_fraction": gone / base, "blocks_removed_fraction": gone / blocks}
