"""What LoRA has in PEFT and LaMDA has too, or refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from leantune import LamdaConfig, SpectralRanks, UserError, save_as_lora
from leantune.lamda import freeze_columns
from leantune.lamda.model import lamda_layers
from tests.lamda.conftest import TARGETS, batch_for, build, perturb

CLOSE = {"rtol": 0, "atol": 1e-5}


def two_adapters(**second: Any) -> PeftModel:
    settings = {"r": 4, "target_modules": TARGETS["llama"], "init_b": "vectors"}
    model = get_peft_model(build("llama"), LamdaConfig(**settings))
    model.add_adapter("second", LamdaConfig(**{**settings, **second}))
    perturb(model, "default")
    perturb(model, "second", seed=8)
    freeze_columns(model, None, 1, 8)
    return model


def delta(model: PeftModel, name: str, layer: str) -> torch.Tensor | float:
    """What an adapter adds to a layer's weight; nothing where it is not."""
    found = next(module for key, module in lamda_layers(model).items() if key.endswith(layer))
    return found.get_delta_weight(name) if name in found.r else 0.0


@pytest.mark.parametrize(
    ("second", "ranks"),
    [
        ({}, {4}),  # the same A: added up in place
        ({"svd_seed": 1, "init": "random", "r": 3, "lamda_alpha": 6}, {7}),
        (
            {"target_modules": ["v_proj", "up_proj"], "init_scale": "spectrum"},
            {4},
        ),  # not on all the same
    ],
)
def test_weighted_adapters_are_an_exact_sum(
    second: dict[str, Any], ranks: set[int], tmp_path: Path, logits: Any
) -> None:
    model = two_adapters(**second)
    active = logits(model, "llama")
    model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "sum")
    assert torch.equal(logits(model, "llama"), active)  # not active yet, and nothing else moved
    for name, layer in lamda_layers(model).items():
        parts = [delta(model, adapter, name) for adapter in ("default", "second")]
        torch.testing.assert_close(layer.get_delta_weight("sum"), 0.7 * parts[0] - 1.5 * parts[1], **CLOSE)
    assert {layer.r["sum"] for layer in lamda_layers(model).values()} == ranks
    model.set_adapter("sum")
    expected = logits(model, "llama")
    assert not torch.allclose(expected, active, atol=1e-2)
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path / "sum"))
    assert torch.equal(logits(loaded, "llama"), expected)
    model.train()(**batch_for("llama")).loss.backward()  # and it can be trained on
    assert all(layer.lamda_S["sum"].grad is not None for layer in lamda_layers(model).values())


def test_weighted_adapters_refuse_by_name() -> None:
    model = two_adapters()
    for arguments, words in (
        (
            (["default", "nobody"], [1, 1], "sum"),
            r"\['default', 'nobody'\].*must be names out of \['default', 'sec",
        ),
        ((["default"], [1, 1], "sum"), "with a weight each"),
        ((["default"], [1], "second"), "'second' is taken"),
    ):
        with pytest.raises(UserError, match=words):
            model.add_weighted_adapter(*arguments)


def test_exclude_modules_and_modules_to_save() -> None:
    config = LamdaConfig(
        r=2, target_modules="all-linear", exclude_modules=["down_proj", "model.layers.0.self_attn.q_proj"],
        modules_to_save=["lm_head"],
    )  # fmt: skip
    model = get_peft_model(build("llama"), config)
    names = set(lamda_layers(model))
    assert len(names) == 2 * 7 - 2 - 1
    assert not any(
        "down_proj" in n or n.endswith("layers.0.self_attn.q_proj") or "lm_head" in n for n in names
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lamda_" not in n}
    assert trained == {"base_model.model.lm_head.modules_to_save.default.weight"}


def test_hot_swapping_is_refused_by_peft_and_loading_in_place_does_it(tmp_path: Path, logits: Any) -> None:
    """Also for a compiled model, since shapes and scales stay; the LoRA that it exports to can be swapped."""
    model = two_adapters()
    model.set_adapter("second")
    expected = logits(model, "llama")
    model.save_pretrained(str(tmp_path), selected_adapters=["second"])
    model.set_adapter("default")
    with pytest.raises(ValueError, match="only supports LORA but LAMDA"):
        hotswap_adapter(model, str(tmp_path / "second"), "default", torch_device="cpu")
    model.load_adapter(str(tmp_path / "second"), "default")
    assert torch.equal(logits(model, "llama"), expected)
    for name in ("default", "second"):
        save_as_lora(model, tmp_path / f"{name}-lora", name)
    swapped = PeftModel.from_pretrained(build("llama"), str(tmp_path / "default-lora"))
    hotswap_adapter(swapped, str(tmp_path / "second-lora"), "default", torch_device="cpu")
    torch.testing.assert_close(logits(swapped, "llama"), expected, **CLOSE)


def test_a_tied_head_is_adapted_on_its_own_and_peft_says_so(logits: Any) -> None:
    """The adapter works on the head alone. Merging it would change the embeddings too: PEFT warns of both."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=40,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    before = logits(base, "llama")
    with pytest.warns(UserWarning, match="tie_word_embeddings=True` and a tied layer is part of the adapter"):
        model = get_peft_model(base, LamdaConfig(r=4, target_modules=["lm_head"]))
    assert torch.equal(logits(model, "llama"), before)
    perturb(model)
    assert not torch.allclose(logits(model, "llama"), before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), before)
    with pytest.warns(UserWarning, match="tied_target_modules"):
        model.merge_and_unload()


def test_transformers_own_integration_takes_spectral_ranks(tmp_path: Path, logits: Any) -> None:
    model = build("llama")
    config = LamdaConfig(target_modules="all-linear", spectral_ranks=SpectralRanks(4, (2, 4, 6)))
    model.add_adapter(config, "mine")
    assert len({layer.r["mine"] for layer in lamda_layers(model).values()}) > 1
    perturb(model, "mine")
    expected = logits(model, "llama")
    model.save_pretrained(str(tmp_path))
    plain = build("llama")
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain, "llama"), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
def test_a_whole_compiled_model_trains_as_the_plain_one() -> None:
    torch._dynamo.reset()
    grads = []
    for compiled in (False, True):
        model = two_adapters(spectral_ranks=SpectralRanks(4, (2, 4, 6)))
        model.set_adapter("second")
        model.train()
        used = torch.compile(model, backend="aot_eager") if compiled else model
        used(**batch_for("llama")).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)
