"""Whole runs on a tiny model: what the folder holds, round trip, resume, export."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import leantune
from leantune.errors import UserError
from leantune.run import Interrupted, callbacks
from leantune.run.folder import RunFolder
from tests.run.support import SETTINGS, printed, quiet, recipe


@pytest.fixture(scope="module", params=SETTINGS)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    bert_folder: Path,
    data_folder: Path,
) -> Any:
    """A finished run of each method."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    made = recipe(bert_folder, data_folder, output, SETTINGS[request.param])
    return leantune.train(made, console=quiet())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Saved weights of a run."""
    return load_file(next(RunFolder(folder).saved_weights().glob("*.safetensors")))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_folder_is_complete(finished: Any) -> None:
    folder = RunFolder(finished.folder)
    for file in (folder.recipe_file, folder.metrics_file, folder.log_file, folder.report_file):
        assert file.is_file()
    metrics = json.loads(folder.metrics_file.read_text())
    assert metrics == finished.metrics
    keys = {"model", "method", "seed", "versions", "hardware", "parameters", "memory", "speed", "evaluation"}
    assert keys | {"adapter_bytes"} <= metrics.keys()
    assert metrics["parameters"].keys() >= {
        "total",
        "trainable_start",
        "trainable_end",
        "base_removed_fraction",
    }
    assert metrics["memory"].keys() >= {"saved_activation_bytes", "peak_bytes", "peak_kind"}
    assert metrics["speed"].keys() >= {
        "step_seconds_median", "tokens_per_second", "train_seconds", "estimate_seconds",
    }  # fmt: skip
    assert metrics["evaluation"].keys() == {"validation", "test"}
    assert metrics["memory"]["saved_activation_bytes"] > 0
    log = callbacks.read_log(folder.log_file)
    assert [line["step"] for line in log if "loss" in line and "evaluation" not in line] == list(range(1, 13))
    assert not list(finished.folder.glob(".*")), "nothing temporary is left"


def test_parameters_are_counted(finished: Any) -> None:
    counts = finished.metrics["parameters"]
    model = leantune.load(finished.folder)[0]
    head = 3 * 32 + 3
    assert counts["head"] == head
    if finished.recipe.lean.adapter.type == "lamda":
        modules = sum("lamda_S" in name for name, _ in model.named_parameters())
        squares = sum(p.numel() for name, p in model.named_parameters() if "lamda_S" in name)
        own_ranks = finished.recipe.lean.prune or finished.recipe.lean.adapter.spectral_ranks
        assert squares <= 16 * modules if own_ranks else squares == 16 * modules
        assert counts["trainable_end"] == squares + head
        assert counts["trainable_start"] > counts["trainable_end"]
    if finished.recipe.lean.adapter.type == "none":
        assert counts["trainable_end"] == counts["total"] == sum(p.numel() for p in model.parameters())


def test_evaluate_says_the_same_to_the_last_digit(finished: Any) -> None:
    command = [sys.executable, "-m", "leantune.cli", "evaluate", str(finished.folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == finished.metrics["evaluation"]


def test_predict(finished: Any) -> None:
    said = leantune.predict(finished.folder, ["my card lost", "cash not found"])
    assert [one.input for one in said] == ["my card lost", "cash not found"]
    assert all(one.predicted in {"card_lost", "cash_missing", "pin_blocked"} for one in said)
    assert all(one.score is not None and 0 < one.score <= 1 for one in said)
    with pytest.raises(UserError, match="takes single texts"):
        leantune.predict(finished.folder, [("a", "b")])


def test_export(finished: Any, tmp_path: Path) -> None:
    if finished.recipe.lean.prune is not None:
        return  # another matter: test_pruned.py
    if finished.recipe.lean.adapter.type == "bottleneck":
        for kind in ("merged", "lora"):
            with pytest.raises(UserError, match=f"--to {kind}: a bottleneck adapter is not linear"):
                leantune.export(finished.folder, kind, tmp_path / kind)
        return
    merged = leantune.export(finished.folder, "merged", tmp_path / "merged")
    assert merged.max_abs_difference <= 1e-5
    if finished.recipe.lean.adapter.type == "none":
        with pytest.raises(UserError, match="no adapter"):
            leantune.export(finished.folder, "lora", tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
    else:
        leantune.export(finished.folder, "lora", tmp_path / "lora")
        _opens_without_leantune(finished, tmp_path / "lora")
    with pytest.raises(UserError, match="not a pruned run"):
        leantune.export(finished.folder, "pruned", tmp_path / "pruned")
    with pytest.raises(UserError, match="accepted are lora"):
        leantune.export(finished.folder, "gguf", tmp_path / "gguf")
    with pytest.raises(UserError, match="not empty"):
        leantune.export(finished.folder, "merged", tmp_path / "merged")


def _opens_without_leantune(finished: Any, folder: Path) -> None:
    model, tokenizer = leantune.load(finished.folder)
    with torch.no_grad():
        expected = model(**tokenizer("my card has not arrived", return_tensors="pt")).logits
    shown = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    script = f"""
