"""Each method's learning rate: one rate for all would only show whose rate it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from leantune.errors import UserError
from leantune.recipes import Recipe
from leantune.recipes.schema import USUAL_LEARNING_RATE

# Name on the command line → adapter type in a recipe.
ADAPTERS = {"full": "none", "lora": "lora", "lamda": "lamda", "bottleneck": "bottleneck"}


class Rate(NamedTuple):
    """A learning rate, and where it comes from in a few words."""

    value: float
    source: str


def parse_rates(texts: Sequence[str]) -> dict[str, float]:
    """`["lora=2e-3"]` → {"lora": 0.002}.

    Raises:
        UserError: One is not METHOD=VALUE, or the value is no number above 0.
    """
    rates = {}
    for text in texts:
        name, sign, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not sign or not name.strip() or not (0 < number < math.inf):
            raise UserError(f"lr: {text!r} is not METHOD=VALUE with a number above 0, for example lora=2e-3")
        rates[name.strip()] = number
    return rates


def check_rates(rates: Mapping[str, float], methods: Sequence[str]) -> None:
    """See that each given rate is some method's.

    Raises:
        UserError: It names neither a method of the comparison nor an adapter, or is no number above 0.
    """
    for name, value in rates.items():
        if name not in methods and name not in ADAPTERS:
            accepted = ", ".join(dict.fromkeys([*methods, *ADAPTERS]))
            raise UserError(f"lr: {name!r} is not compared (accepted: {accepted})")
        if not 0 < value < math.inf:
            raise UserError(f"lr: {name} = {value!r}: must be a number above 0")


def rate_of(method: str, adapter: str, recipe: Recipe, given: Mapping[str, float]) -> Rate:
    """The method's learning rate.

    In this order: the one given for the method; the one given for its adapter (so that LoRA with and without
    checkpointing get the same); the recipe's own, where the adapter is the recipe's; else the adapter's usual
    rate, scaled as the recipe's own is to its adapter's usual rate.

    Args:
        method: Its name.
        adapter: Its adapter's type in the recipe.
        recipe: The recipe that is compared.
        given: Rates by method or adapter.
    """
    of_adapter = next(name for name, kind in ADAPTERS.items() if kind == adapter)
    for name in (method, of_adapter):
        if name in given:
            return Rate(given[name], f"given for {name}")
    own, own_adapter = recipe.train.learning_rate, recipe.lean.adapter.type
    assert own is not None  # filled in when a recipe is validated
    if adapter == own_adapter:
        return Rate(own, "the recipe's")
    usual = USUAL_LEARNING_RATE[adapter]
    scale = own / USUAL_LEARNING_RATE[own_adapter]
    if math.isclose(scale, 1):
        return Rate(usual, "the usual one")
    rate = float(f"{usual * scale:.3g}")
    return Rate(rate, f"the usual {usual:g}, times {scale:.3g} like the recipe's")
