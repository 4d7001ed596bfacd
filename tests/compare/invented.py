"""A comparison whose figures are invented, for what only shows them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from leantune.comparison.plan import plan_cells, plan_methods
from leantune.comparison.results import collect
from leantune.recipes import Recipe
from leantune.recipes.loading import validate
from tests.report.runs import make_run, write_jsonl

# name → accuracy, MiB kept, ms a step, parameters trained
FIGURES = {
    "full": (0.913, 221, 369, 22_713_216),
    "lora": (0.896, 219, 334, 337_920),
    "lora+ckpt": (0.895, 31, 440, 337_920),
    "lamda": (0.888, 158, 351, 37_888),
    "tokentune": (0.878, 76, 290, 337_920),
    "light-peft": (0.881, 160, 241, 84_480),
    "lean": (0.884, 52, 195, 37_888),
}
HEAD = 29_645


def recipe() -> Recipe:
    data = {
        "model": {"path": "bundled:minilm", "task": "classification"},
        "data": {"path": "data/banking77", "text": "text", "label": "label_text"},
        "lean": {"adapter": {"type": "lamda", "r": 32}},
        "train": {"learning_rate": 5e-3},
        "output": "runs/banking",
    }
    return validate(data, "invented")


def make_comparison(folder: Path, seeds: int = 3, failing: str | None = "bottleneck") -> Path:
    """`compare.json` and the run folders that it is about."""
    folder.mkdir(parents=True)
    names = [*FIGURES, *([failing] if failing else [])]
    methods = plan_methods(recipe(), names, {"lora": 2e-3}, 480)
    cells = plan_cells(recipe(), methods, range(seeds), folder)
    for cell in cells:
        if cell.method.name in FIGURES:
            _run(cell.folder.path, cell.method.name, cell.seed, cell.method.estimation_steps)
    failures = {
        cell.name: "lean.adapter: r=33 is above the size" for cell in cells if cell.method.name == failing
    }
    timing = {name: _timing(name) for name in FIGURES}
    result = {
        "schema": 1,
        "complete": True,
        "command": f"leantune compare recipes/banking77.yaml --methods {','.join(names)} --seeds {seeds}",
        "recipe": recipe().to_dict(),
        "seeds": list(range(seeds)),
        "budget_steps": 480,
        **collect(cells, methods, failures, timing),
        "timing": {"interleaved": True, "rounds": 10, "batch_size": 16, "device": "cpu"},
        "versions": {"leantune": "0.1.0", "torch": "2.13.0+cpu"},
        "hardware": {"machine": "x86_64", "threads": 1, "gpus": []},
    }
    (folder / "compare.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def _run(folder: Path, name: str, seed: int, estimation: int) -> None:
    accuracy, kept, step, trained = FIGURES[name]
    draw = random.Random(f"{name}{seed}")
    found = accuracy + draw.gauss(0, 0.004)
    parameters: dict[str, Any] = {"total": 22_743_000, "trainable_start": trained + HEAD, "head": HEAD}
    removed = 0.16 if estimation else 0.0
    parameters |= {"trainable_end": trained + HEAD, "base_removed_fraction": removed}
    make_run(
        folder,
        steps=480 - estimation,
        seed=seed,
        parameters=parameters,
        memory={"saved_activation_bytes": kept * 2**20, "peak_bytes": 10**9, "peak_kind": "cpu_rss"},
        evaluation={"test": {"accuracy": found, "loss": 1 - found}},
        adapter_bytes=4 * trained,
    )
    steps = (160, 320, 480)
    lines = [
        {"step": s - estimation, "evaluation": "validation", "accuracy": found - 0.3 * (1 - s / 480) ** 2}
        for s in steps
    ]
    seen = [{"stage": "estimation", "step": s, "loss": 2.0, "step_seconds": 0.1} for s in range(estimation)]
    write_jsonl(folder / "log.jsonl", [*seen, *lines, {"step": 1, "loss": 1.0, "step_seconds": 0.08}])
    if estimation:
        _plan(folder / "pruning")


def _plan(folder: Path) -> None:
    folder.mkdir()
    groups = {}
    for layer in range(6):
        kept = [unit for unit in range(12) if (unit + layer) % 3]
        groups[f"encoder.layer.{layer}.attention.self"] = {"kind": "heads", "count": 12, "kept": kept}
        neurons = list(range(800 + 64 * layer))
        groups[f"encoder.layer.{layer}.intermediate"] = {"kind": "neurons", "count": 1536, "kept": neurons}
    modules = {"encoder.layer.0.attention.self.query": {"rank": 8, "kept": [0, 3, 5], "importance": 0.12}}
    (folder / "plan.json").write_text(json.dumps({"groups": groups, "modules": modules}), encoding="utf-8")


def _timing(name: str) -> dict[str, Any]:
    step, base = FIGURES[name][2] / 1000, FIGURES["lora"][2] / 1000
    return {
        "seconds": {"step": [step], "inference": [step / 4]},
        "step_seconds": step,
        "step_ratio": step / base,
        "inference_seconds": step / 4,
        "inference_ratio": step / base,
    }
