"""A linear map whose weight is wider than its input, without wide copies of either.

The adapter's parameters are float32 even on a bfloat16 model. Casting the input would keep a float32 copy of
it for the backward pass; casting the weight with `F.linear` would keep a bfloat16 copy of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W' + b in the dtype of x (under autocast, of autocast): (..., d_in) -> (..., d_out).

    Between forward and backward it keeps x and nothing else.

    Args:
        x: (..., d_in).
        W: (d_out, d_in), of any floating dtype.
        b: (d_out,), in the dtype of W, or None.
    """
    if W.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, W, b)
    return _CastLinear.apply(x, W, b)


class _CastLinear(torch.autograd.Function):
    """`F.linear` with the weight cast to the dtype of x, and cast again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Compute the product; keep x if W is trained."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W)
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W and b."""
        x, W = ctx.saved_tensors
        for_x, for_W, for_b = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (n, d_out)
        grad_x = grad @ W.to(grad.dtype) if for_x else None
        grad_W = (rows.T @ x.reshape(-1, x.shape[-1])).to(W.dtype) if for_W else None
        grad_b = rows.sum(0, dtype=W.dtype) if for_b else None
        return grad_x, grad_W, grad_b
