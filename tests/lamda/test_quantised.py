"""LaMDA on quantised bases: where its factors come from, and that files carry them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import leantune
from leantune.errors import UserError
from leantune.lamda.init import initial_factors
from leantune.lamda.model import lamda_layers
from leantune.peft_methods.quantised import dequantised_weight
from leantune.run.quantization import KINDS
from tests.lamda.conftest import perturb
from tests.quantised import batch, need, open_llama, save_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return str(request.param)


def config() -> leantune.LamdaConfig:
    return leantune.LamdaConfig(
        r=4, target_modules="all-linear", init_b="vectors", init_scale="spectrum", freeze_ratio=1.0
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_come_from_the_dequantised_weight(llama: Path, kind: str, dtype: str) -> None:
    base = open_llama(llama, kind, dtype)
    start = logits(base)
    model = get_peft_model(base, config())
    assert torch.equal(logits(model), start), "the start is the base model, bit for bit"
    layers = lamda_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        factors = initial_factors(dequantised_weight(layer.get_base_layer()), 4, layer.config["default"])
        A = layer.lamda_A["default"]
        assert A.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        assert torch.equal(A, factors.A.to(A.dtype))
        for buffer, value in ((layer.lamda_S0, factors.S0), (layer.lamda_B0, factors.B0)):
            assert torch.equal(buffer["default"], value.to(A.dtype).to(buffer["default"].dtype))
        assert layer.lamda_S["default"].dtype == torch.float32


def test_files_carry_the_factors(
    llama: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed again from a quantised base on another machine they may differ: loading computes nothing."""
    model = get_peft_model(open_llama(llama, kind), config())
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {
        "lamda_A",
        "lamda_S0",
        "lamda_B0",
        "lamda_S",
        "lamda_B",
    }
    monkeypatch.setattr("leantune.lamda.layer.initial_factors", None)
    again = PeftModel.from_pretrained(open_llama(llama, kind), str(tmp_path))
    assert torch.equal(logits(again), expected)


def test_export_is_equal_and_merging_is_refused(llama: Path, kind: str, tmp_path: Path) -> None:
    model = get_peft_model(open_llama(llama, kind), config())
    perturb(model)
    leantune.save_as_lora(model, tmp_path)
    as_lora = PeftModel.from_pretrained(open_llama(llama, kind), str(tmp_path))
    scale = logits(model).abs().max().item()
    assert (logits(as_lora) - logits(model)).abs().max().item() <= (2e-2 if kind == "int8" else 1e-5) * scale
    with pytest.raises(UserError, match="cannot be merged into a .* layer: rounding"):
        model.merge_and_unload()


@pytest.mark.parametrize("init", ["activation", "gradient"])
def test_ranks_from_spectra_and_a_start_from_data(llama: Path, kind: str, init: str) -> None:
    """Ranks come from the dequantised weight; the start needs inputs and output gradients alone."""
    base = open_llama(llama, kind)
    start = logits(base)
    ranks = leantune.SpectralRanks(4, (2, 4, 6))
    settings = leantune.LamdaConfig(target_modules="all-linear", spectral_ranks=ranks, init=init)
    model = get_peft_model(base, settings)
    for name, layer in lamda_layers(model).items():
        sigma = torch.linalg.svdvals(dequantised_weight(layer.get_base_layer()).double()).square()
        score = settings.spectral_scores[name.removeprefix("base_model.model.")]
        assert score == pytest.approx((sigma[:4].sum() / sigma.sum()).item(), rel=1e-4)
    leantune.prepare_lamda(model, [batch()])
    assert torch.equal(logits(model), start)
    for layer in lamda_layers(model).values():
        A = layer.lamda_A["default"]
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)).to(A), rtol=0, atol=1e-3)
    model.train()(**batch()).loss.backward()
    assert all(layer.lamda_B["default"].grad.any() for layer in lamda_layers(model).values())
