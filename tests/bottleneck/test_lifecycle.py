"""PEFT's whole round on four architectures."""

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
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file

from leantune.bottleneck import BottleneckConfig, BottleneckModel
from leantune.bottleneck.model import bottleneck_layers
from leantune.errors import UserError
from tests.bottleneck.conftest import NAMES, TASKS, base, batch_for, config_for, trained

CLOSE = {"rtol": 0, "atol": 1e-4}
AUTO = {
    "bert": AutoPeftModelForSequenceClassification,
    "t5": AutoPeftModelForSeq2SeqLM,
    "llama": AutoPeftModelForCausalLM,
    "gpt2": AutoPeftModelForCausalLM,
}


@pytest.fixture
def model(family: str, mode: str) -> PeftModel:
    return trained(family, mode=mode)


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def disturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bottleneck_" in name:
                parameter.add_(0.5)


def test_registered() -> None:
    member = PeftType("BOTTLENECK")
    assert member in list(PeftType) and member.value == "BOTTLENECK"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is BottleneckConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is BottleneckModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "bottleneck_"


def test_only_the_adapter_is_trainable_whatever_happens(model: PeftModel, family: str) -> None:
    expected = {name for name, _ in model.named_parameters() if ".bottleneck_" in name}
    assert len(expected) == 4 * len(bottleneck_layers(model)) > 0
    expected |= {name for name, _ in model.named_parameters() if ".modules_to_save." in name}
    assert trainable(model) == expected
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.set_requires_grad("default", requires_grad=False)
    assert not trainable(model)
    model.set_requires_grad("default", requires_grad=True)
    model.add_adapter("second", config_for(family))
    model.set_adapter("second")
    assert not any("default" in name for name in trainable(model))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert trainable(model) == expected


def test_save_and_load(model: PeftModel, family: str, tmp_path: Path, logits: Any) -> None:
    expected = logits(model, family)
    assert not torch.allclose(expected, logits(base(family), family), atol=1e-2)
    model.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".")[-1] for key in state if "bottleneck_" in key} == set(NAMES)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "renamed"}):
        loaded = PeftModel.from_pretrained(base(family), str(tmp_path), **options)
        assert torch.equal(logits(loaded, family), expected), options
        assert bool(trainable(loaded)) == ("is_trainable" in options)
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    disturb(model)
    assert not torch.equal(logits(model, family), expected)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(model, family), expected)


def test_auto_peft_model_and_transformers_integration(
    model: PeftModel, family: str, tmp_path: Path, logits: Any
) -> None:
    expected = logits(model, family)
    base(family).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    options = {"attn_implementation": "eager", **({"num_labels": 3} if family == "bert" else {})}
    auto = AUTO[family].from_pretrained(str(tmp_path / "adapter"), **options)
    assert torch.equal(logits(auto, family), expected)
    plain = base(family)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain, family), expected)
    plain.disable_adapters()
    plain.enable_adapters()
    assert torch.equal(logits(plain, family), expected)
    plain.save_pretrained(str(tmp_path / "again"))
    again = PeftModel.from_pretrained(base(family), str(tmp_path / "again"))
    assert torch.equal(logits(again, family), expected)
    fresh = base(family)
    fresh.add_adapter(config_for(family))
    assert torch.equal(logits(fresh, family), logits(base(family), family))


def test_it_learns_and_checkpointing_changes_nothing(mode: str, family: str) -> None:
    batch = batch_for(family, TASKS[family])
    losses = []
    for checkpointing in (False, True):
        model = trained(family, mode=mode).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == losses[1]


def test_unload_and_disable_give_the_base_and_merging_is_refused(
    model: PeftModel, family: str, logits: Any
) -> None:
    expected, plain = logits(model, family), logits(base(family), family)
    for merging in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_and_unload):
        with pytest.raises(UserError, match="not linear, so it cannot be merged"):
            merging()
    layer = next(iter(bottleneck_layers(model).values()))
    for method in (layer.merge, layer.unmerge):
        with pytest.raises(UserError, match="not linear, so it cannot be merged"):
            method()
    assert not model.supports_lora_conversion()
    assert torch.equal(logits(model, family), expected)
    with model.disable_adapter():
        if family != "bert":  # whose classifier is trained, too
            assert torch.equal(logits(model, family), plain)
    unloaded = model.unload()
    assert not bottleneck_layers(unloaded)
    assert torch.equal(logits(unloaded, family), plain)


