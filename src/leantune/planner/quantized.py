"""Quantised base weights as bitsandbytes stores them: how many bytes, and a stand-in that can be traced.

    nf4, fp4    4 bits a weight; a scale for every 64, itself 8 bits with one float32 for 256 of them (double
                quantisation): 4.127 bits a weight. Without double quantisation, a float32 scale: 4.5 bits.
    int8        8 bits a weight, a float32 scale for each row of the matrix.

A layer dequantises its whole weight for its product, forward and backward, and lets it go: for the peak the
largest layer counts. nf4 keeps nothing more for the backward pass than an ordinary frozen layer; int8 keeps
its input (bitsandbytes 0.50: `ctx.A`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from leantune.anatomy import find_head, find_stacks

Storage = Literal["nf4", "fp4", "int8"]
STORAGES: tuple[str, ...] = get_args(Storage)
BLOCK, NESTED_BLOCK = 64, 256
_CODES = (16, 256)  # float32 tables: of the weights, of the scales


@dataclass(frozen=True)
class Bytes:
    """Of one quantised weight.

    Attributes:
        packed: The numbers themselves.
        scales: What is needed to read them.
        read: The weight as it is when it is used.
    """

    packed: int
    scales: int
    read: int


def storage_bytes(weight: Tensor, storage: Storage, dtype: torch.dtype, double: bool = True) -> Bytes:
    """Bytes of a weight, stored quantised.

    Args:
        weight: (d_out, d_in); only its shape is looked at.
        storage: How.
        dtype: Of the products.
        double: nf4: whether the scales are quantised, too.
    """
    count = weight.numel()
    scales = sum(t.numel() * t.element_size() for t in _scales(weight, storage, double))
    return Bytes(_packed(weight, storage).numel(), scales, count * dtype.itemsize)


def _packed(weight: Tensor, storage: Storage) -> Tensor:
    if storage == "int8":
        return torch.empty(weight.shape, dtype=torch.int8, device="meta")
    return torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")


def _scales(weight: Tensor, storage: Storage, double: bool) -> Iterator[Tensor]:
    if storage == "int8":
        yield torch.empty(weight.shape[0], device="meta")
        return
    blocks = -(-weight.numel() // BLOCK)
    yield torch.empty(_CODES[0], device="meta")
    if not double:
        yield torch.empty(blocks, device="meta")
        return
    yield torch.empty(blocks, dtype=torch.uint8, device="meta")
    yield torch.empty(-(-blocks // NESTED_BLOCK), device="meta")
    yield torch.empty(_CODES[1], device="meta")
    yield torch.empty((), device="meta")  # the scales' mean


def quantizable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Owner, name and module of each linear layer that a run would quantise: those inside the stack."""
    layers = [layer for stack in find_stacks(find_head(model)) for layer in stack.layers]
    for owner in [module for layer in layers for module in layer.modules()]:
        for name, module in list(owner.named_children()):
            is_linear = isinstance(module, nn.Linear | Conv1D) and not _is_adapter(owner)
            if is_linear and not any(p.requires_grad for p in module.parameters()):
                yield owner, name, module


def _is_adapter(owner: nn.Module) -> bool:
    return isinstance(owner, nn.ModuleDict)  # PEFT's home for an adapter's own layers


class QuantizedStandIn(nn.Module):
    """A linear layer with the storage and the traffic of bitsandbytes' own, for tensors without numbers.

    Args:
        layer: On meta.
        storage: How its weight is stored.
        dequantising: Context in which the dequantised weight is made, so that a tracker can name it.
    """

    def __init__(
        self, layer: Any, storage: Storage, dequantising: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__()
        self.is_transposed = isinstance(layer, Conv1D)
        size = layer.weight.shape[::-1] if self.is_transposed else layer.weight.shape
        self.out_features, self.in_features = size
        self.dtype, self.dequantising, self.keeps_input = layer.weight.dtype, dequantising, storage == "int8"
        self.weight = nn.Parameter(_packed(layer.weight, storage), requires_grad=False)
        self.bias = layer.bias
        for number, scale in enumerate(_scales(layer.weight, storage, double=True)):
            self.register_buffer(f"scale_{number}", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out)."""
        product: Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias

    def dequantised(self) -> Tensor:
        """The whole weight, (d_out, d_in)."""
        with self.dequantising():
            return self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)


class _Product(torch.autograd.Function):
    """x W' with W made twice: nothing of it is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedStandIn) -> Tensor:
        ctx.layer, ctx.x = layer, x if layer.keeps_input else None
        return F.linear(x, layer.dequantised().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return grad @ ctx.layer.dequantised().to(grad.dtype), None


def stand_in(
    model: nn.Module, storage: Storage, dequantising: Callable[[], AbstractContextManager[None]]
) -> None:
    """Put a `QuantizedStandIn` in the place of every layer that would be loaded quantised."""
    for owner, name, module in list(quantizable(model)):
        setattr(owner, name, QuantizedStandIn(module, storage, dequantising))


def quantize_for_real(model: PreTrainedModel, storage: Storage, device: str = "cpu") -> None:
    """bitsandbytes' own layers, with the model's weights, in place; to hold forecasts against.

    Args:
        model: With weights; they are frozen.
        storage: How.
        device: Where they are packed and stay.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    import bitsandbytes as bnb

    for owner, name, module in list(quantizable(model.requires_grad_(False))):
        kept: Any = module
        options: dict[str, Any] = {"bias": kept.bias is not None}
        if storage != "int8":
            new: Any = bnb.nn.Linear4bit(
                kept.in_features,
                kept.out_features,
                quant_type=storage,
                compute_dtype=kept.weight.dtype,
                **options,
            )
            new.weight = bnb.nn.Params4bit(
                kept.weight.data, requires_grad=False, quant_type=storage, module=new
            )
            new.support_avx512bf16_for_cpu = False  # it would cut the gradient (HOSTS: quantised bases)
        else:
            new = bnb.nn.Linear8bitLt(kept.in_features, kept.out_features, has_fp16_weights=False, **options)
            new.weight = bnb.nn.Int8Params(kept.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = kept.bias
        setattr(owner, name, new.to(device))
    setattr(model, "is_loaded_in_8bit" if storage == "int8" else "is_loaded_in_4bit", True)
