"""`leantune.plan` and `leantune plan`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModel
from typer.testing import CliRunner

from leantune import plan
from leantune.cli import app
from leantune.comparison.methods import changes as method_changes
from leantune.errors import UserError
from leantune.planner.devices import GPUS, UTILISATION, find_device
from leantune.planner.forecaster import Forecaster
from leantune.planner.known import SHAPES, config_of
from leantune.planner.planning import base_setting
from leantune.planner.rows import alternatives, changed, describe
from leantune.planner.sizes import parse_size
from leantune.planner.table import plan_table
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
    with pytest.raises(UserError, match="--memory = '24': a size needs a unit, write 24GiB"):
        parse_size("24")
    for wrong in ("24G", "-1GiB", "GiB"):
        with pytest.raises(UserError, match="must be a number with a unit"):
            parse_size(wrong)


def test_rows_are_what_compare_would_run() -> None:
    own = recipe("llama", {"adapter": LORA})
    rows = {row.name: row for row in alternatives(own)}
    assert describe(own) == "lora"
    assert {"full", "lora+ckpt", "qlora", "lamda", "tokentune 10 %", "light-peft 1/2", "lean"} <= set(rows)
    for name in ("full", "lamda", "lean"):
        lean, _ = method_changes(name, own)
        assert rows[name].recipe.lean == Recipe.model_validate(own.to_dict() | {"lean": lean}).lean
    assert "lora" not in rows  # the recipe itself
    assert rows["full"].recipe.train.learning_rate != own.train.learning_rate
    assert rows["lora+ckpt"].changes == {"train.gradient_checkpointing": True}
    assert rows["qlora"].changes == {"lean.quantize": "nf4"}
    assert [row.name for row in alternatives(own, ["lamda+tokentune", "recipe"])] == ["lamda+tokentune"]
    with pytest.raises(UserError, match="did you mean lamda"):
        alternatives(own, ["lambda"])


def test_a_recipe_comes_first(folder: Path) -> None:
    made = plan(recipe("llama", {"adapter": LORA}, path=str(folder)), batch=2, length=32)
    assert [row.own for row in made.rows] == [True] + [False] * (len(made.rows) - 1)
    engines = [row.train.engine for row in made.rows if row.train is not None]
    assert engines[0] == "traced" and set(engines[1:]) == {"closed form"}
    by_name = {row.name: row.peak or 0 for row in made.rows}
    assert by_name["full"] > by_name["lora"] > by_name["tokentune 10 %"]
    assert by_name["qlora"] < by_name["lora"]
    assert all(row.step_seconds for row in made.rows)
    json.dumps(made.to_dict())


def test_advice_fits_and_is_least(folder: Path) -> None:
    own = recipe("llama", {"adapter": LORA}, path=str(folder), batch_size=8)
    whole = plan(own, length=64, methods=[], trace="none").rows[0].peak
    assert whole is not None
    limit = int(whole * 0.7)
    made = plan(own, length=64, methods=["full"], memory=limit, reserve=0, trace="none")
    assert made.advice is not None and made.advice.best is not None
    best = made.advice.best
    assert best.changes == {"train.batch_size": 4, "train.gradient_accumulation_steps": 2}
    assert best.needed is not None and best.needed <= limit
    again = plan(made.advice.recipes[best.name], length=64, methods=[], trace="none")
    assert again.rows[0].peak == best.peak
    room = made.advice.room[best.name]
    assert 4 <= room.batch < 8 and 64 <= room.length <= 128
    nothing = plan(own, length=64, methods=[], memory=1024, reserve=0, trace="none").advice
    assert nothing is not None and nothing.best is None


def test_evaluation_counts(folder: Path) -> None:
    own = recipe("llama", {"adapter": LORA}, path=str(folder), batch_size=2, eval_batch_size=64)
    row = plan(own, length=64, methods=[], trace="none").rows[0]
    assert row.train is not None and row.needed == row.train.evaluation_peak > (row.peak or 0)
    made = plan(own, length=64, methods=[], memory=int((row.peak or 0) * 1.2), reserve=0, trace="none")
    assert made.advice is not None and made.advice.best is not None
    assert list(made.advice.best.changes) == ["train.eval_batch_size"]


def test_what_a_method_cannot_do_is_said_in_its_row(folder: Path) -> None:
    own = recipe("llama", {"adapter": LORA}, path=str(folder))
    row = changed(own, {"lean.adapter": {"type": "lamda", "r": 65}})
    forecaster, (base, _) = Forecaster(find_device("cpu", measure=False), "none"), base_setting(own, 2, 32)
    forecast = forecaster.forecast(base, row)
    assert forecast.peak is None and "r=65 is above the size of layer" in (forecast.refused or "")


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_the_terminal(folder: Path, width: int) -> None:
    own = recipe("llama", {"adapter": LORA}, path=str(folder))
    made = plan(
        own, batch=2, length=64, trace="none", memory="600MiB", reserve="10MiB", gpus=2, strategy="fsdp"
    )
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(plan_table(made, width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "on each of 2 GPUs (fsdp)" in " ".join(text.split())
    assert "The recipe fits." in text and "Largest batch" in text
    assert ("Trained" in text) == (width == 120)


def test_known_shapes_have_the_parameters_that_they_should() -> None:
    counts = {
        "llama-2-7b": 6_607_343_616,
        "llama-3.1-8b": 7_504_924_672,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "mistral-7b": 7_110_660_096,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "gpt2": 124_439_808,
        "gpt2-xl": 1_557_611_200,
        "opt-125m": 125_239_296,
        "opt-1.3b": 1_315_758_080,
        "bert-base": 109_482_240,
        "roberta-base": 124_645_632,
        "deberta-v3-base": 183_831_552,
    }
    import torch

    for name, count in counts.items():
        made = recipe("llama", {}, path=f"shape:{name}")
        with torch.device("meta"):
            model = AutoModel.from_config(config_of(made.model))
        assert sum(p.numel() for p in model.parameters()) == count, name
    assert set(counts) <= set(SHAPES)
    with pytest.raises(UserError, match="did you mean shape:llama-2-7b"):
        config_of(recipe("llama", {}, path="shape:llama2-7b").model)


def test_devices() -> None:
    card = find_device("rtx-4090")
    import torch

    assert card.seconds(165e12 * UTILISATION, torch.bfloat16) == pytest.approx(1.0)
    assert card.memory == GPUS["rtx-4090"][2] << 20 and "an assumption" in card.basis
    here = find_device("cpu")
    assert here.measured and (here.seconds(1e9, torch.float32) or 0) > 0
    with pytest.raises(UserError, match="--device = 'a100': accepted are cpu, cuda"):
        find_device("a100")


def _run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_command_without_a_recipe(folder: Path, tmp_path: Path) -> None:
    fitting = tmp_path / "fits.yaml"
    how = ["--model", str(folder), "--batch", "2", "--length", "64", "--fast"]
    told = _run(*how, "--memory", "4MB", "--reserve", "1MB", "--write", str(fitting), "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["fitting"] and all(row["needed"] <= 3_000_000 for row in found["fitting"])
    assert Recipe.load(fitting).model.path == str(folder)


def test_command_with_a_recipe(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{path: {bert_folder}, task: classification}}\ndata: {{path: {data_folder}}}\n"
        f"lean: {{adapter: {{type: lora, r: 4}}}}\noutput: {tmp_path / 'run'}\n"
    )
    told = _run(str(file), "train.batch_size=2", "--methods", "recipe", "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["batch"] == 2 and found["length"]["why"] == "the longest row of the data"
    assert [row["name"] for row in found["rows"]] == ["lora"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give one RECIPE.yaml, or --model"),
        (("--model", "x", "--memory", "24"), "write 24GiB"),
        (("--model", "x", "--write", "y"), "--write needs --memory"),
        (("--model", "x", "--device", "tpu"), "accepted are cpu, cuda"),
        (("--model", "x", "--fast", "--trace"), "exclude each other"),
        (("--model", "shape:gpt2", "--memory", "1GiB", "--write", "y"), "is a shape without weights"),
        (("--model", "shape:gpt2", "--length", "5000", "--fast"), "reads at most 1024 tokens"),
    ],
)
def test_mistakes(words: tuple[str, ...], says: str) -> None:
    result = _run(*words)
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)
