"""Recipes for the tests of runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from leantune.recipes import Recipe
from leantune.recipes.loading import validate

# One row a method: every test of runs goes through all of them.
SETTINGS: dict[str, dict[str, Any]] = {
    "lamda": {"adapter": {"type": "lamda", "r": 4}},
    "lamda++": {"adapter": {"type": "lamda", "spectral_ranks": {"budget": 4, "choices": [2, 4, 6, 8]}}},
    "lamda gradient": {"adapter": {"type": "lamda", "r": 4, "init": "gradient", "init_b": "vectors"}},
    "lora": {"adapter": {"type": "lora", "r": 4, "dropout": 0.1}},
    "bottleneck": {"adapter": {"type": "bottleneck", "r": 4, "dropout": 0.1}},
    "full": {"adapter": {"type": "none"}},
    "tokentune": {"adapter": {"type": "none"}, "tokens": {"keep": 0.5}},
    "lamda+tokentune": {"adapter": {"type": "lamda", "r": 4}, "tokens": {"keep": 0.5}},
    "lora+light-peft": {
        "adapter": {"type": "lora", "r": 4, "dropout": 0.1},
        "prune": {"heads": "1/4", "neurons": "1/3", "modules": 0.5, "ranks": 0.5, "estimate_steps": 4},
    },
    "lamda+light-peft": {
        "adapter": {"type": "lamda", "r": 4},
        "prune": {"ranks": 0.25, "estimate_steps": 0.5},
    },
    "bottleneck+light-peft": {
        "adapter": {"type": "bottleneck", "r": 4},
        "prune": {"modules": 0.25, "ranks": 0.25, "estimate_steps": 4},
    },
    "lean": {
        "adapter": {"type": "lamda", "r": 4},
        "prune": {"estimate_steps": 4, "heads": "1/4", "heads_scope": "global"},
        "tokens": {"keep": 0.5},
    },
    "lora+light-peft+tokentune": {
        "adapter": {"type": "lora", "r": 4},
        "prune": {"estimate_steps": 4, "heads": 0.5, "neurons": 0.5, "neurons_scope": "layer"},
        "tokens": {"keep": 0.5},
    },
    "lora+int8": {"adapter": {"type": "lora", "r": 4, "dropout": 0.1}, "quantize": "int8"},
    "lamda+tokentune+int8-torchao": {
        "adapter": {"type": "lamda", "r": 4},
        "tokens": {"keep": 0.5},
        "quantize": "int8-torchao",
    },  # fmt: skip
    "lora+tokentune": {"adapter": {"type": "lora", "r": 4, "dropout": 0.1}, "tokens": {"keep": 4}},
}


def recipe(
    base: Path, rows: Path, output: Path, lean: dict[str, Any] | None = None, **changes: Any
) -> Recipe:
    """A classification run of 12 steps; `changes` are whole groups to update, e.g. `train={"epochs": 1}`."""
    groups: dict[str, Any] = {
        "model": {"path": str(base), "task": "classification"},
        "data": {"path": str(rows)},
        "lean": lean or SETTINGS["lamda"],
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 5e-3},
    }
    for name, group in changes.items():
        groups[name] = {**groups[name], **group}
    return validate({**groups, "output": str(output)}, "test")


def quiet() -> Console:
    """A console that keeps what is printed."""
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    """What a `quiet` console was told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
