"""Checks of the settings that PEFT configs have in common. Each raises a UserError of one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from leantune.errors import UserError


def check_ranks(config: Any) -> None:
    """`r` and the values of `rank_pattern` are whole numbers, 1 or more."""
    for key, r in {"r": config.r, **_entries("rank_pattern", config.rank_pattern)}.items():
        if not is_whole(r) or r < 1:
            raise UserError(f"{key}={r!r}: must be a whole number, 1 or more")


def check_positive(config: Any, name: str) -> None:
    """The alpha called `name` (None stands for r) and the values of `alpha_pattern` are above 0."""
    alphas = _entries("alpha_pattern", config.alpha_pattern)
    if getattr(config, name) is not None:
        alphas[name] = getattr(config, name)
    for key, alpha in alphas.items():
        if not is_number(alpha) or alpha <= 0:
            raise UserError(f"{key}={alpha!r}: must be a number above 0 (or None for `r`)")


def check_share(config: Any, name: str, closed: bool) -> None:
    """A number in [0, 1] if `closed`, else in [0, 1)."""
    value = getattr(config, name)
    if not is_number(value) or not 0 <= value <= 1 or (value == 1 and not closed):
        raise UserError(f"{name}={value!r}: must be a number in [0, 1{']' if closed else ')'}")


def check_choices(config: Any, accepted: Mapping[str, tuple[Any, ...]]) -> None:
    """Each setting is one of what is accepted for it."""
    for key, choices in accepted.items():
        value = getattr(config, key)
        if value not in choices:
            raise UserError(f"{key}={value!r}: must be one of {', '.join(map(repr, choices))}")


def check_layers(config: Any) -> None:
    """`layers_to_transform` and `layers_pattern` fit `target_modules`, as in PEFT."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear":
        for key in ("layers_to_transform", "layers_pattern"):
            if getattr(config, key) is not None:
                raise UserError(
                    f"{key}={getattr(config, key)!r}: cannot be combined with target_modules="
                    f"{config.target_modules!r}, a regular expression; list names, or put layers into it"
                )
    if config.layers_pattern and config.layers_to_transform is None:
        raise UserError(f"layers_pattern={config.layers_pattern!r}: needs layers_to_transform as well")


def is_whole(value: Any) -> bool:
    """A whole number, True and False aside."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite number, True and False aside."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _entries(key: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{key}[{name!r}]": value for name, value in pattern.items()}
