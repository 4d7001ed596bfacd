"""Gradual freezing: the schedule, frozen values bit for bit, memory released, interrupted runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import leantune.lamda.freezing as freezing
from leantune import LamdaConfig, LamdaFreezing, UserError
from leantune.lamda import freeze_columns, frozen_columns
from leantune.lamda.model import lamda_layers
from tests.lamda.conftest import TARGETS, batch_for, build

STEPS = 12
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def lamda(family: str = "llama", **settings: Any) -> PeftModel:
    settings = {"r": 5, "target_modules": TARGETS[family], "freeze_ratio": 0.6, **settings}
    return get_peft_model(build(family), LamdaConfig(**settings))


def columns(model: torch.nn.Module) -> dict[str, list[str]]:
    """Hashes of every column of B, by layer."""
    return {
        name: [
            hashlib.sha256(c.contiguous().numpy().tobytes()).hexdigest()
            for c in layer.joined_columns("default").T
        ]
        for name, layer in lamda_layers(model).items()
    }


def run(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, begin: int = 0, end: int = STEPS
) -> list[Any]:
    history = []
    for step in range(begin + 1, end + 1):
        model(**batch_for("llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freeze_columns(model, optimizer, step, STEPS)
        history.append(columns(model))
    return history


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@given(st.integers(0, 2000), st.integers(1, 2000), st.integers(1, 300), st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_schedule_is_the_formula(step: int, total: int, r: int, thousandths: int) -> None:
    eta = Fraction(thousandths, 1000)
    expected = r if eta == 0 else min(r, Fraction(r * step) // (eta * total))
    assert frozen_columns(step, total, r, thousandths / 1000) == expected


def test_schedule_has_no_float_surprise_and_says_what_is_wrong() -> None:
    assert int(10 * 21 / (0.7 * 300)) != frozen_columns(21, 300, 10, 0.7) or 0.7 * 300 == 210
    assert frozen_columns(3, 10, 32, 0.3) == 32
    assert [frozen_columns(t, 10, 3, 0.3) for t in range(5)] == [0, 1, 2, 3, 3]
    assert frozen_columns(0, 10, 3, 0.0) == 3
    for arguments, words in (
        ((-1, 1, 1, 0.3), "step=-1"),
        ((0, 0, 1, 0.3), "total_steps=0"),
        ((0, 1, 1, 2), "=2"),
    ):
        with pytest.raises(UserError, match=words):
            frozen_columns(*arguments)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_columns_never_change_again(kind: str) -> None:
    model = lamda()
    optimizer = OPTIMIZERS[kind](trained_parameters(model))
    history = run(model, optimizer)
    for step, now in enumerate(history, start=1):
        frozen = min(5, int(Fraction(5 * step) / (Fraction(6, 10) * STEPS)))
        for name, layer in lamda_layers(model).items():
            assert now[name][:frozen] == history[-1][name][:frozen]
            if step < STEPS and frozen < 5:
                following = history[step][name]
                assert all(a != b for a, b in zip(now[name][frozen:], following[frozen:], strict=True))
            assert layer.frozen_columns("default") == 5


def test_counts_follow_the_schedule_and_memory_is_released() -> None:
    model = lamda()
    optimizer = OPTIMIZERS["amsgrad"](trained_parameters(model))
    for step in range(1, STEPS + 1):
        run(model, optimizer, step - 1, step)
        due = frozen_columns(step, STEPS, 5, 0.6)
        for layer in lamda_layers(model).values():
            parameter = layer.lamda_B["default"]
            assert layer.lamda_B_frozen["default"].shape[1] == layer.frozen_columns("default") == due
            assert parameter.shape == (layer.out_features, 5 - due)
            assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
            assert any(parameter is p for p in optimizer.param_groups[0]["params"])
            assert parameter.requires_grad == (due < 5)
            assert parameter.grad is None
            state = optimizer.state.get(parameter, {})
            assert set(state) == ({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} if due < 5 else set())
            for key in set(state) - {"step"}:
                assert state[key].shape == parameter.shape
                assert state[key].untyped_storage().nbytes() == parameter.numel() * 4
    assert len(optimizer.state) == len(lamda_layers(model))  # S alone
    assert all(p in set(model.parameters()) for p in optimizer.state)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_holding_the_shape_computes_the_same_as_cutting(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes that share a parameter do instead, and what a single one does."""
    models = [lamda(init_b="vectors"), lamda(init_b="vectors")]
    histories = []
    for model, shared in zip(models, (False, True), strict=True):
        monkeypatch.setattr(freezing, "_is_shared", lambda _, shared=shared: shared)
        histories.append(run(model, OPTIMIZERS[kind](trained_parameters(model))))
    assert {layer.lamda_B["default"].shape[1] for layer in lamda_layers(models[1]).values()} == {5}
    assert {layer.held["default"] for layer in lamda_layers(models[1]).values()} == {5}
    for name, layer in lamda_layers(models[0]).items():
        other = lamda_layers(models[1])[name]
        torch.testing.assert_close(other.joined_columns("default"), layer.joined_columns("default"))
        torch.testing.assert_close(other.lamda_S["default"], layer.lamda_S["default"])
    for step, now in enumerate(histories[1], start=1):
        due = frozen_columns(step, STEPS, 5, 0.6)
        assert all(now[name][:due] == histories[1][-1][name][:due] for name in now)


