"""What goes, given scores: exact counts whatever the ties.

Everything here works on plain scores, so a plan can come from masks, from a random draw (the control in the
experiments) or from anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from leantune.errors import UserError

Scores = Mapping[str, Tensor]
Kept = dict[str, tuple[int, ...]]


def keep_units(
    scores: Scores,
    ratio: Fraction,
    scope: str,
    multiple: int = 1,
    least: float = 0.0,
) -> Kept:
    """Which units of each group stay.

    Exactly floor(ratio · count) go: of each group (`layer`) or of all together (`global`). Ties go by
    position, the first one first. Kept widths are then raised to multiples of `multiple` (at most to the
    group's own width); globally the sum grows by less than one multiple, and groups share the rounding.

    Args:
        scores: Group → (count,), larger is more important.
        ratio: Share that goes, in [0, 1).
        scope: `layer` or `global`.
        multiple: Of which every kept width is a multiple.
        least: Share of its units that every group keeps under the global scope, at least one unit.

    Returns:
        Group → numbers of the kept units, ascending.

    Raises:
        UserError: The groups' least widths leave no room for that many removals.
    """
    if scope == "layer":
        widths = {
            name: _up(len(score) - math.floor(ratio * len(score)), multiple, len(score))
            for name, score in scores.items()
        }
    else:
        widths = _global_widths(scores, ratio, multiple, least)
    return {name: _top(scores[name], width) for name, width in widths.items()}


def keep_modules(importance: Mapping[str, float], ratio: Fraction) -> tuple[str, ...]:
    """The adapter's modules that stay: all but the floor(ratio · count) of lowest importance."""
    names = list(importance)
    kept = _top(
        torch.tensor([importance[name] for name in names]), len(names) - math.floor(ratio * len(names))
    )
    return tuple(names[number] for number in kept)


def keep_ranks(importance: Scores, ratio: Fraction) -> Kept:
    """The ranks that stay, over all modules together; a module that keeps none is left out.

    Args:
        importance: Module → (r,).
        ratio: Share of all ranks that goes.
    """
    if not importance:
        return {}
    owners = [(name, rank) for name, score in importance.items() for rank in range(len(score))]
    scores = torch.cat([score.detach().double().cpu() for score in importance.values()])
    kept: dict[str, list[int]] = {}
    for number in _top(scores, len(owners) - math.floor(ratio * len(owners))):
        name, rank = owners[number]
        kept.setdefault(name, []).append(rank)
    return {name: tuple(ranks) for name, ranks in kept.items()}


def _global_widths(scores: Scores, ratio: Fraction, multiple: int, least: float) -> dict[str, int]:
    counts = {name: len(score) for name, score in scores.items()}
    floors = {name: _up(max(1, math.ceil(least * count)), multiple, count) for name, count in counts.items()}
    removals = math.floor(ratio * sum(counts.values()))
    if removals > sum(counts.values()) - sum(floors.values()):
        raise UserError(
            f"cannot remove {removals} of {sum(counts.values())} units over all layers: every layer keeps at "
            f"least {max(floors.values())}; lower the ratio or the least width"
        )
    owners = [name for name, count in counts.items() for _ in range(count)]
    flat = (
        torch.cat([score.detach().double().cpu() for score in scores.values()]) if scores else torch.empty(0)
    )
    widths, left = dict(counts), removals
    for number in torch.argsort(flat, stable=True).tolist():
        if not left:
            break
        name = owners[number]
        if widths[name] > floors[name]:
            widths[name] -= 1
            left -= 1
    return _rounded(widths, counts, multiple)


def _rounded(widths: dict[str, int], counts: dict[str, int], multiple: int) -> dict[str, int]:
    """Widths as multiples; the largest remainders go up, so that the sum grows by less than a multiple."""
    rounded = {
        name: width if width == counts[name] else width // multiple * multiple
        for name, width in widths.items()
    }
    missing = sum(widths.values()) - sum(rounded.values())
    for name in sorted(widths, key=lambda name: rounded[name] - widths[name]):
        if missing <= 0:
            break
        raised = min(rounded[name] + multiple, counts[name])
        missing -= raised - rounded[name]
        rounded[name] = raised
    return rounded


def _up(width: int, multiple: int, count: int) -> int:
    return min(-(-width // multiple) * multiple, count)


def _top(score: Tensor, width: int) -> tuple[int, ...]:
    """Numbers of the `width` largest, ascending; among equals the later ones stay."""
    order = torch.argsort(score.detach().double().cpu(), stable=True)
    return tuple(sorted(order[len(order) - width :].tolist()))
