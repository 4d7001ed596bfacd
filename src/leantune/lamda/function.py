"""The r-dimensional part of a LaMDA adapter, as one autograd function that keeps almost nothing.

With z = A x (r numbers a token), rows as tokens, dS = LaMDA's trained S minus S0 and dB = B minus B0:

    h = z dS'                       (n, r)
    v = z (S0 + dS)'                (n, r)
    y = s [ h B0' + v dB' ]         (n, d_out),   dB = [ frozen | trained ] columns

Between forward and backward only z is kept, in the dtype of the model: h and v are r-dimensional and cheaper
to compute again than to keep, and no cast copy of a parameter outlives the forward pass.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LowRank(torch.autograd.Function):
    """y = s [ h B0' + v dB' ], see the head of this module.

    Products of width r run in the dtype of the trained parameters, products of width d_out in the dtype of z
    (bfloat16 on a bfloat16 model even though the parameters are float32, as under autocast).

    Args of `apply`:
        z: (..., r), the projected input.
        S: dS, (r, r), trained.
        B: Trained columns of dB, (d_out, r - f).
        S0: Diagonal (r,), or None for ones.
        B0: (d_out, r), or None for zeros.
        B_frozen: Frozen columns of dB, (d_out, f); f may be 0.
        scaling: s.
        held: Of the trained columns, the first `held` get gradient 0 (they are frozen, but where processes
            share the parameter it has to keep its shape).
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        S: Tensor,
        B: Tensor,
        S0: Tensor | None,
        B0: Tensor | None,
        B_frozen: Tensor,
        scaling: float,
        held: int,
    ) -> Tensor:
        """Compute y; keep z."""
        ctx.save_for_backward(z, S, B, S0, B0, B_frozen)
        ctx.scaling, ctx.held = scaling, held
        with _full_precision(z.device):
            h, v = _narrow(z.to(S.dtype), S, S0)
            wide = _wide(B, B0, B_frozen, z.dtype)  # (d_out, r) or, with B0, (d_out, 2r)
            narrow = v if B0 is None else torch.cat([h, v], dim=-1)
            return (narrow * scaling).to(z.dtype) @ wide.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of z, S and B."""
        z, S, B, S0, B0, B_frozen = ctx.saved_tensors
        for_z, for_S, for_B = ctx.needs_input_grad[:3]
        grad_z = grad_S = grad_B = None
        with _full_precision(z.device):
            rows = z.reshape(-1, z.shape[-1])  # (n, r)
            grad = grad.reshape(-1, grad.shape[-1]).to(z.dtype)  # (n, d_out)
            if for_z or for_S:
                g = (grad @ _wide(B, B0, B_frozen, z.dtype)).to(S.dtype) * ctx.scaling
                g_v = g if B0 is None else g[:, g.shape[1] // 2 :]  # (n, r)
                g_h = g if B0 is None else g[:, : g.shape[1] // 2] + g_v  # v contains h
                if for_S:
                    grad_S = g_h.T @ rows.to(S.dtype)
                if for_z:
                    grad_z = torch.addmm(g_v if S0 is None else g_v * S0, g_h, S)
                    grad_z = grad_z.to(z.dtype).reshape(z.shape)
            if for_B:
                grad_B = _grad_of_columns(grad, rows, S, S0, B, B_frozen.shape[1], ctx.scaling, ctx.held)
        return grad_z, grad_S, grad_B, None, None, None, None, None


def _narrow(z: Tensor, S: Tensor, S0: Tensor | None) -> tuple[Tensor, Tensor]:
    """h = z dS' and v = z (S0 + dS)', both (..., r)."""
    h = z @ S.T
    return h, h + (z if S0 is None else z * S0)


def _wide(B: Tensor, B0: Tensor | None, B_frozen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B0 | frozen | trained] in `dtype`: joining columns is cheaper than adding wide products."""
    parts = [part.to(dtype) for part in (B0, B_frozen, B) if part is not None and part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _grad_of_columns(
    grad: Tensor,
    rows: Tensor,
    S: Tensor,
    S0: Tensor | None,
    B: Tensor,
    frozen: int,
    scaling: float,
    held: int,
) -> Tensor:
    """dL/dB for the trained columns, (d_out, r - f); zero for the first `held` of them."""
    _, v = _narrow(rows.to(S.dtype), S, S0)
    v = (v[:, frozen + held :] * scaling).to(grad.dtype)
    grad_B = (grad.T @ v).to(B.dtype)
    return torch.cat([torch.zeros_like(B[:, :held]), grad_B], dim=1) if held else grad_B


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside: the dtypes are chosen on purpose, and backward must compute what forward did."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
