"""FSDP2: every process holds a part of each weight, and of what the optimizer knows about it."""

from __future__ import annotations

from typing import Any, cast

from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import Trainer

from leantune.anatomy import find_head, find_stacks


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


def whole_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """The weights of a sharded model in one piece, on the main process; None where nothing is sharded.

    Every process must call it.
    """
    if not trainer.is_fsdp_enabled:
        return None
    model: nn.Module = trainer.model_wrapped
    return trainer.accelerator.get_state_dict(model)
