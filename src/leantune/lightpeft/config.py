"""Settings of Light-PEFT."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from leantune.errors import UserError

Ratio = float | str
SCOPES = ("layer", "global")
TAYLOR = ("terms", "sum")


@dataclass(frozen=True)
class LightPeftConfig:
    """How much is pruned, and how it is found out (Gu et al., Findings of ACL 2024, arXiv 2406.03792).

    A ratio is the share that is removed, in [0, 1): a number, or a fraction written out as `"1/3"`. Exactly
    floor(ratio · count) units go.

    Attributes:
        heads: Ratio of attention heads (of KV groups with all their query heads, under grouped queries).
        neurons: Ratio of FFN neurons.
        modules: Ratio of the adapter's modules.
        ranks: Ratio of the ranks of the modules that stay.
        heads_scope: `layer` removes the same number in every layer, `global` ranks all layers together.
        neurons_scope: As `heads_scope`.
        width_multiple: The kept width of every FFN is a multiple of this (64 or 128 suits tensor cores);
            where that cannot be exact, more neurons stay.
        least_neurons: No FFN is left with fewer neurons under the global scope, as a share of its width; of
            heads one always stays.
        lambda_heads: λ_A, weight of the L1 penalty on head masks.
        lambda_neurons: λ_F, on neuron masks.
        mask_learning_rate: Of the masks, which have an optimizer of their own (Adam).
        taylor: Importance of rank k: `terms` Σ|w·g| over its row of A and column of B, `sum`
            |Σ w·g| of A plus |Σ w·g| of B.
        fold: Scale the kept units' output weights by their masks, so the function does not jump when masks
            are taken off.

    Raises:
        UserError: A value is out of range or unknown.
    """

    heads: Ratio = "1/3"
    neurons: Ratio = "1/3"
    modules: Ratio = 0.0
    ranks: Ratio = 0.0
    heads_scope: str = "layer"
    neurons_scope: str = "global"
    width_multiple: int = 8
    least_neurons: float = 0.1
    lambda_heads: float = 1e-4
    lambda_neurons: float = 1e-4
    mask_learning_rate: float = 1e-2
    taylor: str = "terms"
    fold: bool = True

    def __post_init__(self) -> None:
        for key in ("heads", "neurons", "modules", "ranks"):
            ratio(getattr(self, key), key)
        for key, accepted in (("heads_scope", SCOPES), ("neurons_scope", SCOPES), ("taylor", TAYLOR)):
            value = getattr(self, key)
            if value not in accepted:
                raise UserError(f"{key}={value!r}: must be one of {', '.join(map(repr, accepted))}")
        if not isinstance(self.width_multiple, int) or self.width_multiple < 1:
            raise UserError(f"width_multiple={self.width_multiple!r}: must be a whole number, 1 or more")
        if not 0 <= self.least_neurons <= 1:
            raise UserError(f"least_neurons={self.least_neurons!r}: must be a number in [0, 1]")
        for key in ("lambda_heads", "lambda_neurons", "mask_learning_rate"):
            value = getattr(self, key)
            if not math.isfinite(value) or value < 0:
                raise UserError(f"{key}={value!r}: must be a number, 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def ratio(value: Any, key: str) -> Fraction:
    """A ratio as an exact number: 0.33 is 33/100, "1/3" a third.

    Raises:
        UserError: It is no number in [0, 1).
    """
    try:
        exact = Fraction(value if isinstance(value, str) else repr(value))
    except (ValueError, ZeroDivisionError):
        exact = Fraction(-1)
    if isinstance(value, bool) or not 0 <= exact < 1:
        raise UserError(f'{key}={value!r}: must be a share in [0, 1), as a number or as "1/3"')
    return exact
