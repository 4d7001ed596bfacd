"""LoRA's variants as whole runs: trained, reloaded, resumed, exported; and what makes each of them itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import leantune
from leantune.baselines import LORA_VARIANTS, AdaLoraBudget, freeze_down_projections, lora_variant
from leantune.errors import UserError
from leantune.run import Interrupted
from leantune.run.folder import RunFolder
from tests.lamda.conftest import TARGETS, batch_for, build
from tests.run.support import quiet, recipe
from tests.run.test_pipeline import StopAt, same, weights

COMMON = {"target_modules": TARGETS["bert"], "task_type": "SEQ_CLS"}


def lean(variant: str) -> dict[str, Any]:
    return {"adapter": {"type": "lora", "variant": variant, "r": 4, "dropout": 0.1}}


@pytest.fixture(scope="module", params=LORA_VARIANTS[1:])
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    bert_folder: Path,
    data_folder: Path,
) -> Any:
    output = tmp_path_factory.mktemp(request.param) / "run"
    made = recipe(bert_folder, data_folder, output, lean(request.param), train={"weight_decay": 0.1})
    return leantune.train(made, console=quiet())


def test_a_run_learns_and_says_the_same_when_it_is_opened_again(finished: Any) -> None:
    assert finished.metrics["method"] == finished.recipe.lean.adapter.variant
    log = [json.loads(line) for line in RunFolder(finished.folder).log_file.read_text().splitlines()]
    losses = [line["loss"] for line in log if "evaluation" not in line]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert leantune.evaluate(finished.folder) == finished.metrics["evaluation"]


def test_exports(finished: Any, tmp_path: Path) -> None:
    assert leantune.export(finished.folder, "merged", tmp_path / "merged").max_abs_difference <= 1e-5
    if finished.metrics["method"] in ("adalora", "vera"):
        with pytest.raises(UserError, match="is no LoRA in PEFT's files; use --to merged"):
            leantune.export(finished.folder, "lora", tmp_path / "lora")
    else:
        assert leantune.export(finished.folder, "lora", tmp_path / "lora").max_abs_difference <= 1e-5


@pytest.mark.parametrize("stop", [2, 11])
def test_resumed_equals_uninterrupted(
    stop: int, finished: Any, bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from leantune.run import lean as module

    variant = finished.metrics["method"]
    changes = {"train": {"weight_decay": 0.1}}
    made = recipe(bert_folder, data_folder, tmp_path / "run", lean(variant), **changes)
    needed = module.callbacks
    with monkeypatch.context() as patched:
        patched.setattr(module, "callbacks", lambda recipe: [StopAt(stop), *needed(recipe)])
        with pytest.raises(Interrupted):
            leantune.train(made, console=quiet())
    if variant == "adalora":
        with pytest.raises(UserError, match="adalora: PEFT keeps the scores.*cannot be resumed"):
            leantune.train(made, resume=True, console=quiet())
        return
    leantune.train(made, resume=True, console=quiet())
    assert same(weights(finished.folder), weights(tmp_path / "run"))


def test_each_is_what_it_is_called(finished: Any) -> None:
    state = load_file(finished.folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((finished.folder / "adapter" / "adapter_config.json").read_text())
    kinds = {part for key in state for part in key.split(".") if part.startswith(("lora_", "vera_"))}
    variant = finished.metrics["method"]
    assert config["peft_type"] == {"adalora": "ADALORA", "vera": "VERA"}.get(variant, "LORA")
    assert config.get("use_dora", False) == (variant == "dora") == ("lora_magnitude_vector" in kinds)
    assert config.get("use_rslora", False) == (variant == "rslora")
    if variant == "vera":
        assert kinds >= {"vera_lambda_b", "vera_lambda_d"}


def test_adalora_gives_ranks_up_to_its_budget(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run", lean("adalora"))
    leantune.train(made, console=quiet())
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    kept = [sum(ranks) for ranks in config["rank_pattern"].values()]
    assert config["init_r"] == 6 and config["target_r"] == 4 and config["total_step"] == 12
    assert sum(kept) == 4 * len(kept) and len(set(kept)) > 1
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sorted(len(v) for k, v in state.items() if k.endswith("lora_A")) == sorted(kept)


def lora_fa() -> PeftModel:
    model = get_peft_model(build("bert"), lora_variant("lora-fa", 4, 8, 0.0, COMMON))
    freeze_down_projections(model)
    return model


def test_lora_fa_keeps_a_frozen_whatever_is_switched(tmp_path: Path) -> None:
    model = lora_fa()
    frozen = [p for name, p in model.named_parameters() if "lora_A" in name]
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert not any(p.requires_grad for p in frozen) and all(p.requires_grad for p in trained)
    model.train()(**batch_for("bert")).loss.backward()
    assert all(p.grad is None for p in frozen) and all(p.grad is not None for p in trained)


def test_lora_fa_does_not_keep_the_inputs() -> None:
    saved = {}
    for variant in ("lora", "lora-fa"):
        model = lora_fa() if variant == "lora-fa" else get_peft_model(
            build("bert"), lora_variant("lora", 4, 8, 0.0, COMMON)
        )  # fmt: skip
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(**batch_for("bert", size=16))
        saved[variant] = sum(seen.values())
    assert saved["lora-fa"] < saved["lora"]


def test_vera_has_no_modules_to_leave_out() -> None:
    with pytest.raises(UserError, match=r"exclude_modules=\['key'\]: PEFT's VeRA has none"):
        lora_variant("vera", 4, 8, 0.0, COMMON | {"exclude_modules": ["key"]})


def test_the_budget_minds_adalora_alone() -> None:
    class State:
        max_steps, global_step = 10, 0

    model = get_peft_model(build("bert"), lora_variant("lora", 4, 8, 0.0, COMMON))
    for event in ("on_train_begin", "on_optimizer_step"):
        getattr(AdaLoraBudget(), event)(None, State(), None, model=model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prune": {"heads": 0.5}}, "prune does not go with adapter.variant=dora; it does with lora"),
        (
            {"quantize": "int8"},
            "quantize does not go with adapter.variant=dora; it does with lora, rs",
        ),
    ],
)
def test_what_does_not_go_together_is_named(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        recipe(tmp_path, tmp_path, tmp_path / "run", lean("dora") | settings)
