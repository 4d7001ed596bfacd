"""What is forecast: a recipe, its model's config, and the shape of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from leantune.errors import UserError
from leantune.planner.quantized import STORAGES, Storage
from leantune.planner.sharing import Sharing
from leantune.recipes import Recipe
from leantune.recipes.training_arguments import RENAMED

Device = Literal["cpu", "cuda"]
Stage = Literal["train", "estimate", "frozen"]
# What the tracer carries out; the Trainer's default first.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
TASKS = ("classification", "regression", "causal-lm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """One training step to forecast.

    Attributes:
        recipe: The run's; its `lean` and `train` decide.
        config: The model's.
        batch: Rows a forward pass.
        length: Tokens of the longest row.
        padded: Whether rows are of different lengths, so that a padding mask reaches attention.
        device: Where it is to run. Figures are those of the CPU's kernels; for `cuda` with one difference:
            attention with dropout keeps no scores there.
        stage: `train`: the run's main stage, with nothing frozen yet (of a pruned run: after the cut).
            `estimate`: the masked first stage of a pruned run. `frozen`: after LaMDA froze all of B.
        sharing: Over how many processes, and how.
        evaluates: Whether the run evaluates at all.
    """

    recipe: Recipe
    config: PretrainedConfig
    batch: int
    length: int
    padded: bool
    stage: Stage = "train"
    device: Device = "cpu"
    sharing: Sharing = Sharing()
    evaluates: bool = True

    @property
    def evaluation_batch(self) -> int:
        """Rows of an evaluation's forward pass."""
        return self.recipe.train.eval_batch_size

    @property
    def storage(self) -> Storage | None:
        """How the base's linear layers are stored; None: in `dtype`."""
        kind: Any = self.recipe.lean.quantize
        return kind

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights in memory: the recipe's, or (auto) as the config says they are stored."""
        if self.recipe.model.dtype != "auto":
            return DTYPES[self.recipe.model.dtype]
        stored = getattr(self.config, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.float32

    @property
    def autocast(self) -> torch.dtype | None:
        """Of mixed-precision training (`train.bf16`, `train.fp16`); None without."""
        options = arguments(self.recipe)
        return torch.bfloat16 if options.get("bf16") else torch.float16 if options.get("fp16") else None

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return is_checkpointed(self.recipe)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier forward passes are in memory during a forward pass."""
        return int(arguments(self.recipe).get("gradient_accumulation_steps", 1)) > 1

    @property
    def fused(self) -> bool:
        """Whether the optimizer's step needs no memory of its own."""
        return arguments(self.recipe).get("optim", OPTIMIZERS[0]) == OPTIMIZERS[0]


def arguments(recipe: Recipe) -> dict[str, Any]:
    """The TrainingArguments that the recipe sets by their own names, by the names used here."""
    extra = dict(recipe.train.model_extra or {})
    for old, new in RENAMED.items():
        if new in extra:
            extra[old] = extra.pop(new)
    return extra


def is_checkpointed(recipe: Recipe) -> bool:
    """Whether gradient checkpointing is on in the recipe."""
    return bool(arguments(recipe).get("gradient_checkpointing"))


def check(setting: Setting) -> None:
    """See that the setting is one that can be forecast.

    Raises:
        UserError: It is not; one line says which key and what is accepted.
    """
    recipe, config = setting.recipe, setting.config
    for key, value in (("batch", setting.batch), ("length", setting.length)):
        if value < 1:
            raise UserError(f"{key} = {value}: must be a whole number of at least 1")
    if recipe.model.task not in TASKS:
        raise UserError(f"model.task = {recipe.model.task!r}: a plan is made for {', '.join(TASKS)}")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and setting.length > limit:
        raise UserError(f"length = {setting.length}: the model reads at most {limit} tokens")
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.path = {recipe.model.path!r}: its weights are quantised already; a plan is made for the "
            f"plain model (and for lean.quantize)"
        )
    if setting.storage is not None and setting.storage not in STORAGES:
        raise UserError(f"lean.quantize = {setting.storage!r}: a plan is made for {', '.join(STORAGES)}")
    optimizer = arguments(recipe).get("optim", OPTIMIZERS[0])
    if optimizer not in OPTIMIZERS:
        raise UserError(f"train.optim = {optimizer!r}: a plan is made for {' or '.join(OPTIMIZERS)}")
    text = config.get_text_config()
    missing = [
        name for name in ("vocab_size", "hidden_size") if not isinstance(getattr(text, name, None), int)
    ]
    if missing:
        raise UserError(f"model.path = {recipe.model.path!r}: its config names no {' and no '.join(missing)}")
