"""What Light-PEFT needs to know of an adapter method: declared by the method itself, for LoRA by this table.

Which axis of each of its tensors runs over the layer's input features ("in"), its output features ("out") and
the adapter's ranks ("rank") is enough to slice an adapter to a pruned base, to prune its ranks, and to put it
back on the whole base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from leantune.anatomy import find_head
from leantune.errors import UserError

Axes = dict[str, tuple[str, ...]]
_LORA: Axes = {"lora_A": ("rank", "in"), "lora_B": ("out", "rank")}


def adapter_axes(config: PeftConfig) -> Axes:
    """The axes of each tensor of an adapter with this config, by the tensor's name in the layer.

    Raises:
        UserError: The method cannot be pruned.
    """
    if config.peft_type == PeftType.LORA:
        return _LORA
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)  # type: ignore[call-overload]
    if not hasattr(tuner, "tensor_axes_for"):
        name = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"Light-PEFT cannot prune adapters of type {name}; it can LORA, LAMDA and BOTTLENECK")
    return tuner.tensor_axes_for(config)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Name inside the transformers model (as in a plain model) and layer of every adapted module."""
    for name, module in find_head(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapter_config(model: nn.Module) -> tuple[str, Any]:
    """Name and config of the one adapter that is trained.

    Raises:
        UserError: There is none, or more than one.
    """
    if not isinstance(model, PeftModel):
        raise UserError("Light-PEFT needs a model with an adapter (peft.get_peft_model)")
    names = list(model.peft_config)
    if len(names) != 1:
        raise UserError(f"Light-PEFT prunes one adapter; the model has {len(names)}: {', '.join(names)}")
    return names[0], model.peft_config[names[0]]


def adapter_output(layer: BaseTunerLayer, adapter_name: str, x: Tensor, base_output: Tensor) -> Tensor:
    """What the adapter adds to the frozen layer's output.

    Args:
        layer: The adapted layer.
        adapter_name: Which of its adapters.
        x: The layer's input, (..., d_in).
        base_output: The frozen layer's output, (..., d_out); a serial bottleneck reads this.

    Returns:
        (..., d_out).

    Raises:
        UserError: The method does not say.
    """
    if isinstance(layer, LoraLayer):
        if adapter_name not in layer.lora_A or layer.lora_variant.get(adapter_name) is not None:
            raise UserError("Light-PEFT measures LoRA on linear layers, without variants such as DoRA")
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        return up(down(x.to(_dtype(down)))) * layer.scaling[adapter_name]
    own: Any = getattr(layer, "adapter_output", None)
    if own is None:
        raise UserError(f"Light-PEFT cannot measure the output of {type(layer).__name__}")
    return own(adapter_name, base_output if getattr(layer, "reads_output", False) else x)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
