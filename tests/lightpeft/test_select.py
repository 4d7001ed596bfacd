"""Which units go: exact counts, whatever the ties."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantune.errors import UserError
from leantune.lightpeft import LightPeftConfig
from leantune.lightpeft.config import ratio
from leantune.lightpeft.select import keep_modules, keep_ranks, keep_units

SCORES = st.lists(
    st.lists(st.integers(0, 3), min_size=2, max_size=24), min_size=1, max_size=5
)  # few values: many ties
RATIO = st.fractions(0, Fraction(99, 100), max_denominator=100)


def named(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {f"layer {number}": torch.tensor(row, dtype=torch.float32) for number, row in enumerate(rows)}


@settings(max_examples=200, deadline=None)
@given(rows=SCORES, share=RATIO)
def test_a_layer_loses_exactly_its_share(rows: list[list[int]], share: Fraction) -> None:
    kept = keep_units(named(rows), share, "layer")
    for name, score in named(rows).items():
        gone = sorted(set(range(len(score))) - set(kept[name]))
        assert len(gone) == math.floor(share * len(score))
        assert not gone or score[gone].max() <= score[list(kept[name])].min(), "the least important go"


@settings(max_examples=200, deadline=None)
@given(rows=SCORES, share=RATIO)
def test_all_layers_together_lose_exactly_their_share(rows: list[list[int]], share: Fraction) -> None:
    scores = named(rows)
    total = sum(map(len, rows))
    removals = math.floor(share * total)
    if removals > total - len(rows):
        with pytest.raises(UserError, match=f"cannot remove {removals} of {total}"):
            keep_units(scores, share, "global")
        return
    kept = keep_units(scores, share, "global")
    assert sum(map(len, kept.values())) == total - removals
    assert all(kept.values()), "no layer is emptied"


@settings(max_examples=200, deadline=None)
@given(rows=SCORES, share=RATIO, multiple=st.integers(1, 9))
def test_widths_are_multiples(rows: list[list[int]], share: Fraction, multiple: int) -> None:
    scores = named(rows)
    total = sum(map(len, rows))
    removals = math.floor(share * total)
    for scope in ("layer", "global"):
        try:
            kept = keep_units(scores, share, scope, multiple)
        except UserError:
            continue
        for name, units in kept.items():
            assert len(units) % multiple == 0 or len(units) == len(scores[name])
        if scope == "global" and all(len(row) % multiple == 0 for row in rows):
            assert 0 <= sum(map(len, kept.values())) - (total - removals) < multiple


def test_what_is_kept_under_ties_does_not_depend_on_the_machine() -> None:
    assert keep_units({"a": torch.ones(6)}, Fraction(1, 3), "layer") == {"a": (2, 3, 4, 5)}
    assert keep_units({"a": torch.ones(16)}, Fraction(1, 3), "layer")["a"] == tuple(range(5, 16))


def test_every_layer_keeps_its_least_width() -> None:
    scores = {"poor": torch.zeros(40), "rich": torch.ones(40)}
    kept = keep_units(scores, Fraction(1, 2), "global", multiple=1, least=0.25)
    assert {name: len(units) for name, units in kept.items()} == {"poor": 10, "rich": 30}


def test_modules_and_ranks() -> None:
    importance = {"a": 0.3, "b": 0.1, "c": 0.2}
    assert keep_modules(importance, Fraction(1, 2)) == ("a", "c")
    ranks = {"a": torch.tensor([5.0, 1.0]), "c": torch.tensor([0.5, 0.2]), "d": torch.tensor([3.0, 4.0])}
    assert keep_ranks(ranks, Fraction(1, 2)) == {"a": (0,), "d": (0, 1)}
    assert keep_ranks({}, Fraction(1, 2)) == {}


@pytest.mark.parametrize("value", [1, 1.0, -0.1, "4/3", "a third", "1/0", True, None, float("nan")])
def test_a_ratio_outside_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"heads=.*must be a share in \[0, 1\)"):
        LightPeftConfig(heads=value)  # type: ignore[arg-type]


def test_a_ratio_is_exact() -> None:
    assert ratio(0.1, "heads") == Fraction(1, 10)
    assert math.floor(ratio("1/3", "heads") * 9) == 3