def test_several_adapters(family: str, logits: Any) -> None:
    """A serial and a parallel one of another width over one base; rows of one batch through each."""
    plain = logits(base(family), family)
    model = trained(family, mode="serial")
    model.add_adapter(
        "second", config_for(family, r=3, mode="parallel", activation="gelu", init_weights=False)
    )
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = logits(model, family)
        assert not torch.allclose(outputs[name], plain, atol=1e-2)
    names = ["default", "second", "__base__"]
    if family != "bert":
        mixed = logits(model, family, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], outputs.get(name, plain)[row], **CLOSE)
    batch = batch_for(family, TASKS[family])
    with pytest.raises(ValueError, match="nobody"):
        model.eval()(**batch, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match="but got 2 and 3 respectively"):
        model.eval()(**batch, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch, adapter_names=names)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert torch.equal(logits(model, family), outputs["second"])
    assert not [name for name in model.state_dict() if "default" in name]


def test_mixed_batch_in_beam_search() -> None:
    model = trained("t5").eval()
    ids = batch_for("t5", "seq2seq", labels=False)["input_ids"]
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, adapter_names=["default"] * 3, **options), expected)


def test_all_linear_a_second_time_finds_the_same_layers() -> None:
    model = trained("llama", target_modules="all-linear")
    count = len(bottleneck_layers(model))
    assert count == 7 * 3
    model.add_adapter("second", config_for("llama", target_modules="all-linear"))
    assert all(set(layer.r) == {"default", "second"} for layer in bottleneck_layers(model).values())
    assert len(bottleneck_layers(model)) == count


def test_beside_lora_over_one_base_is_refused_not_mixed_up() -> None:
    with pytest.raises(Exception, match="(?i)lora|peft|type|mixed"):
        trained("llama").add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"]))


def test_deepcopy_and_pickle(model: PeftModel, family: str, logits: Any) -> None:
    expected = logits(model, family)
    assert torch.equal(logits(copy.deepcopy(model), family), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), family), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    disturb(model)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(model, family), expected)


def test_config_round_trip(tmp_path: Path) -> None:
    config = config_for(
        "llama",
        mode="parallel",
        activation="tanh",
        rank_pattern={"o_proj": 2},
        alpha_pattern={"o_proj": 3.0},
        bottleneck_bias=False,
    )
    model = get_peft_model(base("llama"), config)
    model.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, BottleneckConfig)
    different = {key for key, value in config.to_dict().items() if loaded.to_dict()[key] != value}
    assert different <= {"inference_mode", "auto_mapping"}
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".")[-1] for key in keys} == {"bottleneck_down", "bottleneck_up"}
    for name, layer in bottleneck_layers(model).items():
        assert (layer.r["default"], layer.scaling["default"]) == ((2, 1.5) if "o_proj" in name else (4, 1.0))


def test_low_memory_loading_keeps_float32_on_a_bfloat16_base(tmp_path: Path, logits: Any) -> None:
    model = get_peft_model(base("llama", torch.bfloat16), config_for("llama", init_weights=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.001)  # not to be had in bfloat16
    expected = logits(model, "llama")
    model.save_pretrained(str(tmp_path))
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            base("llama", torch.bfloat16), str(tmp_path), low_cpu_mem_usage=low
        )
        assert torch.equal(logits(loaded, "llama"), expected)
        for name, layer in bottleneck_layers(loaded).items():
            for key in NAMES:
                found, saved = (
                    getattr(some, key)["default"] for some in (layer, bottleneck_layers(model)[name])
                )
                assert found.dtype == torch.float32 and torch.equal(found, saved)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(mode: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = get_peft_model(base("llama", dtype), config_for("llama", mode=mode, init_weights=False))
    layer = next(iter(bottleneck_layers(model).values()))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, layer.in_features, dtype=dtype)
    close = {"rtol": 0, "atol": 1e-5 if dtype is torch.float32 else 3e-2}
    torch.testing.assert_close(compiled(x), layer(x), **close)
    compiled(x).float().square().mean().backward()
    ours = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer(x).float().square().mean().backward()
    assert sorted(ours) == [f"{name}.default" for name in NAMES]
    for name, parameter in layer.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, **close)
