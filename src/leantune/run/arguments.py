"""A recipe's `train` as transformers' TrainingArguments."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from leantune.errors import UserError
from leantune.recipes import Recipe
from leantune.recipes.training_arguments import current_names, translate
from leantune.run import processes
from leantune.run.models import quiet_transformers

KEPT_CHECKPOINTS = 2


def training_arguments(
    recipe: Recipe, checkpoints: Path, has_validation: bool, max_steps: int | None = None
) -> TrainingArguments:
    """The recipe's `train` as TrainingArguments, with leantune's defaults for what it does not name.

    Args:
        recipe: The run's.
        checkpoints: Where they go.
        has_validation: Whether to evaluate at the end of each epoch.
        max_steps: Train this long instead of as long as the recipe says, and evaluate nothing.

    Raises:
        UserError: transformers does not accept a value.
    """
    defaults: dict[str, Any] = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch" if has_validation else "no",
        "report_to": "none",  # local and silent unless asked
        "save_total_limit": KEPT_CHECKPOINTS,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": False,
        "data_seed": recipe.train.seed,
        "train_sampling_strategy": "group_by_length",  # rows of like length together: less padding
    }
    own: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a step that is not finite must be seen as such
        "disable_tqdm": True,  # the progress bar is ours
        "restore_callback_states_from_checkpoint": True,
        "include_num_input_tokens_seen": "non_padding",
    }
    if processes.count() > 1:
        _check_together(recipe.train.model_extra or {})
        own |= (
            {} if torch.cuda.is_available() else {"use_cpu": True}
        )  # else the Trainer would see one process
    if max_steps is not None:
        own |= {"max_steps": max_steps}
    if max_steps is not None or not has_validation:
        own |= {"eval_strategy": "no"}
    values = current_names(defaults) | translate(recipe.train) | own
    if processes.count() == 1:  # a run that was shared out is evaluated in one process
        values = {key: value for key, value in values.items() if key not in ("fsdp", "fsdp_config")}
    # transformers advises against its checkpointing with FSDP: version 1 gathers once more for it, 2 does not
    quiet = quiet_transformers() if values.get("fsdp") else nullcontext()
    try:
        with quiet:
            arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(_which_key(recipe, str(error).strip().split("\n")[0])) from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the Trainer would use DataParallel, which copies the model in every step
    return arguments


def _check_together(settings: dict[str, Any]) -> None:
    """Several processes share a step's rows and its loss in one way; these keys would have another."""
    for key, fine in (
        ("average_tokens_across_devices", (True,)),
        ("train_sampling_strategy", ("group_by_length", "random", "sequential")),
        ("accelerator_config", (None,)),
    ):
        if key in settings and settings[key] not in fine:
            raise UserError(f"train.{key} = {settings[key]!r}: not with several processes")


def _which_key(recipe: Recipe, reason: str) -> str:
    """transformers says what it does not like of a value, seldom of which key."""
    for key, value in (recipe.train.model_extra or {}).items():
        if key in reason or (isinstance(value, str) and value in reason):
            return f"train.{key} = {value!r}: {reason}"
    return f"train: {reason}"
