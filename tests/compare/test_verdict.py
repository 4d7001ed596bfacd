"""The rules behind the verdict, on figures invented for them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from leantune.report.verdict import Metric, Standing, cost_of, judge, standard_error, verdict

ACCURACY = Metric("accuracy")
LOSS = Metric("loss", lower_is_better=True)
LORA = Standing("lora", "LoRA", [0.90, 0.91, 0.92], 1.0, 1.0)


def other(values: list[float], memory: float | None = 0.5, time: float | None = 0.5, key: str = "x") -> Any:
    return Standing(key, key.upper(), values, memory, time)


def test_the_standard_error_is_the_textbooks() -> None:
    # variances 1 and 4, pooled 2.5, sqrt(2.5 · (1/3 + 1/3))
    assert standard_error([1, 2, 3], [2, 4, 6]) == pytest.approx(math.sqrt(2.5 * 2 / 3))
    assert standard_error([1, 2, 3], [5, 7]) == pytest.approx(
        math.sqrt((2 * 1 + 1 * 2) / 3 * (1 / 3 + 1 / 2))
    )
    assert standard_error([1], [2, 3]) is None


@pytest.mark.parametrize(
    ("values", "quality"),
    [
        ([0.90, 0.91, 0.92], "as good"),
        ([0.894, 0.904, 0.914], "as good"),  # 0.6 points below, noise 1.6
        ([0.88, 0.89, 0.90], "worse"),  # 2 points below
        ([0.93, 0.94, 0.95], "better"),
        ([0.99], "open"),
    ],
)
def test_quality(values: list[float], quality: str) -> None:
    assert judge(other(values), LORA, ACCURACY).quality == quality


def test_quality_where_lower_is_better() -> None:
    base = Standing("lora", "LoRA", [1.00, 1.01, 1.02], 1.0, 1.0)
    assert judge(other([1.30, 1.31, 1.32]), base, LOSS).quality == "worse"
    better = judge(other([0.70, 0.71, 0.72]), base, LOSS)
    assert better.quality == "better" and better.difference > 0
    assert better.says == "cheaper and better by 0.3 in loss"


def test_seeds_that_agree_to_the_last_digit() -> None:
    base = Standing("lora", "LoRA", [0.9, 0.9], 1.0, 1.0)
    assert judge(other([0.9, 0.9]), base, ACCURACY).quality == "as good"
    assert judge(other([0.901, 0.901]), base, ACCURACY).quality == "better"


@pytest.mark.parametrize(
    ("memory", "time", "cost"),
    [
        (0.5, 0.5, "cheaper"),
        (0.5, 1.04, "cheaper"),
        (1.0, 0.9, "cheaper"),
        (0.5, 1.5, "trade"),
        (1.5, 0.5, "trade"),
        (1.2, 1.0, "dearer"),
        (1.0, 1.0, "even"),
        (0.5, None, "cheaper"),
        (None, None, "unknown"),
    ],
)
def test_cost(memory: float | None, time: float | None, cost: str) -> None:
    assert cost_of(memory, time) == cost


@pytest.mark.parametrize(
    ("values", "memory", "time", "says"),
    [
        ([0.90, 0.91, 0.92], 0.5, 0.5, "cheaper and as good"),
        ([0.90, 0.91, 0.92], 1.0, 1.0, "within noise"),
        ([0.90, 0.91, 0.92], 1.2, 1.0, "within noise, but dearer"),
        ([0.90, 0.91, 0.92], 0.2, 1.5, "within noise, less memory for more time"),
        ([0.90, 0.91, 0.92], 1.5, 0.5, "within noise, less time for more memory"),
        ([0.88, 0.89, 0.90], 0.5, 0.5, "cheaper but worse by 2.0 points"),
        ([0.88, 0.89, 0.90], 1.0, 1.5, "worse by 2.0 points"),
        ([0.93, 0.94, 0.95], 0.5, 0.5, "cheaper and better by 3.0 points"),
        ([0.93, 0.94, 0.95], 1.5, 1.0, "better by 3.0 points, dearer"),
        ([0.93, 0.94, 0.95], 1.0, 1.0, "better by 3.0 points"),
        ([0.90], 0.5, 0.5, "cheaper, 1.0 points below, one seed"),
        ([0.93], None, None, "2.0 points above, one seed"),
    ],
)
def test_in_a_few_words(values: list[float], memory: float | None, time: float | None, says: str) -> None:
    assert judge(other(values, memory, time), LORA, ACCURACY).says == says


def test_the_cheapest_that_is_as_good_is_taken() -> None:
    said = verdict(
        LORA,
        [
            other([0.90, 0.91, 0.92], 0.7, 0.7, "a"),
            other([0.895, 0.905, 0.915], 0.3, 0.6, "b"),
            other([0.80, 0.81, 0.82], 0.1, 0.1, "c"),
            other([0.95, 0.96, 0.97], 1.1, 1.3, "d"),
        ],
        ACCURACY,
        failed=["E"],
    )
    assert said.advice == "b"
    assert said.text == (
        "Take B: as good as LoRA within noise (difference 0.5 points, noise 1.6 points), at 0.30× the memory "
        "and 0.60× the time. Best, if cost does not count: D, better than LoRA by 5.0 points, at 1.10× the "
        "memory and 1.30× the time. Cheaper still, but worse by 10.0 points: C, at 0.10× the memory and "
        "0.10× the time. Failed: E."
    )


def test_where_nothing_is_as_good_the_baseline_stays() -> None:
    said = verdict(LORA, [other([0.80, 0.81, 0.82])], ACCURACY)
    assert said.advice == "lora"
    assert said.text.startswith(
        "Stay with LoRA: nothing that is cheaper is as good. Cheaper, but worse by 10.0"
    )


def test_time_for_memory_is_offered() -> None:
    said = verdict(LORA, [other([0.90, 0.91, 0.92], 0.15, 1.4, "ckpt")], ACCURACY)
    assert said.advice == "lora"
    assert "If memory is what is short: CKPT, no worse, at 0.15× the memory and 1.40× the time." in said.text


def test_one_seed_gives_no_advice() -> None:
    base = Standing("lora", "LoRA", [0.9], 1.0, 1.0)
    said = verdict(base, [other([0.89], 0.3, 0.5, "a"), other([0.92], 1.0, 1.2, "b")], ACCURACY)
    assert said.advice is None
    assert said.text == (
        "One seed: no statement about noise, so no advice; take three seeds or more. On this one B is ahead, "
        "2.0 points above LoRA, at 1.00× the memory and 1.20× the time. Cheapest: A, at 0.30× the memory and "
        "0.50× the time, 1.0 points below LoRA."
    )
    assert "nothing is ahead" in verdict(base, [other([0.8])], ACCURACY).text


def test_alone() -> None:
    assert verdict(LORA, [], ACCURACY).text == "LoRA stands alone: there is nothing to compare it with."
