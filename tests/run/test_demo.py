"""The demo, shortened: real weights, real data, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_real_model_learns_real_data(tmp_path: Path) -> None:
    changes = [
        "data.train_rows=2500",
        "data.evaluation_rows=400",
        "train.epochs=3",
        f"output={tmp_path / 'run'}",
    ]
    command = [sys.executable, "-m", "leantune.cli"]
    done = subprocess.run(
        [*command, "train", "recipes/banking77.yaml", *changes, "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    metrics = json.loads(done.stdout)
    assert metrics["evaluation"]["test"]["accuracy"] > 0.6  # 77 intents: chance is 0.013
    counts = metrics["parameters"]
    assert counts["trainable_end"] - counts["head"] == 37 * 32**2
    said = subprocess.run(
        [*command, "predict", str(tmp_path / "run"), "my card still has not arrived", "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(said.stdout)["predicted"] == "card_arrival"
