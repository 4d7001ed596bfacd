"""What autograd keeps: the issue's thresholds, which are the same number on every machine."""

from __future__ import annotations

import gc
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from leantune.measure import saved_activation_bytes
from leantune.tokentune import TokenTuneConfig, token_tune
from tests.tiny_models import batch_for, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")


def llama(kv_heads: int = 8, layers: int = 8, width: int = 512) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


def batch() -> dict[str, Any]:
    ids = torch.randint(0, 32000, (2, 512), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def ratios(model: nn.Module, *keeps: float) -> list[float]:
    ordinary = saved_activation_bytes(model, batch())
    chosen = [saved_activation_bytes(token_tune(model, TokenTuneConfig(keep)), batch()) for keep in keeps]
    return [size / ordinary for size in chosen]


def ratio(model: nn.Module, keep: float) -> float:
    return ratios(model, keep)[0]


def test_full_fine_tuning() -> None:
    at_20, at_10 = ratios(llama(), 0.2, 0.1)
    assert at_20 <= 0.30
    assert at_10 <= 0.20


def test_under_lora() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=8, target_modules="all-linear"))
    assert ratio(model, 0.2) <= 0.30


def test_grouped_query_attention_keeps_no_expanded_keys() -> None:
    assert ratio(llama(kv_heads=2), 0.2) <= 0.24


def test_with_gradient_checkpointing_on_both_sides() -> None:
    model = llama()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert ratio(model, 0.3) <= 0.35


def test_logits_shrink_with_the_choice() -> None:
    model = llama(layers=1, width=64)
    assert ratio(model, 0.1) <= 0.15


@pytest.mark.parametrize(
    ("family", "task", "strategy", "checkpointing"),
    [
        ("bert", "classification", "attention", False),
        ("llama", "causal-lm", "random", False),
        ("llama", "causal-lm", "loss", True),
        ("gemma3", "causal-lm", "random", False),
        ("t5", "seq2seq", "norm", False),
        ("bart", "seq2seq", "random", True),
        ("deberta-v3", "classification", "attention", False),
    ],
)
def test_a_step_lets_all_go_at_once(family: str, task: str, strategy: str, checkpointing: bool) -> None:
    """A ring of Python objects would hold the recorded keys and values until the collector comes by."""
    model = tiny(family, task).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    token_tune(model, TokenTuneConfig(keep=0.5, strategy=strategy))
    batch = batch_for(model, task)
    model(**batch).loss.backward()
    gc.collect()
    gc.disable()
    try:
        model(**batch).loss.backward()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [thing for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    finally:
        gc.enable()
        gc.set_debug(0)
        gc.garbage.clear()
    assert not left
