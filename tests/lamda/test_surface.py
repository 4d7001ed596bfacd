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
        ((["default", "second"], [1, 1], "sum", "svd"), "combination_type='svd': LaMDA has 'cat' alone"),
    ):
        with pytest.raises(UserError, match=words):
            model.add_weighted_adapter(*arguments)
    with pytest.raises(UserError, match="combination_type='ties', density=0.5: LaMDA has"):
        model.add_weighted_adapter(["default"], [1], "sum", combination_type="ties", density=0.5)
    assert set(model.peft_config) == {"default", "second"}


@pytest.mark.parametrize(
    "beside",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}, {"bias": "all"}],
    ids=lambda beside: next(iter(beside)),
)
def test_what_is_trained_beside_an_adapter_has_no_sum(beside: dict[str, Any]) -> None:
    """It would be left out, and the new adapter would be something else than it says."""
    model = two_adapters(**beside)
    with pytest.raises(UserError, match=f"adapter 'second' has {next(iter(beside))}=.*no weighted sum"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum")
    assert set(model.peft_config) == {"default", "second"}
    model.add_weighted_adapter(["default"], [2], "twice")


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


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # of Conv1D: PEFT sets it itself
@pytest.mark.parametrize("bias", ["none", "all", "lamda_only"])
def test_biases_and_rows_of_the_embedding(bias: str, tmp_path: Path, logits: Any) -> None:
    """Trained beside the adapter, saved with it, and part of the LoRA that it is exported to."""
    targets = ["c_attn"]  # of GPT-2, whose layers have biases
    config = LamdaConfig(r=4, target_modules=targets, bias=bias, trainable_token_indices=[1, 3, 5])
    model = get_peft_model(build("gpt2"), config)
    others = {n: p for n, p in model.named_parameters() if p.requires_grad and "lamda_" not in n}
    rows = {n for n in others if n.endswith("trainable_tokens_delta.default")}
    biases = [n for n in others if n.endswith(".bias")]
    every = [n for n, _ in model.named_parameters() if n.endswith(".bias")]
    expected = {"none": [], "all": every, "lamda_only": [n for n in every if "c_attn.base_layer" in n]}
    assert biases == expected[bias] and rows and others.keys() == {*biases, *rows}
    perturb(model)
    with torch.no_grad():
        for parameter in others.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    said = logits(model, "gpt2")
    model.save_pretrained(str(tmp_path / "lamda"))
    loaded = PeftModel.from_pretrained(build("gpt2"), str(tmp_path / "lamda"))
    assert torch.equal(logits(loaded, "gpt2"), said)
    save_as_lora(model, tmp_path / "lora")
    exported = PeftModel.from_pretrained(build("gpt2"), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(exported, "gpt2"), said, **CLOSE)
    if bias != "none":
        with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
            model.add_adapter("second", config)


def test_names_are_such_that_deepspeed_finds_its_way() -> None:
    """It goes by names: each part an identifier, each name one tensor, reachable by it, and each has one."""
    model = two_adapters(init_scale="spectrum", modules_to_save=["lm_head"])
    model.set_adapter("second")
    parameters, state = dict(model.named_parameters(remove_duplicate=False)), model.state_dict()
    assert len({id(p) for p in parameters.values()}) == len(parameters)
    for name, tensor in (*parameters.items(), *model.named_buffers(remove_duplicate=False)):
        assert all(part.isdigit() or part.isidentifier() for part in name.split(".")), name
        owner = model.get_submodule(name.rpartition(".")[0])
        assert getattr(owner, name.rpartition(".")[2]) is tensor, name
    assert parameters.keys() <= state.keys()
    assert all(p.is_contiguous() for p in parameters.values())


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (torch.nn.Conv2d(2, 2, 1), "Conv2d"),
        (torch.nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (torch.nn.Embedding(4, 4), "Embedding"),
    ],
)
def test_layers_that_are_not_linear_are_named(layer: torch.nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=f"Currently, only .* layer 'inner' is a {words}"):
        get_peft_model(torch.nn.ModuleDict({"inner": layer}), LamdaConfig(r=1, target_modules=["inner"]))


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
