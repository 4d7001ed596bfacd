"""Before the run folder is touched: what can go wrong with recipe, data and model goes wrong here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import nn
from transformers import set_seed

from leantune.errors import UserError
from leantune.measure import resident_bytes
from leantune.recipes import Recipe
from leantune.run import lean, processes
from leantune.run.arguments import training_arguments
from leantune.run.inputs import Inputs, read_inputs
from leantune.run.models import head_modules, load_base, new_modules
from leantune.run.quantization import check_installed, make_shareable
from leantune.run.sharding import check_shareable, is_sharded
from leantune.run.tasks import Task

if TYPE_CHECKING:
    from leantune.planner.run_forecast import RunForecast
    from leantune.planner.sharing import Sharing

LISTED = 5  # new modules that are told by name


@dataclass
class Prepared(Inputs):
    """What is known before the run folder is touched."""

    model: nn.Module
    bytes_before: int | None  # what the process held before it read the model


def prepare(recipe: Recipe, console: Console) -> Prepared:
    """What can go wrong with recipe, data and model goes wrong here, before anything is written."""
    check_shareable(recipe)
    if recipe.lean.quantize is not None:
        check_installed(recipe.lean.quantize)
    with console.status("reading data and model"):
        inputs = read_inputs(recipe, console)
        wanted = (recipe.train.model_extra or {}).get("eval_strategy", "no")
        if wanted != "no" and "validation" not in inputs.splits:
            raise UserError(f"train.eval_strategy = {wanted!r}: the data has no validation split")
        training_arguments(recipe, Path("unused"), "validation" in inputs.splits)
        set_seed(recipe.train.seed)
        before = resident_bytes()
        base = load_base(recipe.model, inputs.task.auto_class, inputs.config, quantize=recipe.lean.quantize)
        if is_sharded(recipe):
            make_shareable(base)
    _tell_what_is_new(base, inputs.task, console)
    # Outside of that: what attaching computes (spectra) shows its own progress.
    model = lean.attach(base, recipe, inputs.task.peft_task_type)
    return Prepared(**vars(inputs), model=model, bytes_before=before)


def forecast(recipe: Recipe, prepared: Prepared) -> RunForecast:
    """What the run is going to take, by the closed form."""
    from leantune.planner.run_forecast import forecast_run  # which imports from here

    packed = recipe.model.task == "causal-lm" and recipe.data.pack
    evaluates = "validation" in prepared.encoded
    cuda = torch.cuda.is_available()
    sharing = sharing_of(recipe)
    return forecast_run(recipe, prepared.config, prepared.encoded["train"], evaluates, packed, cuda, sharing)


def sharing_of(recipe: Recipe) -> Sharing:
    """How the processes that train share the model."""
    from leantune.planner.sharing import Sharing

    return Sharing(processes.count(), "fsdp" if is_sharded(recipe) else "ddp")


def _tell_what_is_new(base: nn.Module, task: Task, console: Console) -> None:
    """A head is new as a rule; anything else that the weights lack may be a mistake."""
    head = head_modules(base) if task.peft_task_type == "SEQ_CLS" else []
    lacking = [name for name in new_modules(base) if name.split(".")[0] not in head]
    if lacking:
        names = ", ".join(lacking[:LISTED]) + (
            f" and {len(lacking) - LISTED} more" if lacking[LISTED:] else ""
        )
        console.print(f"the weights lack {names}: drawn from the seed, trained in full and saved")
