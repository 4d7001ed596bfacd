"""A loss or gradient that is not finite: the run stops and says where it began, or skips and counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import leantune
from leantune.errors import RunError
from leantune.report import summary_table
from leantune.run import lean
from leantune.run.checkpoints import newest_complete
from leantune.run.folder import RunFolder
from tests.conftest import requests, write_jsonl
from tests.run.support import SETTINGS, quiet, recipe

REGRESSION = {"task": "regression"}
FIVE = {"batch_size": 4, "gradient_accumulation_steps": 3, "steps": 5}


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """60 rows whose 37th has a target that float32 cannot square."""
    rows = [{"text": row["text"], "label": row["value"] / 10} for row in requests(60, 0)]
    rows[37]["label"] = 1e30
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    write_jsonl(tmp_path / "data" / "test.jsonl", rows[:8])
    return tmp_path / "data"


class Plant(TrainerCallback):
    """Does something to the model before a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(model)


def train_with(monkeypatch: pytest.MonkeyPatch, made: Any, *more: TrainerCallback) -> leantune.Run:
    needed = lean.callbacks
    monkeypatch.setattr(lean, "callbacks", lambda recipe: [*more, *needed(recipe)])
    return leantune.train(made, console=quiet())


@torch.no_grad()
def a_weight(model: torch.nn.Module) -> None:
    next(p for n, p in model.named_parameters() if "layer.1.output.dense.lora_B" in n)[0, 0] = torch.nan


def an_output(model: torch.nn.Module) -> None:
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1.intermediate")
    layer.register_forward_hook(lambda module, args, output: output * torch.inf)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            a_weight,
            r"the weight base_model.\S+layer.1.output.dense.lora_B.default.weight is not finite itself",
        ),
        (an_output, r"first in the output of base_model.model.bert.encoder.layer.1.intermediate\."),
    ],
)
def test_where_it_began(
    act: Any, said: str, bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run", SETTINGS["lora"])
    with pytest.raises(
        RunError, match=rf"step 8: the loss is nan; its batch: rows [\d, ]+ of .*{said}"
    ) as caught:
        train_with(monkeypatch, made, Plant(7, act))
    assert len(str(caught.value).splitlines()) == 1
    newest, _ = newest_complete(RunFolder(tmp_path / "run").checkpoints)
    assert newest is not None and newest.name == "checkpoint-6"
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    "sampling",
    [*(pytest.param(way, marks=pytest.mark.slow) for way in ("random", "sequential")), "group_by_length"],
)
@pytest.mark.parametrize("train", [{"batch_size": 8}, FIVE])
def test_the_rows_are_the_batch_s(
    train: dict[str, Any], sampling: str, bert_folder: Path, poisoned: Path, tmp_path: Path
) -> None:
    made = recipe(
        bert_folder, poisoned, tmp_path / "run", SETTINGS["lora"], model=REGRESSION,
        train={**train, "train_sampling_strategy": sampling},
    )  # fmt: skip
    with pytest.raises(RunError, match="the loss is inf") as caught:
        leantune.train(made, console=quiet())
    told = re.search(r"rows ([\d, ]+) of the train split", str(caught.value))
    assert told is not None
    rows = [int(row) for row in told[1].split(", ")]
    assert 37 in rows and len(rows) == len(set(rows)) == (8 if train["batch_size"] == 8 else 12)
    if sampling == "sequential":
        assert rows == list(range(32, 40) if len(rows) == 8 else range(36, 48))
    assert "first in the output of base_model" in str(caught.value)


def test_a_learning_rate_that_is_too_high(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run", SETTINGS["full"], train={"learning_rate": 1e30})
    with pytest.raises(
        RunError, match=r"Try a lower train.learning_rate \(now 1e\+30\), or train.on_nan: skip"
    ):
        leantune.train(made, console=quiet())


class Watch(TrainerCallback):
    """Copies of what is trained, before and after each step."""

    def __init__(self) -> None:
        self.changed: list[bool] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = self._copies(model, kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        after = self._copies(model, kwargs["optimizer"])
        self.changed.append(
            any(not torch.equal(a, b) for a, b in zip(self.before, after, strict=False))
            or len(self.before) != len(after)
        )

    def _copies(self, model: Any, optimizer: Any) -> list[torch.Tensor]:
        state = [t for held in optimizer.state.values() for t in held.values()]
        estimation = lean.estimation_of(model)
        masks = list(estimation.state().values()) if estimation is not None else []
        return [t.detach().clone() for t in (*model.parameters(), *state, *masks)]


@pytest.mark.parametrize(
    ("method", "train"),
    [
        ("lora+tokentune", {"batch_size": 12, "epochs": 2}),
        ("lora+light-peft", {**FIVE, "steps": 10}),
        pytest.param("lora", {**FIVE, "steps": 10}, marks=pytest.mark.slow),
    ],
)
def test_skip(
    train: dict[str, Any],
    method: str,
    bert_folder: Path,
    poisoned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5 steps an epoch, one of them with the bad row: weights, optimizer and masks stay as they are there."""
    made = recipe(
        bert_folder, poisoned, tmp_path / "run", SETTINGS[method], model=REGRESSION,
        train={**train, "on_nan": "skip", "train_sampling_strategy": "sequential", "weight_decay": 0.1},
    )  # fmt: skip
    made.lean.prune = None if made.lean.prune is None else made.lean.prune.model_copy(
        update={"estimate_steps": 5}
    )  # fmt: skip
    watches = {"estimation": Watch(), None: Watch()}
    needed = lean.estimation_callbacks
    monkeypatch.setattr(lean, "estimation_callbacks", lambda r: [*needed(r), watches["estimation"]])
    done = train_with(monkeypatch, made, watches[None])
    once = [True, True, True, False, True]
    assert watches[None].changed == once * 2
    estimated = made.lean.prune is not None
    assert watches["estimation"].changed == once * estimated
    assert done.metrics["skipped_steps"] == 2 + estimated

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = [
        json.loads(line, parse_constant=refuse)
        for line in (done.folder / "log.jsonl").read_text().splitlines()
    ]
    skipped = [line for line in lines if line.get("skipped")]
    assert len(skipped) == 2 + estimated and all("loss" not in line for line in skipped)
    assert sum("loss" in line for line in lines) == 8 + 4 * estimated
    state = json.loads((done.folder / "checkpoints" / "checkpoint-10" / "trainer_state.json").read_text())
    assert {entry["step"] for entry in state["log_history"]} == {10}  # no more: a long run would grow
    labels = [str(cell) for cell in summary_table(done.metrics).columns[0].cells]
    assert any("Skipped steps" in label for label in labels)
    assert "Skipped steps" in (done.folder / "report.html").read_text()


def test_nothing_is_skipped_in_an_ordinary_run(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    done = leantune.train(
        recipe(bert_folder, data_folder, tmp_path / "run", train={"steps": 2}), console=quiet()
    )
    assert done.metrics["skipped_steps"] == 0
    assert "Skipped steps" not in (done.folder / "report.html").read_text()
