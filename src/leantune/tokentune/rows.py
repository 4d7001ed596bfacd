"""The chosen rows of a batch of sequences: gathering them, and writing their keys and values back.

A choice is a LongTensor (batch, k) of ascending positions per row, padded with -1 where a row has fewer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rows:
    """A choice made ready for gathering.

    Attributes:
        choice: (batch, k) int64, padded with -1.
        index: (batch, k) int64: the choice, with empty slots set to the row's first chosen position. An empty
            slot thus computes something finite that nobody reads: its label is -100 and its gradient is 0.
        real: (batch, k) bool, False on empty slots; None if there are none.
        length: n, positions per sequence.
    """

    def __init__(self, choice: Tensor, length: int) -> None:
        self.choice, self.length = choice, length
        real = choice >= 0
        self.real: Tensor | None = None if bool(real.all()) else real
        self.index = choice if self.real is None else torch.where(real, choice, choice[:, :1].clamp_min(0))

    def __len__(self) -> int:
        return self.index.size(1)

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """Take the chosen positions of `x` along `axis`.

        Args:
            x: (batch or 1, …, n at `axis`, …). Axis 0 means that x has no batch axis: (n, d).
            axis: Which axis counts positions.

        Returns:
            (batch, …, k at `axis`, …). Its backward pass scatters.
        """
        if axis == 0:
            x, axis = x.unsqueeze(0), 1
        x = x.expand(self.index.size(0), *x.shape[1:])
        shape = [1] * x.dim()
        shape[0], shape[axis] = self.index.shape
        size = list(x.shape)
        size[axis] = self.index.size(1)
        return x.gather(axis, self.index.view(shape).expand(size))

    def fill(self, x: Tensor, value: Any) -> Tensor:
        """`x` (batch, k) with empty slots set to `value`."""
        return x if self.real is None else x.masked_fill(~self.real, value)

    def write(self, part: Tensor, full: Tensor) -> Tensor:
        """The recorded `full` (batch, heads, n, d) with `part` (batch, heads, k, d) in its chosen positions.

        In place: no second full-length copy exists. Gradient flows to `part` alone (K = [sg K_Ḡ ; K_G]).
        """
        return _Write.apply(part, full, self.index, self.real)

    def merge(self, part: Tensor, full: Tensor | None = None) -> Tensor:
        """A new (batch, n, d): `part` (batch, k, d) in the chosen positions, `full` (or 0) elsewhere."""
        if full is None:
            full = part.new_zeros(part.size(0), self.length, part.size(2))
        else:
            full = full.detach().clone()
        return _Write.apply(part.unsqueeze(1), full.unsqueeze(1), self.index, self.real).squeeze(1)


class _Write(torch.autograd.Function):
    """Scatter rows into a constant, in place; the backward pass gathers."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, full: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, real)
        # `.data` shares memory but not the version counter: a key that two layers share, or that a
        # checkpointed layer writes once more (the same values) when it is replayed, is no error for autograd
        out = full.data
        if real is None:
            out.scatter_(2, _wide(index, part), part.to(out.dtype))
        else:
            row, slot = real.nonzero(as_tuple=True)
            out[row, :, index[row, slot]] = part[row, :, slot].to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        index, real = ctx.saved_tensors
        size = (*grad.shape[:2], index.size(1), grad.size(3))
        part = grad.gather(2, index[:, None, :, None].expand(size))  # (batch, heads, k, d)
        if real is not None:
            part = part * real[:, None, :, None]
        return part, None, None, None


def _wide(index: Tensor, part: Tensor) -> Tensor:
    return index[:, None, :, None].expand(part.shape)


class Keep(torch.autograd.Function):
    """Identity on `x` that holds `extra` until the backward pass.

    Checkpointing saves a layer's inputs, but the recorded keys and values reach the layer by another way:
    they are put where autograd (and whoever measures it) sees them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *extra: Tensor) -> Tensor:
        """Returns `x`."""
        ctx.save_for_backward(*extra)
        ctx.count = len(extra)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Passes the gradient on."""
        return (grad, *[None] * ctx.count)
