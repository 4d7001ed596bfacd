"""PEFT's whole round on three architectures."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file

import leantune.lamda.layer as layer_module
from leantune import LamdaConfig
from leantune.lamda import freeze_columns
from leantune.lamda.model import lamda_layers
from tests.lamda.conftest import TARGETS, batch_for, build, perturb

CLOSE = {"rtol": 0, "atol": 1e-5}


def config_for(family: str, **settings: Any) -> LamdaConfig:
    settings = {"r": 4, "init_b": "vectors", "init_scale": "spectrum", **settings}
    return LamdaConfig(
        target_modules=TARGETS[family], task_type="SEQ_CLS" if family == "bert" else None, **settings
    )


@pytest.fixture(params=[0, 2, 4], ids=lambda frozen: f"frozen{frozen}")
def frozen(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def model(family: str, frozen: int) -> PeftModel:
    """As after training: random S and B, some columns frozen."""
    model = get_peft_model(build(family), config_for(family))
    perturb(model)
    freeze_columns(model, None, 3 * frozen, 40)
    assert {layer.frozen_columns("default") for layer in lamda_layers(model).values()} == {frozen}
    return model


def trainable(model: torch.nn.Module) -> set[str]:
    return {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.numel()
    }


def test_nothing_but_s_and_unfrozen_b_is_trainable_whatever_happens(
    model: PeftModel, family: str, frozen: int
) -> None:
    expected = {
        n for n, p in model.named_parameters() if ".lamda_S." in n or (".lamda_B." in n and p.numel())
    }
    expected |= {n for n, _ in model.named_parameters() if ".modules_to_save." in n}
    assert trainable(model) == expected
    kept = {n: (p.shape, p.data_ptr()) for n, p in model.named_parameters()}
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.train()
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_requires_grad("default", requires_grad=False)
    assert not trainable(model)
    model.set_requires_grad("default", requires_grad=True)
    model.add_adapter("second", config_for(family))
    model.set_adapter("second")
    assert not any("default" in name for name in trainable(model))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert trainable(model) == expected
    assert {n: p.requires_grad for n, p in model.named_parameters() if ".lamda_B." in n} == {
        n: frozen < 4 for n, p in model.named_parameters() if ".lamda_B." in n
    }
    assert {n: (p.shape, p.data_ptr()) for n, p in model.named_parameters() if "lamda_" in n} == {
        n: value for n, value in kept.items() if "lamda_" in n
    }
    assert not any(t.requires_grad for t in model.buffers())


def test_save_and_load(model: PeftModel, family: str, tmp_path: Path, logits: Any, monkeypatch: Any) -> None:
    expected = logits(model, family)
    model.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.split(".")[-1] for key in state if "lamda_" in key}
    assert kinds == {"lamda_A", "lamda_B", "lamda_B0", "lamda_S", "lamda_S0"}
    assert all(value.shape[1] == 4 for key, value in state.items() if key.endswith("lamda_B"))
    # The factors come from the file: another base, and no SVD at all.
    monkeypatch.setattr(layer_module, "initial_factors", None)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "renamed"}):
        loaded = PeftModel.from_pretrained(build(family), str(tmp_path), **options)
        assert torch.equal(logits(loaded, family), expected), options
        assert bool(trainable(loaded)) == ("is_trainable" in options)
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    # Loading into an adapter that is there already, frozen as it is.
    perturb(model, seed=9)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(model, family), expected)


def test_auto_peft_model_and_transformers_integration(
    model: PeftModel, family: str, tmp_path: Path, logits: Any, monkeypatch: Any
) -> None:
    expected = logits(model, family)
    build(family).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.setattr(layer_module, "initial_factors", None)
    options = {"num_labels": 3} if family == "bert" else {}
    auto = AutoPeftModelForSequenceClassification if family == "bert" else AutoPeftModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(str(tmp_path / "adapter"), **options), family), expected)
    plain = build(family)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain, family), expected)
    plain.disable_adapters()
    plain.enable_adapters()
    assert torch.equal(logits(plain, family), expected)
    plain.save_pretrained(str(tmp_path / "again"))
    assert torch.equal(
        logits(PeftModel.from_pretrained(build(family), str(tmp_path / "again")), family), expected
    )


def test_merge_unmerge_and_unload(model: PeftModel, family: str, logits: Any) -> None:
    expected, base = logits(model, family), logits(build(family), family)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, family), expected, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, family), expected, **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, family), base, **CLOSE)
    torch.testing.assert_close(logits(copy.deepcopy(model).unload(), family), base, **CLOSE)
    merged = model.merge_and_unload()
    assert not lamda_layers(merged)
    torch.testing.assert_close(logits(merged, family), expected, **CLOSE)


def test_safe_merge_refuses_a_broken_adapter() -> None:
    model = get_peft_model(build("llama"), config_for("llama"))
    layer = next(iter(lamda_layers(model).values()))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lamda_S["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_several_adapters(family: str, logits: Any) -> None:
    base = logits(build(family), family)
    model = get_peft_model(build(family), config_for(family))
    model.add_adapter("second", config_for(family, r=3, init="orthogonal", init_scale="identity"))
    perturb(model, "default")
    perturb(model, "second", seed=8)
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = logits(model, family)
        assert not torch.allclose(outputs[name], base, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), base) or family == "bert"
    # Both at once: the sum of both changes in every layer. (PEFT refuses two trained classifiers at once.)
    for layer in lamda_layers(model).values():
        layer.set_adapter(["default", "second"])
        x = torch.randn(2, layer.in_features)
        both = layer(x) - layer.base_layer(x)
        each = [layer.adapter_output(name, x) for name in ("default", "second")]
        torch.testing.assert_close(both, each[0] + each[1], **CLOSE)
    model.base_model.set_adapter("default")
    # A batch whose rows use different adapters.
    names = ["default", "second", "__base__", "second"]
    if family != "bert":  # whose classifier is trained per adapter, too
        mixed = logits(model, family, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], outputs.get(name, base)[row], **CLOSE)
    with pytest.raises(ValueError, match="nobody"):
        model.eval()(**batch_for(family), adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch_for(family), adapter_names=names)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert torch.equal(logits(model, family), outputs["second"])
    assert not [name for name in model.state_dict() if "default" in name]


def test_adapter_beside_lora_over_one_base_is_refused_not_mixed_up() -> None:
    model = get_peft_model(build("llama"), config_for("llama"))
    with pytest.raises(Exception, match="(?i)lora|peft|type|mixed"):
        model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"]))


def test_deepcopy_and_pickle(model: PeftModel, family: str, logits: Any) -> None:
    expected = logits(model, family)
    assert torch.equal(logits(copy.deepcopy(model), family), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), family), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    perturb(model, seed=9)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(model, family), expected)


def test_config_round_trip_and_a_fresh_adapter_from_it(tmp_path: Path, logits: Any) -> None:
    """A config from a file puts the SVD off, but a fresh adapter made from it is as good as any other."""
    config = config_for("llama", rank_pattern={"q_proj": 2})
    model = get_peft_model(build("llama"), config)
    model.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, LamdaConfig)
    different = {key for key, value in config.to_dict().items() if loaded.to_dict()[key] != value}
    assert different <= {"inference_mode", "auto_mapping"}
    for use in ("forward", "save", "merge"):
        fresh = get_peft_model(build("llama"), PeftConfig.from_pretrained(str(tmp_path)))
        if use == "forward":
            fresh(**batch_for("llama"))
        elif use == "merge":
            fresh.merge_adapter()
        else:
            fresh.save_pretrained(str(tmp_path / "fresh"))
            saved = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
            original = load_file(tmp_path / "adapter_model.safetensors")
            assert all(torch.equal(saved[key], value) for key, value in original.items())
        for name, layer in lamda_layers(fresh).items():
            assert torch.equal(layer.lamda_A["default"], lamda_layers(model)[name].lamda_A["default"])


def test_low_memory_loading_keeps_float32_on_a_bfloat16_base(tmp_path: Path, logits: Any) -> None:
    model = get_peft_model(build("llama").bfloat16(), config_for("llama"))
    perturb(model)
    expected = logits(model, "llama")
    model.save_pretrained(str(tmp_path))
    for low in (False, True):
        loaded = PeftModel.from_pretrained(build("llama").bfloat16(), str(tmp_path), low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded, "llama"), expected)
        layer = next(iter(lamda_layers(loaded).values()))
        assert layer.lamda_A["default"].dtype == torch.bfloat16
        assert layer.lamda_S["default"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
def test_compile() -> None:
    torch._dynamo.reset()
    model = get_peft_model(build("llama"), config_for("llama"))
    perturb(model)
    layer = next(iter(lamda_layers(model).values()))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
    compiled(x).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert sorted(ours) == ["lamda_B.default", "lamda_S.default"]
    for name, parameter in layer.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-4)
