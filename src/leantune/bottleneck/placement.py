"""Which layers `placement` adapts, read off the model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from leantune.anatomy import find_groups, find_head, find_stacks
from leantune.bottleneck.config import BottleneckConfig
from leantune.errors import UserError

# What `placement` adapts: output projections of these kinds of groups (see `anatomy.find_groups`).
_KINDS = {"houlsby": ("heads", "neurons"), "pfeiffer": ("neurons",)}


def placed(model: nn.Module, config: BottleneckConfig) -> set[str]:
    """Names in `model` of the output projections that the config's `placement` adapts.

    Raises:
        UserError: The model's attention or feed-forward blocks are not known.
    """
    try:
        head, groups = find_head(model), find_groups(model)
    except UserError as error:
        raise UserError(f"target_modules=None: {error}; name the layers to adapt") from None
    outputs = {
        output.module
        for group in groups
        if group.kind in _KINDS[config.placement]
        for output in group.outputs
    }
    outer = next(name for name, module in model.named_modules() if module is head)
    return {f"{outer}.{name}" if outer else name for name in _in_layers(head, outputs, config)}


def _in_layers(head: PreTrainedModel, names: set[str], config: BottleneckConfig) -> set[str]:
    """Those names that lie in the layers that the config wants."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return names
    numbers = {wanted} if isinstance(wanted, int) else set(wanted)
    layers = [name for stack in find_stacks(head) for name in stack.names]
    chosen = tuple(f"{name}." for number, name in enumerate(layers) if number in numbers)
    found = {name for name in names if name.startswith(chosen)}
    if not found:
        raise UserError(f"layers_to_transform={wanted!r}: no such layers; there are 0 to {len(layers) - 1}")
    return found
