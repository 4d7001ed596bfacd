"""What is in memory between two steps, read off a model's parameters: for saving, and for sharing it out."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from leantune.anatomy import find_head, find_stacks
from leantune.planner.setting import Setting
from leantune.planner.sharing import Units


def units_of(model: nn.Module) -> Units:
    """The parts of a model that processes gather and reduce one by one: its layers."""
    layers = [layer for stack in find_stacks(find_head(model)) for layer in stack.layers]
    sizes = [weight_bytes(layer.parameters()) for layer in layers]
    everything = list(model.parameters())
    return Units(
        largest=max(sizes),
        outside=weight_bytes(everything) - sum(sizes),
        trained=weight_bytes(p for p in everything if p.requires_grad),
        trained_largest=max(weight_bytes(p for p in x.parameters() if p.requires_grad) for x in layers),
    )


def weight_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all of them, each storage once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def saving_peak(setting: Setting, weights: int, optimizer: int, trained: int) -> int:
    """Bytes while a checkpoint is written, gradients let go.

    safetensors and torch write out of memory as it is. LaMDA's files hold B in one piece, joined first; where
    processes share weights, one gathers those that are saved.

    Args:
        setting: What is trained.
        weights: Bytes, on one process alone.
        optimizer: Likewise.
        trained: Likewise, of trained parameters.
    """
    share, _, kept = setting.sharing.shares
    copied = setting.recipe.lean.adapter.type == "lamda" or share < 1
    return round(weights * share + optimizer * kept) + (trained if copied else 0)
