"""FSDP2: every process holds a part of each weight, and of what the optimizer knows about it.

Layers are shared out and gathered one by one, whenever they are called: once in an ordinary forward, twice in
TokenTune's two passes, once more where gradient checkpointing runs them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import Trainer

from leantune.anatomy import find_head, find_stacks
from leantune.errors import UserError
from leantune.recipes import Recipe
from leantune.run import processes

# Of `train.fsdp_config`. Not state_dict_type: sharded checkpoints come with a pickle. Not
# activation_checkpointing: it wraps layers in modules of its own; train.gradient_checkpointing does it.
FSDP_KEYS = {"version", "reshard_after_forward", "transformer_layer_cls_to_wrap"}


def is_sharded(recipe: Recipe) -> bool:
    """Whether a recipe asks for FSDP2."""
    return bool((recipe.train.model_extra or {}).get("fsdp"))


def check_shareable(recipe: Recipe) -> None:
    """What several processes cannot train, or cannot share out.

    Raises:
        UserError: The recipe asks for it.
    """
    settings = recipe.train.model_extra or {}
    if is_sharded(recipe) or settings.get("fsdp_config") is not None:
        _check_sharded(recipe, settings)
    if processes.count() > 1 and recipe.lean.quantize == "int8-torchao":
        raise UserError(
            "lean.quantize = 'int8-torchao': torchao's weights cannot be sent between processes; with "
            "several, take nf4 or (without train.fsdp) int8, or train in one"
        )


def _check_sharded(recipe: Recipe, settings: dict[str, Any]) -> None:
    config = settings.get("fsdp_config") or {}
    if settings.get("fsdp") is not True:
        raise UserError(
            f"train.fsdp = {settings.get('fsdp')!r}: accepted is true (its settings: fsdp_config)"
        )
    if processes.count() == 1:
        raise UserError("train.fsdp: shares the model out over several processes: start with --processes N")
    if not isinstance(config, dict) or not config.keys() <= FSDP_KEYS or config.get("version", 2) != 2:
        accepted = ", ".join(sorted(FSDP_KEYS))
        raise UserError(f"train.fsdp_config = {config!r}: accepted are {accepted}, with version 2")
    if recipe.lean.quantize == "int8":
        raise UserError(
            "lean.quantize = 'int8': not with train.fsdp: its pieces lose the scales that bitsandbytes keeps "
            "with 8-bit weights; take nf4, or leave train.fsdp out"
        )
    if getattr(recipe.lean.adapter, "variant", None) == "adalora":
        raise UserError(
            "lean.adapter.variant = adalora: not with train.fsdp: PEFT computes its penalty outside of the "
            "layers, where each process has but a part of the adapter; take lora, or leave train.fsdp out"
        )
    for key in ("bf16", "fp16"):
        if recipe.lean.quantize is not None and settings.get(key):
            raise UserError(
                f"train.{key}: not with lean.quantize and train.fsdp: gathering would cast packed weights to "
                "nonsense; set model.dtype instead"
            )


def shard_on_cpu(accelerator: Any, arguments: Any) -> None:
    """Make an accelerator on CPUs shard: accelerate has FSDP for accelerators alone, and is silent about it.

    Args:
        accelerator: Just made, nothing prepared yet.
        arguments: The TrainingArguments, with `fsdp`.
    """
    # both, as accelerate itself does it: the second is copied into the first time and again
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)


def shard_by_layers(trainer: Trainer) -> None:
    """Let the model's layers be what is shared out and gathered as one, unless the recipe names others.

    What a model says itself (`_no_split_modules`) may be nested in what accelerate shares out besides them:
    BERT's embeddings would be shared out twice.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        stacks = find_stacks(find_head(cast(nn.Module, trainer.model)))
        names = {type(layer).__name__ for stack in stacks for layer in stack.layers}
        plugin.transformer_cls_names_to_wrap = sorted(names)


@contextmanager
def tied_in_one(model: Any) -> Iterator[None]:
    """accelerate may shard the model in here, also one whose embeddings are tied in three places or more.

    It makes a group of the two embeddings that a model names. Where others hold the same weight (BART, T5: of
    encoder and decoder) torch refuses that; all then stay in the group of what is outside the layers.
    """
    named = [model.get_input_embeddings(), model.get_output_embeddings()]
    weight = getattr(named[0], "weight", None)
    holders = [
        module
        for module in model.modules()
        if weight is not None and module._parameters.get("weight") is weight
    ]
    if all(any(holder is module for module in named) for holder in holders):
        yield
        return
    hidden = ("get_input_embeddings", "get_output_embeddings")
    model.__dict__.update(dict.fromkeys(hidden, lambda: None))
    try:
        yield
    finally:
        for name in hidden:
            del model.__dict__[name]


def whole_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """The weights of a sharded model in one piece, on the main process; None where nothing is sharded.

    Every process must call it.
    """
    if not trainer.is_fsdp_enabled:
        return None
    model: nn.Module = trainer.model_wrapped
    whole: dict[str, Tensor] = trainer.accelerator.get_state_dict(model)
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in whole:  # gathered apart, tied weights would be saved twice
            whole[name] = whole[first.setdefault(parameter, name)]
    return whole
