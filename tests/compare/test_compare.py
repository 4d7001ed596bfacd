"""A comparison from its recipe to its page. Runs are executed in this process but for one: it is quicker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import leantune
from leantune.comparison import compare, runs
from leantune.comparison import timing as clock
from leantune.comparison.plan import Cell
from leantune.errors import RunError
from leantune.recipes import Recipe, yaml
from leantune.recipes.loading import validate
from leantune.run import Interrupted
from tests.report.test_page import Page
from tests.run.support import printed, quiet, recipe

METHODS = "lora,tokentune+light-peft"
LORA = {"adapter": {"type": "lora", "r": 4}}


@pytest.fixture(autouse=True)
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were executed; of methods with bottleneck all fail."""
    done: list[str] = []

    def here(cell: Cell, stop: Any, progress: Any) -> str | None:
        done.append(cell.name)
        if "bottleneck" in cell.name:
            return "lean.adapter: out of luck"
        resume = cell.folder.recipe_file.is_file()
        leantune.train(cell.recipe, resume=resume, console=quiet())
        return None

    monkeypatch.setattr(runs, "run_in_process", here)
    monkeypatch.setattr(clock.measure, "__defaults__", (3, 1))
    return done


def small(base: Path, rows: Path, output: Path) -> Recipe:
    return recipe(base, rows, output, LORA, train={"epochs": 2, "batch_size": 32})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared") / "out"


@pytest.fixture(scope="module")
def base_recipe(bert_folder: Path, data_folder: Path) -> Recipe:
    return small(bert_folder, data_folder, Path("runs/never"))


def test_interrupted_then_continued(
    base_recipe: Recipe, out: Path, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = runs.run_in_process

    def stopped_at_the_third(cell: Cell, stop: Any, progress: Any) -> str | None:
        if len(executed) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            return None
        return here(cell, stop, progress)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "run_in_process", stopped_at_the_third)
        with pytest.raises(Interrupted, match=r"stopped with 2 of 4 runs done; go on with: leantune compare"):
            compare(base_recipe, METHODS, 2, out, console=quiet())
    assert executed == ["lora-0", "tokentune+light-peft-0"], "all methods at the first seed come first"
    partial = json.loads((out / "compare.json").read_text())
    assert not partial["complete"] and sum("pending" in run for run in partial["runs"]) == 2
    assert "Not complete: 2 of 4 runs" in Page((out / "compare.html").read_text()).text
    console = quiet()
    done = compare(base_recipe, METHODS, 2, out, console=console)
    assert executed[2:] == ["lora-1", "tokentune+light-peft-1"]
    assert "[3/4] lora, seed 1: accuracy" in printed(console)
    assert done.result["complete"] and done.verdict == done.result["verdict"]


def test_what_the_json_holds(out: Path) -> None:
    result = json.loads((out / "compare.json").read_text())
    keys = {"schema", "complete", "command", "recipe", "seeds", "budget_steps", "baseline", "metric"}
    keys |= {"methods", "verdict", "advice", "curves", "runs", "timing", "versions", "hardware"}
    assert result.keys() == keys
    assert result["metric"] == {"split": "test", "name": "accuracy", "lower_is_better": False}
    assert (result["baseline"], result["budget_steps"], result["seeds"]) == ("lora", 6, [0, 1])
    assert list(result["methods"]) == METHODS.split(",")
    for name, entry in result["methods"].items():
        assert sum(entry["steps"].values()) == 6 and entry["runs"] == 2 and entry["failed"] == []
        assert entry["figures"].keys() == {"parameters", "memory", "speed", "adapter_bytes", "evaluation"}
        spread = entry["figures"]["evaluation"]["test"]["accuracy"]
        assert len(spread["values"]) == 2 and spread["sd"] is not None
        timing = entry["timing"]
        assert len(timing["seconds"]["step"]) == len(timing["seconds"]["inference"]) == 3
        assert timing["step_seconds"] > 0 and timing["budget_seconds"] > 0
        assert (entry["judgement"] is None) == (name == "lora")
    assert result["methods"]["lora"]["timing"]["step_ratio"] == 1.0
    assert result["methods"]["tokentune+light-peft"]["judgement"]["memory_ratio"] < 0.8
    assert result["timing"].keys() == {"interleaved", "rounds", "batch_size", "device"}
    assert [run["folder"] for run in result["runs"]][:2] == ["lora-0", "tokentune+light-peft-0"]
    steps = [[step for step, _ in run["curve"]] for run in result["runs"]]
    assert steps[0] == [3, 6] and steps[1][-1] == 6, "estimation's steps are counted"


