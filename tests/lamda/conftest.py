"""Tiny random models that the LaMDA tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],  # Conv1D
    "bert": ["query", "value", "output.dense"],
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of a few thousand weights, float32, without dropout, the same for the same seed."""
    torch.manual_seed(seed)
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=40, max_position_embeddings=64,
            )
        )  # fmt: skip
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=64,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
            max_position_embeddings=64, num_labels=3, initializer_range=0.2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def batch_for(family: str, seed: int = 1, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (size, 7), generator=generator)
    labels = torch.randint(0, 3, (size,), generator=generator) if family == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def pytest_configure(config: pytest.Config) -> None:
    # PEFT 0.21 asks transformers 5.23 for the old name of a property; nothing that we can mend.
    config.addinivalue_line(
        "filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    )


@pytest.fixture(params=sorted(TARGETS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Logits of a model in eval mode on the family's batch; the model's mode is restored."""

    def compute(model: Any, family: str, **kwargs: Any) -> torch.Tensor:
        was_training = model.training
        model.eval()
        batch = {key: value for key, value in batch_for(family).items() if key != "labels"}
        with torch.no_grad():
            result = model(**batch, **kwargs).logits
        model.train(was_training)
        return result

    return compute


def perturb(model: torch.nn.Module, adapter_name: str = "default", seed: int = 3, scale: float = 0.1) -> None:
    """As if trained: random numbers into S and B of one adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith((f"lamda_S.{adapter_name}", f"lamda_B.{adapter_name}")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