def test_order_of_freezing() -> None:
    """The column of the smallest singular value goes first if told so."""
    for order, descending in (("largest", True), ("smallest", False)):
        model = lamda(freeze_order=order, init_scale="spectrum")
        freeze_columns(model, None, 1, 1)
        for layer in lamda_layers(model).values():
            S0 = layer.lamda_S0["default"]
            assert torch.equal(S0, S0.sort(descending=descending).values)


def test_only_trained_adapters_are_touched() -> None:
    model = lamda()
    model.add_adapter("other", LamdaConfig(r=5, target_modules=TARGETS["llama"]))
    assert freeze_columns(model, None, 1, 1) == 5 * 6
    assert {layer.frozen_columns("other") for layer in lamda_layers(model).values()} == {0}
    model.requires_grad_(False)
    assert freeze_columns(model, None, 1, 1) == 0


def test_an_old_graph_does_not_disturb() -> None:
    """A loss that is kept (for logging) keeps its graph, and with it what belonged to the old shape."""
    model = lamda()
    optimizer = OPTIMIZERS["adamw"](trained_parameters(model))
    kept = []
    for step in range(1, STEPS + 1):
        kept.append(model(**batch_for("llama", seed=step)).loss)
        kept[-1].backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
        freeze_columns(model, optimizer, step, STEPS)
    assert {layer.frozen_columns("default") for layer in lamda_layers(model).values()} == {5}


def test_a_training_without_freezing_is_mentioned_on_saving(tmp_path: Path, recwarn: Any) -> None:
    def train(model: PeftModel, freeze: bool) -> None:
        optimizer = OPTIMIZERS["adamw"](trained_parameters(model))
        for step in range(1, 31):
            model(**batch_for("llama", size=1)).loss.backward()
            optimizer.step()
            if freeze:
                freeze_columns(model, optimizer, step, 30)
        model.save_pretrained(str(tmp_path))

    with pytest.warns(UserWarning, match="'default' was trained without gradual freezing"):
        train(lamda(), freeze=False)
    recwarn.clear()
    train(lamda(), freeze=True)
    train(lamda(freeze_ratio=1.0), freeze=False)
    lamda().save_pretrained(str(tmp_path))
    assert not [warning for warning in recwarn if "freezing" in str(warning.message)]


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, family: str) -> None:
        self.batch = batch_for(family, size=24)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def trainer(folder: Path, model: PeftModel, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    arguments = {
        "max_steps": STEPS,
        "save_steps": 1,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        **arguments,
    }
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        use_cpu=True, seed=5, disable_tqdm=True, logging_strategy="no", **arguments,
    )  # fmt: skip
    callbacks = callbacks or (LamdaFreezing(),)
    return Trainer(model=model, args=args, train_dataset=Rows("llama"), callbacks=list(callbacks))


def fingerprint(tuner: Trainer) -> dict[str, Any]:
    """Weights and optimizer state, by name."""
    names = {id(p): name for name, p in tuner.model.named_parameters()}
    optimizer = tuner.optimizer
    result = {f"state {k}": v for k, v in tuner.model.state_dict().items() if "lamda_" in k}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            result[f"optimizer {names[id(parameter)]} {key}"] = value
    result["parameters"] = sorted(names[id(p)] for group in optimizer.param_groups for p in group["params"])
    return result


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
        assert same, key


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tuner = trainer(tmp_path_factory.mktemp("whole"), lamda())
    tuner.train()
    return fingerprint(tuner)


