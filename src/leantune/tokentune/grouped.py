"""Grouped-query attention of chosen rows without expanding keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from leantune.anatomy import Kernel


def folded_mask(mask: Tensor, fold: int) -> Tensor:
    """The mask (batch, heads or 1, k or 1, n) for `folded`: (batch, kv heads or 1, fold · k or 1, n)."""
    if mask.size(-2) == 1:
        return mask
    if mask.size(1) == 1:
        return mask.repeat(1, 1, fold, 1)
    return mask.unflatten(1, (-1, fold)).flatten(2, 3)


class _OneGroup:
    """The attention module as a kernel sees it when query heads are folded into rows."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.num_key_value_groups = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def folded(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    fold: int,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Grouped-query attention with the heads of a group as further rows of one head.

    The usual way expands K and V to the number of query heads, and SDPA keeps the expanded ones for its
    backward pass. Attention does not care which head a row came from, so nothing need be expanded.
    """
    batch, heads, k, d = query.shape
    query = query.reshape(batch, heads // fold, fold * k, d)
    output, _ = kernel(_OneGroup(module), query, key, value, mask, **kwargs)  # (batch, fold · k, kv heads, d)
    output = output.unflatten(1, (fold, k)).permute(0, 2, 3, 1, 4)  # (batch, k, kv heads, fold, d)
    return output.reshape(batch, k, heads, output.size(-1)), None
