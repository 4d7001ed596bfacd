"""`train:` accepts every field of transformers.TrainingArguments; here they are checked and translated."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from leantune.errors import brief
from leantune.recipes.schema import TrainRecipe

# Plain name → TrainingArguments' name.
PLAIN_NAMES = {
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "learning_rate": "learning_rate",
    "seed": "seed",
}
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Set by leantune itself: the run folder, the log and resuming depend on them.
OWN_FIELDS = {
    "output_dir": "the recipe's `output` says where",
    "resume_from_checkpoint": "use --resume",
    "do_train": "use `leantune train`",
    "do_eval": "use `leantune evaluate`",
    "do_predict": "use `leantune predict`",
    "logging_steps": "log.jsonl has one line a step",
    "logging_strategy": "log.jsonl has one line a step",
    "disable_tqdm": "the progress bar is leantune's",
    "restore_callback_states_from_checkpoint": "always on",
    "push_to_hub": "use `leantune export`, then upload",
    "save_only_model": "a checkpoint without optimizer state cannot be resumed from",
} | dict.fromkeys(
    (
        "load_best_model_at_end",
        "auto_find_batch_size",
        "deepspeed",
        "parallelism_config",
    ),
    "not in this release",
)


def check_extra_arguments(train: Mapping[str, Any]) -> list[str]:
    """One line for each key under `train` that is neither a plain name nor a TrainingArguments field."""
    extra = [key for key in train if key not in TrainRecipe.model_fields]
    if not extra:
        return []
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    plain = {name: word for word, name in PLAIN_NAMES.items() if word != name}
    lines = []
    for key in extra:
        if key in plain:
            lines.append(f"train.{key}: write train.{plain[key]} instead")
        elif key in OWN_FIELDS:
            lines.append(f"train.{key}: not to be set here, {OWN_FIELDS[key]}")
        elif key not in fields:
            near = difflib.get_close_matches(key, [*TrainRecipe.model_fields, *fields], n=1, cutoff=0.6)
            guess = f"; did you mean {near[0]}?" if near else ""
            accepted = ", ".join(TrainRecipe.model_fields)
            lines.append(
                f"train.{brief(key)}: unknown key{guess} (accepted: {accepted}, and any field of "
                "TrainingArguments)"
            )
    return lines


def translate(train: TrainRecipe) -> dict[str, Any]:
    """Keyword arguments for TrainingArguments: plain names by their long ones, the rest as they are."""
    values = {PLAIN_NAMES[name]: getattr(train, name) for name in PLAIN_NAMES}
    if values["max_steps"] is None:
        del values["max_steps"]
    return values | current_names(dict(train.model_extra or {}))


def current_names(values: dict[str, Any]) -> dict[str, Any]:
    """TrainingArguments renamed some fields within its version 5: write each by the name it has here."""
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    renamed = {old: new for old, new in RENAMED.items() if new in fields}
    return {renamed.get(name, name): value for name, value in values.items()}