import json, sys
{shown}
logits = model.eval()(**tokenizer("my card has not arrived", return_tensors="pt")).logits
assert "leantune" not in sys.modules
print(json.dumps([logits.tolist(), model.config.id2label[0]]))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    logits, label = json.loads(done.stdout.splitlines()[-1])
    assert label == "card_lost"
    assert (torch.tensor(logits) - expected).abs().max() <= 1e-5


def test_an_export_that_differs_is_refused(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leantune.run import exporting as module

    if finished.recipe.lean.prune is not None or finished.recipe.lean.adapter.type == "bottleneck":
        return
    reopen = module._reopen

    def wrong(*args: Any) -> torch.nn.Module:
        model = reopen(*args)
        with torch.no_grad():
            list(model.parameters())[-1].add_(0.01)
        return model

    monkeypatch.setattr(module, "_reopen", wrong)
    with pytest.raises(UserError, match="outputs differ"):
        leantune.export(finished.folder, "merged", tmp_path / "wrong")
    assert list(tmp_path.iterdir()) == []


class StopAt(TrainerCallback):
    """Sends the run a signal after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("stop", [2, 9])
@pytest.mark.parametrize("method", SETTINGS)
def test_resumed_equals_uninterrupted(
    method: str,
    stop: int,
    bert_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped within the first epoch (LaMDA: while B freezes) or the second: equal bit for bit."""
    from leantune.run import lean

    train = {"weight_decay": 0.1}
    whole = recipe(bert_folder, data_folder, tmp_path / "whole", SETTINGS[method], train=train)
    leantune.train(whole, console=quiet())
    made = recipe(bert_folder, data_folder, tmp_path / "stopped", SETTINGS[method], train=train)
    with monkeypatch.context() as patched:
        needed = lean.callbacks
        # before leantune's own callbacks, as a signal may come at any moment of a step
        patched.setattr(lean, "callbacks", lambda recipe: [StopAt(stop), *needed(recipe)])
        with pytest.raises(Interrupted, match=f"stopped after step {stop}; go on with: leantune train"):
            leantune.train(made, console=quiet())
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    console = quiet()
    resumed = leantune.train(made, resume=True, console=console)
    assert f"resuming from checkpoint-{stop}" in printed(console)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    first, second = (callbacks.read_log(tmp_path / name / "log.jsonl") for name in ("whole", "stopped"))
    assert [{**line, "step_seconds": 0} for line in first] == [{**line, "step_seconds": 0} for line in second]
    assert resumed.metrics["evaluation"] == RunFolder(tmp_path / "whole").metrics()["evaluation"]  # type: ignore[index]
    assert resumed.metrics["parameters"] == RunFolder(tmp_path / "whole").metrics()["parameters"]  # type: ignore[index]


def test_a_damaged_checkpoint_is_passed_over(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run", train={"epochs": 3})
    before = leantune.train(made, console=quiet())
    folder = RunFolder(tmp_path / "run")
    folder.metrics_file.unlink()
    newest = folder.checkpoints / "checkpoint-18" / "adapter_model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    (folder.checkpoints / "checkpoint-99").mkdir()
    console = quiet()
    after = leantune.train(made, resume=True, console=console)
    text = printed(console)
    assert "checkpoint-99 skipped: incomplete (no manifest)" in text
    assert "checkpoint-18 skipped: adapter_model.safetensors is damaged" in text
    assert "resuming from checkpoint-12" in text
    assert before.metrics["evaluation"] == after.metrics["evaluation"]


def test_a_taken_folder_is_not_touched(
    finished: Any, bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    state = {file: file.stat().st_mtime_ns for file in finished.folder.rglob("*")}
    with pytest.raises(UserError, match="holds a run already; use --resume or --overwrite"):
        leantune.train(finished.recipe, console=quiet())
    other = finished.recipe.model_copy(deep=True)
    other.train.epochs = 7
    with pytest.raises(UserError, match=r"another recipe \(train.epochs: 2.0 there, 7.0 now\)"):
        leantune.train(other, resume=True, console=quiet())
    assert leantune.train(finished.recipe, resume=True, console=quiet()).metrics == finished.metrics
    assert state == {file: file.stat().st_mtime_ns for file in finished.folder.rglob("*")}
    (tmp_path / "thesis.txt").write_text("years of work")
    made = recipe(bert_folder, data_folder, tmp_path)
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="not empty and holds no run"):
            leantune.train(made, console=quiet(), **options)
    with pytest.raises(UserError, match="no run to resume"):
        leantune.train(recipe(bert_folder, data_folder, tmp_path / "new"), resume=True, console=quiet())


def test_overwrite_replaces_the_run_alone(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run", train={"epochs": 1})
    leantune.train(made, console=quiet())
    note = tmp_path / "run" / "notes.txt"
    note.write_text("mine")
    full = recipe(bert_folder, data_folder, tmp_path / "run", SETTINGS["full"], train={"epochs": 1})
    leantune.train(full, overwrite=True, console=quiet())
    assert note.read_text() == "mine"
    assert not (tmp_path / "run" / "adapter").exists() and (tmp_path / "run" / "model").is_dir()


def test_bf16_and_checkpointing(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    for number, lean in enumerate(SETTINGS.values()):
        plain = recipe(bert_folder, data_folder, tmp_path / f"p{number}", lean, train={"steps": 2})
        lighter = recipe(
            bert_folder, data_folder, tmp_path / f"c{number}", lean,
            train={"steps": 2, "gradient_checkpointing": True}, model={"dtype": "bfloat16"},
        )  # fmt: skip
        one, other = (leantune.train(made, console=quiet()).metrics for made in (plain, lighter))
        assert other["memory"]["saved_activation_bytes"] < 0.5 * one["memory"]["saved_activation_bytes"]
        assert all(math.isfinite(value) for value in other["evaluation"]["test"].values())


def test_accumulated_micro_batches_are_averaged(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """4 × 4 rows are a step of 16: transformers' own arithmetic makes its gradient four times as large."""
    one = {"epochs": 1, "train_sampling_strategy": "sequential"}
    four = {**one, "batch_size": 4, "gradient_accumulation_steps": 4}
    for name, train in (("one", one), ("four", four)):
        made = recipe(bert_folder, data_folder, tmp_path / name, SETTINGS["full"], train=train)
        leantune.train(made, console=quiet())
    logs = [callbacks.read_log(tmp_path / name / "log.jsonl") for name in ("one", "four")]
    norms = [[line["grad_norm"] for line in log if "grad_norm" in line] for log in logs]
    assert norms[0] == pytest.approx(norms[1], rel=0.5)  # dropout differs


def test_two_runs_with_one_seed_are_equal(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        leantune.train(
            recipe(bert_folder, data_folder, tmp_path / name, train={"epochs": 1}), console=quiet()
        )
    leantune.train(
        recipe(bert_folder, data_folder, tmp_path / "3", train={"epochs": 1, "seed": 1}), console=quiet()
    )
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "3"))


def test_a_scripted_sigterm_saves(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """The command line itself: SIGINT in the middle saves a checkpoint and exits with 130."""
    import signal
    import time

    from leantune.recipes import yaml

    made = recipe(bert_folder, data_folder, tmp_path / "run", train={"epochs": 400})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.dump(made.to_dict()))
    command = [sys.executable, "-m", "leantune.cli", "train", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        if log.is_file() and log.stat().st_size > 2000:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "go on with: leantune train" in errors
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/manifest.json"))
    assert checkpoints