def test_each_run_is_an_ordinary_run(out: Path) -> None:
    assert (
        leantune.evaluate(out / "tokentune+light-peft-1")
        == json.loads((out / "tokentune+light-peft-1" / "metrics.json").read_text())["evaluation"]
    )
    assert not (out / "lora-0" / "checkpoints").exists(), "a finished run needs none"


def test_finished_runs_and_their_timing_are_kept(
    base_recipe: Recipe, out: Path, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((out / "compare.json").read_text())
    monkeypatch.setattr(clock, "measure", lambda *_: pytest.fail("timed again"))
    again = compare(base_recipe, METHODS, 2, out, console=quiet())
    assert executed == [] and again.result == before


def test_a_failed_method_is_a_row(base_recipe: Recipe, out: Path, executed: list[str]) -> None:
    done = compare(base_recipe, "lora,bottleneck", 2, out, console=quiet())
    assert executed == ["bottleneck-0", "bottleneck-1"]
    entry = done.result["methods"]["bottleneck"]
    assert entry["failed"] == ["lean.adapter: out of luck"] and entry["figures"] is None
    assert done.result["complete"] and done.verdict.endswith("Failed: Adapter.")
    text = Page((out / "compare.html").read_text()).text
    assert "Adapter failed, seeds 0, 1: lean.adapter: out of luck" in text
    executed.clear()
    compare(base_recipe, "lora,bottleneck", 1, out, console=quiet())
    assert executed == ["bottleneck-0"], "what failed is tried again"


def test_where_all_fail(base_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="every run failed, the first with: lean.adapter: out of luck"):
        compare(base_recipe, "bottleneck", 1, tmp_path / "out", console=quiet())
    assert "No verdict" in Page((tmp_path / "out" / "compare.html").read_text()).text


def test_full_fine_tuning_and_lamda_are_timed(base_recipe: Recipe, tmp_path: Path) -> None:
    made = base_recipe.to_dict()
    made |= {"lean": {"adapter": {"type": "lamda", "r": 4}}, "train": {**made["train"], "epochs": 1}}
    done = compare(
        validate(made, "test"),
        "full,lora+ckpt,lean",
        1,
        tmp_path / "out",
        lr={"lamda": 1e-2},
        console=quiet(),
    )
    for name, entry in done.result["methods"].items():
        assert "step_seconds" in entry["timing"], name
    assert done.result["methods"]["lean"]["learning_rate"] == 1e-2
    assert done.result["baseline"] == "full" and "One seed" in done.verdict
    assert done.result["curves"] == {"name": "loss", "split": "training"}, "one epoch is no curve"


def test_methods_that_do_not_fit_together_are_timed_alone(
    base_recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "SHARE_OF_MEMORY", 0.0)
    done = compare(base_recipe, "tokentune+light-peft,lora", 2, out, console=quiet())
    assert done.result["timing"]["interleaved"] is False
    assert "do not fit into memory together" in Page((out / "compare.html").read_text()).text


def test_how_a_failed_process_is_told(tmp_path: Path) -> None:
    file = tmp_path / "said"
    for code, text, told in (
        (2, "noise\nleantune: lean.adapter: r=33 is above\n", "lean.adapter: r=33 is above"),
        (1, "Traceback\nRuntimeError: CUDA out of memory\n\n", "RuntimeError: CUDA out of memory"),
        (3, "", "exit code 3"),
        (-9, "", "ended by SIGKILL, for want of memory perhaps"),
        (1, "x" * 400, "x" * 299 + "…"),
    ):
        file.write_text(text)
        with file.open("rb") as said:
            assert runs._reason(code, said) == told


def test_ctrl_c_on_the_command_line(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """The real thing: the run under way saves, the comparison says how to go on and exits with 130."""
    made = small(bert_folder, data_folder, tmp_path / "run").to_dict()
    made["train"]["epochs"] = 400
    (tmp_path / "recipe.yaml").write_text(yaml.dump(made))
    command = [sys.executable, "-m", "leantune.cli", "compare", str(tmp_path / "recipe.yaml")]
    command += ["--methods", "lora,full", "--seeds", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run-compare" / "lora-0" / "checkpoints"
    for _ in range(900):
        if list(checkpoints.glob("checkpoint-*/manifest.json")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopped with 0 of 2 runs done; go on with: leantune compare" in errors
    assert list(checkpoints.glob("checkpoint-*/manifest.json"))
    assert not (tmp_path / "run-compare" / "full-0").exists()
