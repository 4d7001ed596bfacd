"""Adapters on quantised layers: exact gradients, the traps of CPUs, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import leantune
from leantune.errors import UserError
from leantune.peft_methods.quantised import dequantised_weight, logical_numel, make_trainable, packing
from leantune.run.quantization import KINDS, quantised_layers
from tests.quantised import batch, need, open_llama, save_llama, unpacked

# Nothing starts at zero, so that every gradient is one.
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "lamda": lambda: leantune.LamdaConfig(
        r=4, target_modules="all-linear", init_b="vectors", init_weights=False
    ),
    "serial": lambda: leantune.BottleneckConfig(r=4, target_modules="all-linear", init_weights=False),
    "parallel": lambda: leantune.BottleneckConfig(
        r=4, mode="parallel", target_modules="all-linear", init_weights=False
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return str(request.param)


def gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the adapter and of the embeddings, to which all layers pass it on."""
    model.train()
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.weight.requires_grad_(True)
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_weights_are_what_the_stored_numbers_say(llama: Path, kind: str) -> None:
    for name, layer in quantised_layers(open_llama(llama, kind)).items():
        found = dequantised_weight(layer)
        assert packing(layer) is not None and found.dtype == torch.float32
        assert found.shape == (layer.out_features, layer.in_features), name
        assert logical_numel(layer.weight) == found.numel()
        torch.testing.assert_close(found.double(), unpacked(layer), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_are_those_of_plain_layers_with_the_dequantised_weight(
    llama: Path, kind: str, adapter: str
) -> None:
    quantised, plain = open_llama(llama, kind), open_llama(llama, None)
    for name, layer in quantised_layers(quantised).items():
        plain.get_submodule(name).weight.data = unpacked(layer).float()
    models = [get_peft_model(base, ADAPTERS[adapter]()) for base in (quantised, plain)]
    own = {key: value for key, value in models[0].state_dict().items() if f"{adapter[:4]}" in key}
    own |= {key: value for key, value in models[0].state_dict().items() if "bottleneck_" in key}
    assert not models[1].load_state_dict(own, strict=False).unexpected_keys
    (loss, found), (expected_loss, expected) = (gradients(model) for model in models)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys() and any("embed_tokens" in key for key in found)
    assert len(found) > 14  # every layer's adapter
    for key in found:
        error = (found[key] - expected[key]).abs().max()
        assert error <= 2e-5 * expected[key].abs().max(), key


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_forward_pass_in_evaluation_cuts_no_gradient(llama: Path, kind: str, adapter: str) -> None:
    model = get_peft_model(open_llama(llama, kind), ADAPTERS[adapter]())
    loss, before = gradients(model)
    with torch.no_grad():
        model.eval()(**batch())
    again, after = gradients(model)
    assert again == loss and all(torch.equal(before[key], after[key]) for key in before)


def test_token_selection_of_all_tokens_is_ordinary_training(llama: Path, kind: str) -> None:
    plain = get_peft_model(open_llama(llama, kind), ADAPTERS["lamda"]())
    chosen = get_peft_model(open_llama(llama, kind), ADAPTERS["lamda"]())
    chosen.load_state_dict(plain.state_dict(), strict=False)
    if kind == "int8":  # its rounding of inputs treats columns with outliers apart, and those are the batch's
        with pytest.raises(UserError, match="with half of the tokens chosen, the two passes do not give"):
            leantune.token_tune(chosen, leantune.TokenTuneConfig(keep=1.0))
        return
    chosen = leantune.token_tune(chosen, leantune.TokenTuneConfig(keep=1.0))
    expected = [gradients(model) for model in (plain, chosen)]
    assert expected[0][0] == pytest.approx(expected[1][0], rel=1e-6)
    for name, gradient in expected[0][1].items():
        found = expected[1][1][name]
        assert (found - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


def _cpu_repacks() -> bool:
    need("nf4")
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def test_the_trap_is_there_without_us(llama: Path) -> None:
    """When this fails, bitsandbytes has mended it, and `make_trainable` can forget about it."""
    if not _cpu_repacks():
        pytest.skip("this CPU has no AVX512_BF16")
    model = open_llama(llama, "nf4")
    for layer in quantised_layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    _, before = gradients(model)
    with torch.no_grad():
        model.eval()(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is no autograd kernel, if it is asked to warn
        _, after = gradients(model)
    changed = "model.embed_tokens.weight"
    assert not torch.allclose(before[changed], after[changed], rtol=0.1)
    with pytest.raises(UserError, match="was repacked for inference by bitsandbytes"):
        get_peft_model(model, leantune.LamdaConfig(r=4, target_modules="all-linear"))


def test_our_methods_switch_the_trap_off_on_any_base(llama: Path) -> None:
    need("nf4")
    for adapter in ("lamda", "serial", "parallel"):
        model = open_llama(llama, "nf4")
        for layer in quantised_layers(model).values():
            layer.support_avx512bf16_for_cpu = True
        get_peft_model(model, ADAPTERS[adapter]())
        assert not any(layer.support_avx512bf16_for_cpu for layer in quantised_layers(model).values())


def test_weights_that_are_unpacked_wrongly_are_refused(tmp_path: Path) -> None:
    """bitsandbytes 0.50.2 takes other blocks' scales on some CPUs; what it packs itself is right."""
    need("nf4")
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    for inputs in (32, 64, 66, 96, 160, 312):
        layer = Linear4bit(inputs, 8, bias=False, quant_type="nf4")
        weight = torch.randn(8, inputs)
        layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
        right = (unpacked(layer) - dequantised_weight(layer)).abs().max() < 1e-6
        assert (unpacked(layer) - weight).abs().max() < 0.6
        if right:
            make_trainable(layer, "x")
            continue
        with pytest.raises(
            UserError, match=f"layer 'x' .{inputs} inputs.: bitsandbytes unpacks 4-bit weights"
        ):
            make_trainable(layer, "x")


def test_what_loses_the_gradient_is_refused(llama: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for adapter in ("lamda", "serial"):
        model = open_llama(llama, None)
        quantization.quantize_(model.model, quantization.Int8DynamicActivationInt8WeightConfig())
        with pytest.raises(UserError, match=r"q_proj'?: torchao quantises its input too .* silently drops"):
            get_peft_model(model, ADAPTERS[adapter]())

    class Int4Tensor:
        __module__ = "torchao.quantization"

    layer: Any = nn.Module()
    object.__setattr__(layer, "weight", Int4Tensor())
    with pytest.raises(UserError, match="torchao's Int4Tensor is not known to pass gradients"):
        make_trainable(layer, "x")
