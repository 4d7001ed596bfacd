"""A layer's module tree as `layer` reads it: its linear layers, and the modules that hold them."""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, eq=False)
class Leaf:
    """A linear layer, whatever PEFT put around it (quantised ones are leaves, too)."""

    name: str
    module: nn.Module
    in_features: int
    out_features: int


def plain(module: nn.Module) -> nn.Module:
    """The module itself, without PEFT's wrapping."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module was made with: FSDP2 puts one of its own before it."""
    classes = type(module).__mro__
    return next(cls for cls in classes if not cls.__module__.startswith("torch.distributed."))


def walk(root: nn.Module, name: str) -> tuple[dict[str, Leaf], dict[str, nn.Module]]:
    """Linear layers and all other modules under `root`, by path relative to it; `name` is root's own."""
    leaves: dict[str, Leaf] = {}
    holders: dict[str, nn.Module] = {"": root}
    todo = [("", root)]
    while todo:
        path, holder = todo.pop(0)
        for child_name, child in holder.named_children():
            child_path = f"{path}.{child_name}" if path else child_name
            child = plain(child)
            sizes = _sizes(child)
            if sizes is not None:
                leaves[child_path] = Leaf(f"{name}.{child_path}", child, *sizes)
            else:
                holders[child_path] = child
                todo.append((child_path, child))
    return leaves, holders


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (sizes[0], sizes[1]) if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None


def resolve(path: str, relative: str) -> str:
    """A name of the table as a path: "../output.dense" at "attention.self" is "attention.output.dense"."""
    if relative.startswith("../"):
        path, relative = path.rpartition(".")[0], relative.removeprefix("../")
    return f"{path}.{relative}" if path else relative
