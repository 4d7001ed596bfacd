"""What happens to each tensor of a model that is pruned, in memory or while a file is read.

ModuleCut         what happens to one linear layer
parameter_cuts    the same, parameter by parameter, as they are named in a checkpoint
slice_parameter   one tensor, or one tensor of a file that is open
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leantune.anatomy import find_head
from leantune.errors import UserError

_ROWS = 512  # read from a file at once


@dataclass(frozen=True, eq=False)
class ModuleCut:
    """What happens to one linear layer.

    Attributes:
        in_features: Before.
        out_features: Before.
        keep_in: Kept input features, int64, ascending; None for all.
        keep_out: Kept output features, as `keep_in`.
        scale_in: float32, one factor for each kept input feature (folded masks); None for ones.
    """

    in_features: int
    out_features: int
    keep_in: Tensor | None = None
    keep_out: Tensor | None = None
    scale_in: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ParameterCut:
    """What happens to one parameter.

    Attributes:
        shape: Before.
        keep: For each dimension the kept indices (int64, ascending), or None for all.
        scale: float32 factors along `scale_dim`, one for each kept index; None for ones.
        scale_dim: The dimension of input features.
    """

    shape: tuple[int, ...]
    keep: tuple[Tensor | None, ...]
    scale: Tensor | None = None
    scale_dim: int = 0

    @property
    def new_shape(self) -> tuple[int, ...]:
        """After."""
        return tuple(n if k is None else len(k) for n, k in zip(self.shape, self.keep, strict=True))


def parameter_cuts(model: nn.Module, cuts: Mapping[str, ModuleCut]) -> dict[str, ParameterCut]:
    """What happens to each parameter, by its name inside `find_head(model)`; the model may be on meta.

    Raises:
        UserError: A layer is quantised, or has other sizes than the cuts were made for.
    """
    head = find_head(model)
    found: dict[str, ParameterCut] = {}
    for name, cut in cuts.items():
        for key, keep in _dimensions(name, head.get_submodule(name), cut).items():
            folded = key == "weight" and cut.scale_in is not None
            dim = 0 if isinstance(head.get_submodule(name), Conv1D) else 1
            shape = tuple(head.get_submodule(name).get_parameter(key).shape)
            found[f"{name}.{key}"] = ParameterCut(shape, keep, cut.scale_in if folded else None, dim)
    return found


def _dimensions(name: str, module: nn.Module, cut: ModuleCut) -> dict[str, tuple[Tensor | None, ...]]:
    """The kept indices along each dimension of each parameter of a layer."""
    if isinstance(module, nn.Linear):
        weight, shape = (cut.keep_out, cut.keep_in), (cut.out_features, cut.in_features)
    elif isinstance(module, Conv1D | nn.Embedding):
        weight, shape = (cut.keep_in, cut.keep_out), (cut.in_features, cut.out_features)
    else:
        raise UserError(f"{name} is a {type(module).__name__}: only plain linear layers can be pruned")
    _check_plain(name, module)
    if tuple(module.weight.shape) != shape:
        have, want = tuple(module.weight.shape), shape
        raise UserError(f"{name}: its weight has shape {have}, the plan is for {want}")
    keep: dict[str, tuple[Tensor | None, ...]] = {"weight": weight}
    if getattr(module, "bias", None) is not None:
        keep["bias"] = (cut.keep_out,)
    return keep


def _check_plain(name: str, module: Any) -> None:
    """A weight whose entries are its features': not packed, not a tensor class of a quantisation library."""
    weight = module.weight
    floats = weight.is_floating_point() and weight.element_size() > 1 and weight.dim() == 2
    own = type(module).__module__.startswith(("torch.", "transformers."))
    if not floats or type(weight.data) is not Tensor or not own:
        raise UserError(
            f"{name} ({type(module).__name__}) is quantised, or no plain linear layer, and cannot be cut: "
            f"prune the model in bf16, fp16 or fp32"
        )


def slice_parameter(source: Any, cut: ParameterCut) -> Tensor:
    """The cut tensor, in its own dtype, on its own device, in memory of its own.

    Args:
        source: The parameter, or a slice of an open safetensors file (`file.get_slice(name)`), of which no
            more than some rows beyond the result are in memory at any time.
        cut: From `parameter_cuts`.

    Raises:
        UserError: The tensor has another shape.
    """
    shape = tuple(source.shape if isinstance(source, Tensor) else source.get_shape())
    if shape != cut.shape:
        raise UserError(f"a tensor has shape {shape}, the plan is for {cut.shape}")
    if not isinstance(source, Tensor):
        return _read(source, cut)
    result = _scaled(_select(source.detach(), cut.keep), cut.scale, cut.scale_dim)
    return result.contiguous() if result.data_ptr() != source.data_ptr() else result.clone()


def _read(source: Any, cut: ParameterCut) -> Tensor:
    rows = torch.arange(cut.shape[0]) if cut.keep[0] is None else cut.keep[0]
    result: Tensor | None = None
    done = 0
    for start in range(0, cut.shape[0], _ROWS):
        inside = rows[(rows >= start) & (rows < start + _ROWS)]
        if not len(inside):
            continue
        part = _select(source[start : start + _ROWS], (inside - start, *cut.keep[1:]))
        scale = cut.scale
        if scale is not None and cut.scale_dim == 0:
            scale = scale[done : done + len(inside)]
        if result is None:
            result = part.new_empty(cut.new_shape)
        result[done : done + len(inside)] = _scaled(part, scale, cut.scale_dim)
        done += len(inside)
    assert result is not None and done == len(rows)
    return result


def _select(tensor: Tensor, keep: Sequence[Tensor | None]) -> Tensor:
    for dim, index in enumerate(keep):
        if index is not None:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _scaled(tensor: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    """Factors multiplied in float32 or higher, result in the tensor's dtype."""
    if scale is None:
        return tensor
    exact = torch.promote_types(tensor.dtype, torch.float32)
    shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
    return (tensor.to(exact) * scale.to(tensor.device, exact).view(shape)).to(tensor.dtype)