@pytest.mark.parametrize("stop", [1, 5, 10])
@pytest.mark.parametrize("restore", [False, True])
def test_interrupted_and_resumed_equals_uninterrupted(
    stop: int, restore: bool, tmp_path: Path, whole_run: dict[str, Any]
) -> None:
    """Bit for bit, in a new Trainer with a new model, at a third, in and after the freezing."""
    trainer(tmp_path, lamda(), LamdaFreezing(), StopAt(stop)).train()
    resumed = trainer(tmp_path, lamda(), restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_same(fingerprint(resumed), whole_run)


@pytest.mark.parametrize("same_trainer", [True, False])
def test_resuming_from_an_earlier_checkpoint_in_the_same_process(
    same_trainer: bool, tmp_path: Path, whole_run: dict[str, Any]
) -> None:
    """The model in memory is frozen further than the checkpoint."""
    tuner = trainer(tmp_path, lamda())
    tuner.train()
    again = tuner if same_trainer else trainer(tmp_path, tuner.model)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(fingerprint(again), whole_run)


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_resuming_without_state_that_goes_by_columns(optim: str, tmp_path: Path) -> None:
    arguments = {"optim": optim, "optim_args": None}
    whole = trainer(tmp_path / "whole", lamda(), **arguments)
    whole.train()
    trainer(tmp_path / "part", lamda(), LamdaFreezing(), StopAt(4), **arguments).train()
    resumed = trainer(tmp_path / "part", lamda(), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    assert_same(fingerprint(resumed), fingerprint(whole))


def test_trainer_freezes_on_schedule_and_writes_it_down(tmp_path: Path) -> None:
    tuner = trainer(tmp_path, lamda(freeze_ratio=0.5))
    tuner.train()
    for step in range(1, STEPS + 1):
        folder = tmp_path / f"checkpoint-{step}"
        state = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["LamdaFreezing"]
        due = frozen_columns(step, STEPS, 5, 0.5)
        assert state == {"args": {"total_steps": STEPS}, "attributes": {"_frozen": due * 6}}
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        assert len(optimizer) == (12 if due < 5 else 6)


def test_freezing_from_the_start(tmp_path: Path) -> None:
    model = lamda(freeze_ratio=0.0, init_b="vectors")
    before = columns(model)
    tuner = trainer(tmp_path, model, save_strategy="no")
    tuner.train()
    assert columns(model) == before
    assert any(layer.lamda_S["default"].any() for layer in lamda_layers(model).values())


def test_resume_with_a_longer_run_does_not_thaw(tmp_path: Path) -> None:
    trainer(tmp_path, lamda(), LamdaFreezing(), StopAt(4)).train()
    frozen = frozen_columns(4, STEPS, 5, 0.6)
    for restore in (False, True):
        model = lamda()
        tuner = trainer(tmp_path, model, LamdaFreezing(), StopAt(5), max_steps=100, save_strategy="no",
                        restore_callback_states_from_checkpoint=restore)  # fmt: skip
        tuner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        expected = frozen_columns(5, STEPS, 5, 0.6) if restore else frozen
        assert {layer.frozen_columns("default") for layer in lamda_layers(model).values()} == {expected}


def test_callback_leaves_other_models_alone(tmp_path: Path) -> None:
    tuner = trainer(tmp_path, build("llama"), save_strategy="no", max_steps=1)  # type: ignore[arg-type]
    assert tuner.train().global_step == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_the_adapters(reentrant: bool, tmp_path: Path) -> None:
    """PEFT #1142: adapters that silently get no gradient. Here: the very same weights as without."""
    results = []
    # transformers 5.23 calls it activation checkpointing
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    for checkpointing in (False, True):
        model = lamda()
        options = {
            f"{name}_checkpointing": checkpointing,
            f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        tuner = trainer(tmp_path, model, save_strategy="no", max_steps=4, **options)
        tuner.train()
        results.append({k: v for k, v in model.state_dict().items() if "lamda_S" in k or "lamda_B" in k})
    assert all(v.any() for k, v in results[0].items() if "lamda_S" in k)
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
