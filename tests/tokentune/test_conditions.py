"""Exactness under what training adds: adapters, checkpointing, two forwards, masks, autocast, dropout."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import leantune
from leantune.tokentune import TokenTuneConfig, chosen_tokens, token_tune
from tests.tiny_models import all_in_float64, batch_for, tiny
from tests.tokentune.reference import as_mask, brute_force, reference_batch
from tests.tokentune.test_exact import TOLERANCE, compare, gradients, ordinary, worst


def checkpointed(model: nn.Module, reentrant: bool = False) -> nn.Module:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model


def lora(model: nn.Module, **config: object) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **config)
    model = peft.get_peft_model(model, config)
    return model.double()


@pytest.mark.parametrize("kv", ["recompute", "keep"])
@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "causal-lm"),
        ("gemma3", "causal-lm"),
        ("bert", "masked-lm"),
        ("bart", "seq2seq"),
        ("gpt2", "causal-lm"),
    ],
)
def test_gradient_checkpointing(family: str, task: str, kv: str) -> None:
    model = checkpointed(tiny(family, task, attn_implementation="sdpa"))
    batch = batch_for(model, task, padding="left")
    assert _checkpointed_error(model, task, batch, kv) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "task"), [("t5", "seq2seq"), ("deberta-v3", "masked-lm"), ("vit", "image")]
)
def test_gradient_checkpointing_of_special_attention(family: str, task: str) -> None:
    model = checkpointed(tiny(family, task))
    assert _checkpointed_error(model, task, batch_for(model, task), "recompute") < TOLERANCE


def _checkpointed_error(model: nn.Module, task: str, batch: dict, kv: str) -> float:
    """Worst relative error of checkpointed TokenTune against TokenTune without checkpointing."""
    plain = copy.deepcopy(model)
    plain.activation_checkpointing_disable()
    results = []
    with all_in_float64():
        for each in (model, plain):
            token_tune(each, TokenTuneConfig(0.4, seed=2, checkpointed_kv=kv)).train()
            results.append(gradients(each, each(**batch).loss))
    return worst(*results)


def test_checkpointing_by_reentrant_autograd() -> None:
    model = checkpointed(tiny("llama", attn_implementation="sdpa"), reentrant=True)
    model.enable_input_require_grads()
    batch, plain = batch_for(model), tiny("llama", attn_implementation="sdpa")
    with all_in_float64():
        for each in (model, plain):
            token_tune(each, TokenTuneConfig(0.4, seed=2)).train()
            each(**batch).loss.backward()
    mine, theirs = ({n: p.grad for n, p in each.named_parameters()} for each in (model, plain))
    assert worst(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_under_lora(family: str) -> None:
    model = lora(tiny(family, attn_implementation="sdpa"), fan_in_fan_out=family == "gpt2")
    batch = batch_for(family, padding="left")
    assert compare(model, "causal-lm", batch, 0.4) < TOLERANCE
    assert ordinary(model, batch) < TOLERANCE


def test_under_lora_attached_first() -> None:
    base = tiny("bert", "classification")
    token_tune(base, TokenTuneConfig(0.4))
    model = lora(base)
    batch = batch_for("bert", "classification", padding="right")
    assert compare(model, "classification", batch, 0.4) < TOLERANCE


def test_under_lamda() -> None:
    model = peft.get_peft_model(
        tiny("llama"), leantune.LamdaConfig(r=4, target_modules="all-linear")
    ).double()
    for name, parameter in model.named_parameters():  # away from its exact zero start
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    batch = batch_for("llama", padding="left")
    assert compare(model, "causal-lm", batch, 0.4) < TOLERANCE
    assert ordinary(model, batch) < TOLERANCE


def test_two_forwards_before_one_backward() -> None:
    model, batch = tiny("llama", attn_implementation="sdpa"), batch_for("llama")
    for checkpointing in (False, True):
        if checkpointing:
            checkpointed(model)
        with all_in_float64():
            token_tune(model, TokenTuneConfig(0.3)).train()
            first, second = model(**batch).loss, model(**batch).loss
            joint = gradients(model, first + second)
            token_tune(model, TokenTuneConfig(0.3))
            parts = [gradients(model, model(**batch).loss) for _ in range(2)]
        assert worst(joint, {n: parts[0][n] + parts[1][n] for n in joint}) < TOLERANCE


def test_packed_rows_by_a_mask_of_four_axes() -> None:
    model, batch = tiny("llama", attn_implementation="sdpa"), batch_for("llama")
    n = batch["input_ids"].size(1)
    block = torch.ones(n, n).tril().bool()
    block[7:, :7] = False  # two sequences in one row
    batch |= {
        "attention_mask": block.expand(3, 1, n, n),
        "position_ids": torch.cat([torch.arange(7), torch.arange(n - 7)]).expand(3, n),
    }
    assert compare(model, "causal-lm", batch, 0.4) < TOLERANCE


def test_inputs_embeds() -> None:
    model, batch = tiny("llama"), batch_for("llama")
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    with all_in_float64():
        token_tune(model, TokenTuneConfig(0.4)).train()
        mine = gradients(model, model(**batch).loss)
        mask = as_mask(chosen_tokens(model), 12)
        token_tune(model, None)
        with brute_force(model, mask):
            theirs = gradients(model, model(**reference_batch(model, batch, "causal-lm", mask)).loss)
    assert worst(mine, theirs) < TOLERANCE


def test_weights_get_their_gradient_under_autocast() -> None:
    """autocast caches cast weights; those of the pass without gradient must not reach the other."""
    model = tiny("llama", dtype=torch.float32, attn_implementation="sdpa")
    batch = batch_for("llama")
    token_tune(model, TokenTuneConfig(1.0)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters()}
    token_tune(model, None).zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert worst(mine, {n: p.grad for n, p in model.named_parameters()}) < 0.05


def test_dropout_is_drawn_for_each_pass() -> None:
    """Documented: masks are independent between the passes; training still runs and differs by step."""
    model = tiny("bert", "masked-lm", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    batch = batch_for("bert", "masked-lm")
    torch.manual_seed(0)
    token_tune(model, TokenTuneConfig(1.0)).train()
    losses = {float(model(**batch).loss.detach()) for _ in range(3)}
    assert len(losses) == 3
    assert all(torch.isfinite(torch.tensor(x)) for x in losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_attach(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype, attn_implementation="sdpa")
    token_tune(model, TokenTuneConfig(0.5)).train()
    assert torch.isfinite(model(**batch_for("llama")).loss)
    assert {p.dtype for p in model.parameters()} == {dtype}  # the released code casts the base to float32
