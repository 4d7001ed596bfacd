"""Floating-point operations that torch's own counter does not know: attention kernels of the CPU."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


def attention_flops(packet: Any, args: Any) -> int:
    """Operations of the CPU's fused attention, forward (two products) or backward (five); else 0."""
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return 2 * _product(args[0], args[1], args[2])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 5 * _product(args[1], args[2], args[3])
    return 0


def _product(query: Any, key: Any, value: Any) -> int:
    """One product of (batch, heads, k, d) with (batch, heads, n, d) transposed."""
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[2] * width
