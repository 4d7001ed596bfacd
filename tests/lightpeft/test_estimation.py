"""The callback in a real Trainer: accumulation, resuming, loss scaling, several processes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from leantune import TokenTuneConfig, UserError, token_tune
from leantune.lightpeft.config import LightPeftConfig
from leantune.lightpeft.estimation import Estimation, LightPeftEstimation, attach_masks, estimation_of
from tests.lightpeft.masked import adapted, batch, trainer

# a penalty of the size of the gradients: Adam alone would not tell whether they are scaled
CONFIG = LightPeftConfig(
    heads=0.25, neurons=0.25, modules=0.5, ranks=0.5, lambda_heads=1e-2, lambda_neurons=1e-2
)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def masked(method: str = "lora", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = adapted(options.pop("family", "bert"), method, dtype, **options)
    attach_masks(model, CONFIG)
    return model


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Masks, importances, and the adapter's weights."""
    estimation = estimation_of(model)
    assert estimation is not None
    found = {f"mask {name}": value.detach() for name, value in estimation.masks.items()}
    found |= {f"IM {n}": torch.tensor(v).double() for n, v in estimation.module_importance().items()}
    found |= {f"ranks {name}": value for name, value in estimation.rank_importance().items()}
    return found | {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert not value.isnan().any(), name
        torch.testing.assert_close(
            value, theirs[name], **tolerance or {"rtol": 0, "atol": 0}, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_accumulation(family: str, tmp_path: Path) -> None:
    """Four batches of two are one of eight; rows of a causal model differ in their number of labels."""
    results = []
    for size, accumulated in ((8, 1), (2, 4)):
        model = masked(family=family)
        tuner = trainer(
            tmp_path, model, LightPeftEstimation(), family=family, gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=size,
        )  # fmt: skip
        # transformers 5.23 takes every model with **kwargs for one that divides by `num_items_in_batch`
        tuner.loss_is_scaled_for_ga = family == "llama"
        assert tuner.train().global_step == 6
        results.append(learned(model))
    assert_same(*results, rtol=1e-5, atol=1e-6)
    moved = torch.cat([value for name, value in results[0].items() if name.startswith("mask")])
    assert (moved != 1).all() and (moved - 1).abs().max() > 0.01


@pytest.mark.parametrize(("method", "tokens"), [("lora", True), ("lamda", False)])
def test_gradient_checkpointing(method: str, tokens: bool, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = masked(method)
        if tokens:
            token_tune(model, TokenTuneConfig(keep=0.5))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        trainer(tmp_path, model, LightPeftEstimation(), max_steps=3).train()
        results.append(learned(model))
    assert_same(*results, rtol=1e-9, atol=1e-12)


def test_the_second_half_is_measured(tmp_path: Path) -> None:
    """Of five steps the last three: against measurements of every step."""
    model = masked()
    estimation = estimation_of(model)
    assert estimation is not None
    seen: list[tuple[dict[str, Tensor], list[bool]]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parts = (estimation._modules, estimation._ranks)
            seen.append((estimation.state(), [part.active for part in parts if part is not None]))

    trainer(tmp_path, model, LightPeftEstimation(), Watch(), max_steps=5).train()
    assert [active for _, active in seen] == [[False] * 2] * 2 + [[True] * 2] * 3
    assert [float(state["rank_steps"]) for state, _ in seen] == [0, 0, 1, 2, 3]
    tokens = [float(state["module_sums"][0, 1]) for state, _ in seen]
    assert tokens[:2] == [0, 0] and 0 < tokens[2] < tokens[3] < tokens[4]


def test_the_logged_loss_is_the_tasks(tmp_path: Path) -> None:
    """However heavy the penalty."""
    losses = []
    for weight in (0.0, 100.0):
        model = adapted("bert")
        attach_masks(model, LightPeftConfig(lambda_heads=weight, lambda_neurons=weight))
        tuner = trainer(tmp_path, model, LightPeftEstimation(), max_steps=1)
        losses.append(tuner.train().training_loss)
    assert losses[0] == losses[1]


# -- resuming ------------------------------------------------------------------------------------------------


def resumable(folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    arguments = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, **arguments}
    model = masked(dtype=torch.float32, lora_dropout=0.1)
    token_tune(model, TokenTuneConfig(keep=0.6))
    callbacks = callbacks or (LightPeftEstimation(),)
    return trainer(folder, model, *callbacks, per_device_train_batch_size=4, **arguments)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from leantune.tokentune import TokenTuneState

    tuner = resumable(tmp_path_factory.mktemp("whole"), LightPeftEstimation(), TokenTuneState())
    tuner.train()
    return learned(tuner.model), _estimation(tuner).state()


def _estimation(tuner: Trainer) -> Estimation:
    found = estimation_of(tuner.model)
    assert found is not None
    return found


@pytest.mark.parametrize(("stop", "restore"), [(1, True), (3, False), (5, True)])
def test_interrupted_and_resumed_equals_uninterrupted(
    stop: int, restore: bool, tmp_path: Path, whole_run: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    """Bit for bit, in a new Trainer with a new model, before, at and after the half."""
    from leantune.tokentune import TokenTuneState

    resumable(tmp_path, LightPeftEstimation(), TokenTuneState(), StopAt(stop)).train()
    resumed = resumable(
        tmp_path, LightPeftEstimation(), TokenTuneState(), restore_callback_states_from_checkpoint=restore
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_same(learned(resumed.model), whole_run[0])
    assert_same(_estimation(resumed).state(), whole_run[1])
    # and what the resumed run wrote itself
    written = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    saved = written["stateful_callbacks"]["LightPeftEstimation"]["attributes"]["saved"]
    assert_same(safetensors.torch.load(base64.b64decode(saved)), whole_run[1])


def test_a_new_run_starts_anew(tmp_path: Path) -> None:
    """And resuming in the same process takes the checkpoint's masks, not those in memory."""
    tuner = resumable(tmp_path)
    tuner.train()
    first = _estimation(tuner).state()
    tuner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = _estimation(tuner).state()
    assert float(again["rank_steps"]) == float(first["rank_steps"]) == 3
    assert float(again["step.encoder.layer.0.intermediate"]) == 6
    model = tuner.model
    trainer(tmp_path / "other", model, LightPeftEstimation(), max_steps=1).train()
    assert float(_estimation(tuner).state()["rank_steps"]) == 1
    for value in _estimation(tuner).masks.values():
        assert (value - 1).abs().max() < 0.0101


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the model has no masks: call leantune.attach_masks"):
        trainer(tmp_path, adapted("bert"), LightPeftEstimation()).train()
    trainer(tmp_path, adapted("bert"), save_strategy="steps", save_steps=1, max_steps=1).train()
    tuner = trainer(tmp_path, masked(), LightPeftEstimation(), max_steps=2)
    with pytest.raises(UserError, match="the checkpoint holds no masks"):
        tuner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer(tmp_path / "b", masked(), LightPeftEstimation(), save_strategy="steps", save_steps=1,
            max_steps=1).train()  # fmt: skip
    other = trainer(tmp_path / "b", masked(targets=["query"]), LightPeftEstimation(), max_steps=2)
    checkpoint = tmp_path / "b" / "checkpoint-1"
    for weights in checkpoint.glob("adapter_model*"):
        weights.unlink()  # PEFT would complain first
    with pytest.raises((UserError, ValueError)):
        other.train(resume_from_checkpoint=str(checkpoint))


# -- loss scaling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_trainer_unscales_before_the_event(max_grad_norm: float, tmp_path: Path) -> None:
    """The parameters' gradients; the masks' are ours to unscale. float16 on a CPU, with a real scaler."""
    results = []
    for scale in (None, 2.0**8):
        model = masked(dtype=torch.float32)
        tuner = trainer(tmp_path, model, LightPeftEstimation(), max_grad_norm=max_grad_norm, max_steps=4)
        if scale is not None:
            tuner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            tuner.accelerator.native_amp = True
            tuner.accelerator.state._mixed_precision = "fp16"
        try:
            tuner.train()
        finally:
            tuner.accelerator.state._mixed_precision = "no"
        if scale is not None:
            assert tuner.optimizer.scaler.get_scale() == scale  # no step was left out
        results.append(learned(model))
    for kind, tolerance in (("mask", 0.05), ("IM", 0.02), ("ranks", 0.02)):
        ours, theirs = (
            torch.cat([v.flatten() - float(kind == "mask") for n, v in result.items() if n.startswith(kind)])
            for result in results
        )
        assert (ours - theirs).norm() < tolerance * theirs.norm(), kind


# -- two processes -------------------------------------------------------------------------------------------


def run_steps(model: nn.Module, wrapped: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Six steps in a loop of its own on part of each batch of four."""
    estimation = estimation_of(model)
    assert estimation is not None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(6):
        estimation.begin_step(measure=step >= 3)
        data = batch("bert", seed=step)
        wrapped(**{key: value[rows] for key, value in data.items()}).loss.backward()
        estimation.step()
        optimizer.step()
        optimizer.zero_grad()
    return learned(model)


def work() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == 2
    for method in ("lora", "lamda"):
        shared = masked(method)
        together = run_steps(
            shared, nn.parallel.DistributedDataParallel(shared), slice(2 * rank, 2 * rank + 2)
        )
        torch.save(together, Path(sys.argv[1], f"{method}-{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """The masks and importances of one process with the whole batch, and the same on both."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    root = Path(__file__).parents[2]
    subprocess.run(
        [*launcher, "-m", "tests.lightpeft.test_estimation", str(tmp_path)],
        check=True, cwd=root, timeout=300,
    )  # fmt: skip
    for method in ("lora", "lamda"):
        first, second = (torch.load(tmp_path / f"{method}-{rank}.pt") for rank in (0, 1))
        assert_same(first, second)
        model = masked(method)
        assert_same(first, run_steps(model, model, slice(4)), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    work()
