"""Attaching, taking off, and refusing by name."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import leantune
from leantune import UserError
from leantune.tokentune import TokenTuneConfig, check, chosen_tokens, token_tune
from tests.tiny_models import batch_for, tiny


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_reversible_and_the_same_object() -> None:
    model = tiny("llama", dtype=torch.float32)
    before, state = hooks(model), {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    assert token_tune(model, TokenTuneConfig(0.5)) is model
    assert torch.equal(torch.get_rng_state(), rng)
    assert not model.training
    assert hooks(model) > before
    assert token_tune(model, None) is model
    assert hooks(model) == before
    assert "forward" not in model.__dict__
    assert "get_interface" not in ALL_ATTENTION_FUNCTIONS.__dict__
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_signature_stays_for_trainer() -> None:
    model = tiny("llama", dtype=torch.float32)
    names = list(inspect.signature(model.forward).parameters)
    token_tune(model, TokenTuneConfig(0.5))
    assert list(inspect.signature(model.forward).parameters) == names


def test_a_copy_is_tuned_on_its_own() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama")
    token_tune(model, TokenTuneConfig(3)).train()
    other = copy.deepcopy(model)
    other(**batch)
    assert chosen_tokens(other).shape == (3, 3)
    with pytest.raises(UserError, match="run a training forward first"):
        chosen_tokens(model)


def test_attaching_again_replaces() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama")
    for keep in (3, 5):
        token_tune(model, TokenTuneConfig(keep)).train()(**batch)
        assert chosen_tokens(model).shape == (3, keep)
    token_tune(model, None)
    assert hooks(model) == 0


def test_tuple_outputs_and_positional_arguments() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama")
    token_tune(model, TokenTuneConfig(1.0)).train()
    loss, logits, *_ = model(batch["input_ids"], labels=batch["labels"], return_dict=False)
    assert torch.allclose(loss, model(**batch).loss)
    assert logits.shape == (3, 12, 99)


def refusal(model: torch.nn.Module) -> str:
    reason = check(model)
    assert reason is not None
    assert "\n" not in reason
    assert hooks(model) == 0
    return reason


def test_check_says_nothing_of_a_good_model() -> None:
    assert check(tiny("llama", dtype=torch.float32)) is None


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: transformers.MambaForCausalLM(
                transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)
            ),
            "MambaBlock",
        ),
        (
            lambda: transformers.BloomForCausalLM(
                transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
            ),
            "makes no call through transformers' attention interface",
        ),
        (lambda: tiny("bert", "base", dtype=torch.float32), "no model with a head"),
        (lambda: tiny("opt", dtype=torch.float32, layerdrop=0.1), "layerdrop"),
        (lambda: tiny("mixtral", dtype=torch.float32, output_router_logits=True), "output_router_logits"),
        (lambda: tiny("mixtral", dtype=torch.float32, router_jitter_noise=0.5), "random numbers"),
        (
            lambda: tiny("vit", "image", dtype=torch.float32, attn_implementation="flex_attention"),
            "flex_attention",
        ),
        (lambda: torch.nn.Linear(2, 2), "no transformers model"),
    ],
)
def test_refused_by_name(build: Any, words: str) -> None:
    model = build()
    if isinstance(model, torch.nn.Linear):
        with pytest.raises(UserError, match=words):
            token_tune(model, TokenTuneConfig())
    else:
        assert words in refusal(model)


def test_a_model_that_mixes_tokens_elsewhere_is_caught_by_trying() -> None:
    model = tiny("llama", dtype=torch.float32)
    layer = model.model.layers[1]
    mlp = layer.mlp.forward
    layer.mlp.forward = lambda x: mlp(x) + x.mean(1, keepdim=True)
    assert "do not give the model's own" in refusal(model)


def test_training_past_the_two_passes_is_refused() -> None:
    """TRL replaces the model's forward and calls the model below its head: not to go unnoticed."""
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama", labels=False)
    token_tune(model, TokenTuneConfig(0.5)).train()
    with pytest.raises(UserError, match="trained on all tokens"):
        model.model(**batch)
    with torch.no_grad():
        model.model(**batch)


def test_labels_are_needed_in_training() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama", labels=False)
    token_tune(model, TokenTuneConfig(0.5)).train()
    with pytest.raises(UserError, match="needs labels"):
        model(**batch)


def test_labels_that_do_not_fit() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama")
    token_tune(model, TokenTuneConfig(0.5)).train()
    batch["labels"] = batch["labels"][:, :-2]
    with pytest.raises(UserError, match="do not fit"):
        model(**batch)


def test_a_filled_cache_is_refused() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama")
    token_tune(model, TokenTuneConfig(0.5)).train()
    with pytest.raises(UserError, match="past_key_values"):
        model(**batch, past_key_values=transformers.DynamicCache())


def test_not_attached() -> None:
    with pytest.raises(UserError, match="not attached"):
        leantune.chosen_tokens(tiny("llama", dtype=torch.float32))


def test_public_names() -> None:
    assert leantune.token_tune is token_tune
    assert leantune.TokenTuneConfig is TokenTuneConfig
