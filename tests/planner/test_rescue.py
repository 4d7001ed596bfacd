"""What a run that ran out of memory is told."""

from __future__ import annotations

import re

import pytest
from transformers import BertConfig

from leantune.planner.rescue import what_would_fit
from leantune.recipes import Recipe
from leantune.recipes.loading import validate

CONFIG = BertConfig(
    hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256, vocab_size=100
)


@pytest.fixture
def made() -> Recipe:
    return validate(
        {
            "model": {"path": "some/model", "task": "classification"},
            "data": {"path": "rows"},
            "lean": {"adapter": {"type": "lora", "r": 8}},
            "output": "run",
        },
        "test",
    )


def needed(told: str) -> list[float]:
    return [float(size) for size in re.findall(r"\(([\d.]+) MiB\)", told)]


def test_less_is_told_first_what_changes_least(made: Recipe) -> None:
    told = what_would_fit(made, CONFIG, 1, 512, None)
    assert told is not None
    own = float(re.findall(r"forecast at ([\d.]+) MiB", told)[0])
    first = told.split("would fit by that: ")[1]
    assert first.startswith("train.gradient_checkpointing=true (") and "data.max_length=" in first
    assert all(size < own for size in needed(told))


def test_nothing_larger_than_there_was(made: Recipe) -> None:
    had = 9 << 20
    told = what_would_fit(made, CONFIG, 1, 512, had)
    assert told is not None and all(size <= 9 for size in needed(told))
    assert "would fit" in told


def test_if_nothing_surely_fits_what_needs_less_is_told(made: Recipe) -> None:
    told = what_would_fit(made, CONFIG, 1, 512, 1 << 10)
    assert told is not None and "; need less: train.gradient_checkpointing=true" in told


def test_several_rows_may_be_fewer(made: Recipe) -> None:
    told = what_would_fit(made, CONFIG, 8, 512, None)
    assert told is not None and "train.batch_size=4" in told
