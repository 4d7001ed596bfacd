"""What several processes hold together: sums over all of them, and tensors that they have in pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def processes() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; every process must call it."""
    if processes() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def whole(tensor: Any) -> Tensor:
    """A tensor in one piece, also where FSDP2 shares it out (then every process must call it)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
