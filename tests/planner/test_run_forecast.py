"""`leantune train` says first what it will take, and afterwards what it took beside that."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console
from transformers import BertConfig

from leantune.planner import estimate
from leantune.planner.run_forecast import forecast_run
from leantune.recipes import Recipe
from leantune.report import facts
from leantune.run import train
from tests.planner.settings import LORA, config, recipe, setting

ROWS = Dataset.from_dict({"input_ids": [[1] * 9, [1] * 48, [1] * 5, [1] * 4, [1] * 3, [1] * 2]})


def _forecast(own: Recipe) -> Any:
    return forecast_run(own, config("bert"), ROWS, evaluates=True, packed=True, cuda=False)


def test_it_is_the_closed_form_of_the_longest_row() -> None:
    made = _forecast(recipe("bert", {"adapter": LORA}, batch_size=4))
    figures = estimate(setting("bert", {"adapter": LORA}))
    assert made.peak_bytes == max(figures.peak, figures.evaluation_peak)
    assert made.line.startswith("forecast: about ") and "activations" in made.line


def test_it_never_stands_in_the_way() -> None:
    made = _forecast(recipe("bert", {"adapter": LORA}, optim="adafactor"))
    assert made.peak_bytes is None and "no forecast of memory: train.optim = 'adafactor'" in made.line
    plain = BertConfig(**config("bert").to_dict())
    assert plain.to_dict() == config("bert").to_dict()


def test_forecast_and_measured_stand_side_by_side(
    bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    own = Recipe.model_validate({
        "model": {"path": str(bert_folder), "task": "classification"},
        "data": {"path": str(data_folder), "label": "label"},
        "lean": {"adapter": LORA, "prune": {"estimate_steps": 2, "width_multiple": 1}},
        "train": {"steps": 2, "batch_size": 4},
        "output": str(tmp_path / "run"),
    })  # fmt: skip
    said = io.StringIO()
    metrics = train(own, console=Console(file=said, width=200)).metrics
    first = said.getvalue().splitlines()[0]
    assert first.startswith("forecast: about ") and "in the first stage" in first
    memory = metrics["memory"]
    assert memory["forecast_peak_bytes"] > 0
    if memory["peak_kind"] == "cpu_rss":
        assert 0 < memory["process_bytes_before_model"] <= memory["peak_bytes"]
    told = {fact.label: fact for fact in facts.memory_facts(metrics)}
    assert "of tensors" in told["Forecast"].note
    assert "Forecast" not in {fact.label for fact in facts.memory_facts({"memory": {"peak_bytes": 1}})}


@pytest.mark.parametrize("kind", ["cuda_allocated", "cpu_rss"])
def test_on_a_cpu_the_growth_is_told(kind: str) -> None:
    memory = {
        "peak_bytes": 900,
        "peak_kind": kind,
        "forecast_peak_bytes": 300,
        "process_bytes_before_model": 500,
    }
    told = {fact.label: fact for fact in facts.memory_facts({"memory": memory})}["Forecast"]
    assert told.value == "300 B"
    assert ("grew by 400 B" in told.note) == (kind == "cpu_rss")
