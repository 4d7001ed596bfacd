"""Run folders to report on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

LONG_LABEL = "balance_not_updated_after_cheque_or_cash_deposit"
METRICS: dict[str, Any] = {
    "model": "bundled:minilm",
    "method": "lamda",
    "seed": 0,
    "versions": {"leantune": "0.1.0", "torch": "2.13.0+cpu"},
    "hardware": {"device": "cpu", "cores": 2, "memory_bytes": 16 * 2**30, "gpu": None, "gpus": []},
    "parameters": {
        "total": 22_800_000,
        "trainable_start": 480_000,
        "trainable_end": 66_509,
        "base_removed_fraction": 0.0,
        "head": 29_645,
    },
    "memory": {"saved_activation_bytes": 31_457_280, "peak_bytes": 1_263_000_000, "peak_kind": "cpu_rss"},
    "speed": {
        "step_seconds_median": 0.081,
        "tokens_per_second": 2931.4,
        "train_seconds": 163.2,
        "estimate_seconds": None,
    },
    "evaluation": {
        "validation": {"accuracy": 0.912, "macro_f1": 0.909, "loss": 0.36},
        "test": {"accuracy": 0.9153, "macro_f1": 0.9149, "loss": 0.341},
    },
    "adapter_bytes": 413_000,
}
RECIPE = """\
model: {path: bundled:minilm, task: classification}
data: {path: data/banking77, text: text, label: label}
lean:
  adapter: {type: lamda, r: 32}
train: {epochs: 3, batch_size: 16, learning_rate: 5.0e-4, seed: 0}
output: runs/banking77
"""


def log_lines(steps: int) -> list[dict[str, Any]]:
    """What a run of `steps` steps in three epochs logs."""
    rng = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = step / steps
        lines.append(
            {
                "step": step,
                "epoch": 3 * done,
                "loss": 4.3 * math.exp(-5 * done) + 0.25 + rng.uniform(-0.2, 0.2),
                "learning_rate": 5e-4 * (1 - done),
                "grad_norm": 2.5 * math.exp(-done) + rng.random(),
                "step_seconds": 0.08,
                "frozen_columns": math.floor(32 * done) / 32,
            }
        )
        if step % (steps // 3) == 0:
            lines.append(
                {
                    "step": step,
                    "epoch": 3 * done,
                    "evaluation": "validation",
                    "accuracy": 0.6 + 0.3 * done,
                    "macro_f1": 0.58 + 0.3 * done,
                    "loss": 0.9 - 0.5 * done,
                }
            )
    return lines


def prediction_rows(count: int) -> list[dict[str, Any]]:
    """Predictions of which every seventh is wrong, the surest ones last."""
    return [
        {
            "input": f"request {i}: my card has not arrived",
            "predicted": LONG_LABEL if i % 7 == 0 else "card_arrival",
            "label": "card_arrival",
            "score": round(0.5 + 0.49 * i / count, 4),
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, *, steps: int = 120, predictions: int = 40, **metrics: Any) -> Path:
    """A finished run; `metrics` replace keys of metrics.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS | metrics), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    write_jsonl(folder / "log.jsonl", log_lines(steps))
    write_jsonl(folder / "predictions.jsonl", prediction_rows(predictions))
    return folder
