"""LaMDA++: which layer gets which rank, from a score a layer and one budget for all. No tensors in here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leantune.errors import UserError
from leantune.peft_methods.checks import is_whole

DIRECTIONS = ("spread", "concentrated")
# The choices where none are named, as parts of the budget: 16, 24, 32, 48, 64 for a budget of 32.
_USUAL = (0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class SpectralRanks:
    """Settings of LaMDA++ (METHODS 1, "LaMDA++"): ranks by layer from the spectra of the pretrained weights.

    Every layer gets an energy score E = (sum of the k largest sigma_i^2) / ||W||_F^2 in [0, 1], taken at
    k = `budget` (in a layer that is smaller than that, at its full size: E = 1). Layers are ordered by it and
    given ranks out of `choices`; see `allocate`.

    Attributes:
        budget: The rank that all layers would have if they were treated alike. L layers may spend
            L * budget^2 trained parameters: the sum of their squared ranks is never above that.
        choices: Ranks to give out. Default: the budget times 1/2, 3/4, 1, 3/2 and 2. Those above the smaller
            side of a layer are not offered to it.
        more_rank_to: "spread": layers whose energy is less concentrated (low E) get more rank;
            "concentrated": the opposite.

    Raises:
        UserError: A value is out of range, or the budget not between the smallest and the largest choice.
    """

    budget: int = 32
    choices: Sequence[int] | None = None
    more_rank_to: str = "spread"

    def __post_init__(self) -> None:
        if not is_whole(self.budget) or self.budget < 1:
            raise UserError(f"spectral_ranks.budget={self.budget!r}: must be a whole number, 1 or more")
        choices = self.choices
        if choices is None:
            choices = [max(1, round(part * self.budget)) for part in _USUAL]
        if isinstance(choices, str) or not choices or not all(is_whole(c) and c >= 1 for c in choices):
            raise UserError(
                f"spectral_ranks.choices={self.choices!r}: must be a list of whole numbers, 1 or more"
            )
        choices = tuple(sorted(set(choices)))
        if not choices[0] <= self.budget <= choices[-1]:
            raise UserError(
                f"spectral_ranks.budget={self.budget}: must lie between the smallest and the largest of "
                f"spectral_ranks.choices={list(choices)}"
            )
        if self.more_rank_to not in DIRECTIONS:
            raise UserError(
                f"spectral_ranks.more_rank_to={self.more_rank_to!r}: must be one of "
                f"{', '.join(map(repr, DIRECTIONS))}"
            )
        object.__setattr__(self, "choices", choices)  # frozen, so set in this way


def allocate(
    scores: Mapping[str, float],
    sides: Mapping[str, int],
    settings: SpectralRanks,
    widths: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Ranks by layer: as many different ones as the budget allows, more to those who come first.

    1. Layers are ordered by score, the most deserving first (`more_rank_to`); equal scores by name.
    2. The shares of layers that get each choice are as even as the budget allows: the distribution of
       greatest entropy among those whose mean cost is that of `budget`.
    3. Down the order, the largest choice goes to the first such share of layers, the next to the next, and
       so on. A layer on the border of two shares gets the smaller rank, so the budget is kept.
    4. What is left over is spent by going down the order, again and again, raising each layer by one choice
       where that fits and does not lift it above a layer before it.

    So a layer never has a lower rank than one behind it in the order (unless it is too small for more), and
    no single layer could be raised any more.

    Args:
        scores: Layer name -> energy score.
        sides: Layer name -> the smaller of its two dimensions.
        settings: Budget, choices and direction.
        widths: Layer name -> d_in + d_out, if a rank costs that much, as in LoRA: the budget is then the sum
            of budget * width. Default: a rank of r costs r^2, as in LaMDA.

    Returns:
        Layer name -> rank, in the order of `scores`.

    Raises:
        UserError: A layer is smaller than the smallest choice; its name is given.
    """
    choices = tuple(settings.choices or ())
    sign = 1 if settings.more_rank_to == "spread" else -1
    order = sorted(scores, key=lambda name: (sign * scores[name], name))
    power = 2 if widths is None else 1
    units = {name: 1 if widths is None else widths[name] for name in order}
    highest = {name: _highest(name, sides[name], choices) for name in order}
    shares = even_shares([choice**power for choice in choices], settings.budget**power)
    level = _staircase(order, units, shares)
    level = {name: min(level[name], highest[name]) for name in order}
    left = sum(units[name] * (settings.budget**power - choices[level[name]] ** power) for name in order)
    _spend(order, units, level, highest, [choice**power for choice in choices], left)
    return {name: choices[level[name]] for name in scores}


def _highest(name: str, side: int, choices: Sequence[int]) -> int:
    """Index of the largest choice that fits into a layer."""
    fitting = [index for index, choice in enumerate(choices) if choice <= side]
    if not fitting:
        raise UserError(
            f"spectral_ranks.choices={list(choices)}: layer {name!r} takes ranks of at most {side}; add a "
            f"smaller choice, or leave the layer out with `exclude_modules`"
        )
    return fitting[-1]


def even_shares(prices: Sequence[int], mean: float) -> list[float]:
    """The most even shares with a given mean price: p_i proportional to exp(-b price_i), with b by bisection.

    Args:
        prices: Ascending.
        mean: Between the first and the last price; never exceeded by the result's mean.
    """
    span = prices[-1] - prices[0]
    if mean <= prices[0] or not span:
        return [1.0] + [0.0] * (len(prices) - 1)
    if mean >= prices[-1]:
        return [0.0] * (len(prices) - 1) + [1.0]
    scaled = [(price - prices[0]) / span for price in prices]
    target = (mean - prices[0]) / span

    def shares(b: float) -> list[float]:
        weights = [math.exp(-b * x if b >= 0 else b * (1 - x)) for x in scaled]
        return [weight / sum(weights) for weight in weights]

    low, high = -1e6, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if sum(p * x for p, x in zip(shares(middle), scaled, strict=True)) > target:
            low = middle
        else:
            high = middle
    return shares(high)


def _staircase(order: Sequence[str], units: Mapping[str, int], shares: Sequence[float]) -> dict[str, int]:
    """Index of each layer's choice if the choices are laid along the order, the largest first."""
    total, done = sum(units.values()), 0
    level, index, border = {}, len(shares) - 1, shares[-1]
    for name in order:
        done += units[name]
        while done / total > border and index > 0:
            index -= 1
            border += shares[index]
        level[name] = index
    return level


def _spend(
    order: Sequence[str],
    units: Mapping[str, int],
    level: dict[str, int],
    highest: Mapping[str, int],
    prices: Sequence[int],
    left: int,
) -> None:
    """Raise layers in `level` by a choice each, the most deserving first, until nothing more fits."""
    raised = True
    while raised:
        raised, ceiling = False, len(prices) - 1
        for name in order:
            now = level[name]
            if now < min(highest[name], ceiling):
                extra = units[name] * (prices[now + 1] - prices[now])
                if extra <= left:
                    level[name], left, raised = now + 1, left - extra, True
            if level[name] < highest[name]:  # a layer at its own limit holds nobody back
                ceiling = min(ceiling, level[name])
