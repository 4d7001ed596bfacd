"""`leantune.planner.plan` and `leantune plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leantune.cli import app
from leantune.errors import UserError
from leantune.planner import parse_size, plan
from leantune.planner.rows import alternatives, changed, describe
from leantune.recipes import Recipe
from tests.planner.settings import LORA, config, recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and nothing else."""
    place = tmp_path_factory.mktemp("config-only")
    config("llama").save_pretrained(place)
    return place


def test_sizes() -> None:
    assert parse_size("24GiB") == 24 << 30
    assert parse_size("1.5 gb") == 1_500_000_000
    for wrong in ("24", "24G", "-1GiB", "GiB"):
        with pytest.raises(UserError, match="must be a number with a unit"):
            parse_size(wrong)


def test_rows_are_the_recipe_changed() -> None:
    own = recipe("llama", {"adapter": LORA})
    rows = {row.name: row for row in alternatives(own)}
    assert describe(own) == "LoRA r 4"
    assert {"full", "full + checkpointing", "LaMDA r 32", "LoRA r 4 + TokenTune 25 %"} <= set(rows)
    assert rows["full"].changes == {"lean.adapter": {"type": "none"}}
    assert rows["full"].recipe.train.learning_rate != own.train.learning_rate
    assert changed(own, {"train.gradient_checkpointing": True}).name == "LoRA r 4 + checkpointing"


def test_a_recipe_comes_first(folder: Path) -> None:
    made = plan(
        recipe("llama", {"adapter": LORA}, path=str(folder)), batch=2, length=32, engine="closed form"
    )
    assert [row.own for row in made.rows] == [True] + [False] * (len(made.rows) - 1)
    by_name = {row.name: row.peak or 0 for row in made.rows}
    assert by_name["full"] > by_name["LoRA r 4"]
    json.dumps(made.to_dict())


def test_advice_fits_and_is_least(folder: Path) -> None:
    own = recipe("llama", {"adapter": LORA}, path=str(folder), batch_size=8)
    whole = plan(own, length=64, compare=False).rows[0].peak
    assert whole is not None
    made = plan(own, length=64, compare=False, memory=int(whole * 0.7))
    first = made.fitting[0]
    assert not first.own
    assert first.peak is not None and first.peak <= whole * 0.7
    assert first.changes == {"train.batch_size": 4, "train.gradient_accumulation_steps": 2}
    again = plan(changed(own, first.changes).recipe, length=64, compare=False)
    assert again.rows[0].peak == first.peak
    assert plan(own, length=64, compare=False, memory=1024).fitting == ()


def _run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_command_without_a_recipe(folder: Path, tmp_path: Path) -> None:
    fitting = tmp_path / "fits.yaml"
    how = ["--model", str(folder), "--batch", "2", "--length", "64", "--fast"]
    shown = _run(*how)
    assert shown.exit_code == 0, shown.output
    assert "LoRA r 8" in shown.output and "2 rows of 64 tokens" in shown.output
    told = _run(*how, "--memory", "3MB", "--write", str(fitting), "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert all(row["peak"] <= 3_000_000 for row in found["fitting"])
    assert Recipe.load(fitting).model.path == str(folder)


def test_command_with_a_recipe(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{path: {bert_folder}, task: classification}}\ndata: {{path: {data_folder}}}\n"
        f"lean: {{adapter: {{type: lora, r: 4}}}}\noutput: {tmp_path / 'run'}\n"
    )
    told = _run(str(file), "train.batch_size=2", "--alone", "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["batch"] == 2 and found["length"]["why"] == "the longest row of the data"
    assert [row["name"] for row in found["rows"]] == ["LoRA r 4"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give one RECIPE.yaml, or --model"),
        (("--model", "x", "--memory", "24"), "must be a number with a unit"),
        (("--model", "x", "--write", "y"), "--write needs --memory"),
        (("--model", "x", "--device", "tpu"), "accepted are cpu, cuda"),
    ],
)
def test_mistakes(words: tuple[str, ...], says: str) -> None:
    result = _run(*words)
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)
