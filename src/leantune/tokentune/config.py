"""What to choose: the one setting object of TokenTune."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from leantune.errors import UserError

Strategy = Literal["random", "span", "supervised", "loss", "attention", "norm"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
# Those that need nothing of a forward pass.
CHOOSE_AHEAD = ("random", "span", "supervised")


@dataclass(frozen=True)
class TokenTuneConfig:
    """Back-propagate through `keep` tokens of every sequence (TokenTune, arXiv 2501.18824).

    Attributes:
        keep: An int: that many tokens per sequence (or all of a shorter one). A float in (0, 1]: that
            fraction of the sequence's real (unpadded) length r, exactly ⌊keep · r + ½⌋ tokens and at least
            one. Beware that `1` is one token and `1.0` is all of them.
        strategy: `random`: uniform (the paper). `span`: consecutive ones, among them one that bears a label;
            so what they attend to most, their neighbours, is chosen with them. `supervised`: tokens that bear
            a label first, uniform among them. `loss`: the highest loss first. `attention`: first those that
            get most attention in the last layer, from the position that feeds the head (where no one position
            does, from all in the mean). `norm`: the largest hidden state before the last layer first.
        seed: Of the draw, together with the step and the process's rank.
        checkpointed_kv: With gradient checkpointing, whether the keys and values of all tokens are made again
            for the backward pass (`recompute`: least memory, one more forward without gradient) or kept
            (`keep`: fastest; with as many key heads as query heads they are larger than the checkpoints
            themselves).

    Raises:
        UserError: A field has a value that means nothing.
    """

    keep: int | float = 0.25
    strategy: Strategy = "random"
    seed: int = 0
    checkpointed_kv: Literal["recompute", "keep"] = "recompute"

    def __post_init__(self) -> None:
        keep = self.keep
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise UserError(f"keep={keep!r}: give an int (tokens per sequence) or a fraction in (0, 1]")
        if isinstance(keep, int) and keep < 1:
            raise UserError(f"keep={keep}: at least 1 token per sequence must be kept")
        if isinstance(keep, float) and not (math.isfinite(keep) and 0 < keep <= 1):
            raise UserError(f"keep={keep}: a fraction must lie in (0, 1]; for a number of tokens give an int")
        if self.strategy not in STRATEGIES:
            raise UserError(f"strategy={self.strategy!r}: choose one of {', '.join(STRATEGIES)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"seed={self.seed!r}: give a whole number from 0")
        if self.checkpointed_kv not in ("recompute", "keep"):
            raise UserError(f"checkpointed_kv={self.checkpointed_kv!r}: choose one of recompute, keep")

    def count(self, real: Tensor) -> Tensor:
        """How many tokens are chosen.

        Args:
            real: Real length of each row, (batch,) int64.

        Returns:
            (batch,) int64, between 1 and the real length (0 for a row that is all padding).
        """
        if isinstance(self.keep, int):
            return real.clamp_max(self.keep)
        # 1e-9: keep · r is meant as a decimal (0.3 · 5 is one and a half, not a little less)
        wanted = torch.floor(real.double() * self.keep + 0.5 + 1e-9).long()
        return torch.minimum(wanted.clamp_min(1), real)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a JSON file."""
        return asdict(self)
