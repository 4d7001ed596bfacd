"""From the recipe's `lean.adapter` to a PEFT adapter on the model, and what is trained in full beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from leantune.baselines import AdaLoraBudget, freeze_down_projections, lora_variant
from leantune.bottleneck import BottleneckConfig
from leantune.errors import UserError
from leantune.lamda import LamdaConfig, LamdaFreezing, SpectralRanks
from leantune.recipes import BottleneckRecipe, LamdaRecipe, LoraRecipe, Recipe
from leantune.run.models import head_modules, new_modules


def _lamda(recipe: LamdaRecipe, common: dict[str, Any]) -> PeftConfig:
    ranks = recipe.spectral_ranks
    return LamdaConfig(
        r=recipe.r,
        lamda_alpha=recipe.alpha,
        lamda_dropout=recipe.dropout,
        init=recipe.init,
        init_scale=recipe.init_scale,
        init_b=recipe.init_b,
        freeze_ratio=recipe.freeze_ratio,
        freeze_order=recipe.freeze_order,
        rank_pattern=dict(recipe.rank_pattern),
        spectral_ranks=None if ranks is None else SpectralRanks(**ranks.model_dump()),
        **common,
    )


def _lora(recipe: LoraRecipe, common: dict[str, Any]) -> PeftConfig:
    alpha = recipe.alpha if recipe.alpha is not None else 2 * recipe.r
    return lora_variant(recipe.variant, recipe.r, alpha, recipe.dropout, common)


def _bottleneck(recipe: BottleneckRecipe, common: dict[str, Any]) -> PeftConfig:
    return BottleneckConfig(
        r=recipe.r,
        mode=recipe.mode,
        placement=recipe.placement,
        activation=recipe.activation,
        bottleneck_alpha=recipe.alpha,
        bottleneck_dropout=recipe.dropout,
        **common,
    )


# Adapter type → (recipe → PEFT config, callbacks that its training needs).
ADAPTERS: dict[str, tuple[Callable[..., PeftConfig], tuple[type[TrainerCallback], ...]]] = {
    "lamda": (_lamda, (LamdaFreezing,)),
    "lora": (_lora, (AdaLoraBudget,)),
    "bottleneck": (_bottleneck, ()),
}


def with_adapter(model: PreTrainedModel, recipe: Recipe, task_type: str) -> nn.Module:
    """The model with the recipe's adapter; for full fine-tuning the model itself.

    Raises:
        UserError: No layer matches, or the adapter does not fit one.
    """
    adapter = recipe.lean.adapter
    if adapter.type == "none":
        return model
    make, _ = ADAPTERS[adapter.type]
    common = {
        "target_modules": adapter.target_modules,
        "exclude_modules": adapter.exclude_modules,
        "task_type": task_type,
        "modules_to_save": trained_in_full(model, task_type) or None,
    }
    try:
        adapted = get_peft_model(model, make(adapter, common))
    except (ValueError, TypeError) as error:  # TypeError: a head that PEFT cannot save beside its adapter
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, UserError) and ("arget modules" in reason or "target_modules" in reason):
            raise UserError(
                f"lean.adapter.target_modules = {adapter.target_modules!r}: matches no layer of the model "
                f"(its layers: {', '.join(linear_names(model))})"
            ) from None
        raise UserError(f"lean.adapter: {reason}") from None
    if isinstance(adapter, LoraRecipe) and adapter.variant == "lora-fa":
        freeze_down_projections(adapted)
    return adapted


def trained_in_full(model: nn.Module, task_type: str) -> list[str]:
    """Modules that an adapter leaves to be trained as they are, and saves: the head, and what is new.

    PEFT takes a classifier's last layer alone; a pooler or dense layer before it that the base's weights lack
    would stay random, and be drawn anew at every load.
    """
    head = head_modules(model) if task_type == "SEQ_CLS" else []
    inside = [name for name in new_modules(model) if name.split(".")[0] not in head]
    return head + inside


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers, each once."""
    layers = (name.rpartition(".")[2] for name, module in model.named_modules() if _linear(module))
    return list(dict.fromkeys(layers))


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def adapter_callbacks(recipe: Recipe) -> list[TrainerCallback]:
    """What the recipe's adapter needs called while it is trained."""
    kind = recipe.lean.adapter.type
    return [make() for make in ADAPTERS[kind][1]] if kind in ADAPTERS else []


def check_resumable(recipe: Recipe, checkpoint: str | None) -> None:
    """See whether a run can go on from a checkpoint.

    Raises:
        UserError: It is AdaLoRA's.
    """
    if checkpoint is not None and getattr(recipe.lean.adapter, "variant", None) == "adalora":
        raise UserError(
            "lean.adapter.variant = adalora: PEFT keeps the scores by which ranks go in no checkpoint: the "
            "run cannot be resumed; start anew with --overwrite"
        )
