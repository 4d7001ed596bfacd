"""What autograd keeps; METHODS 1 and the table "Must show" of the first LaMDA issue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from leantune import LamdaConfig, saved_activation_bytes
from leantune.lamda import freeze_columns

IDS = torch.arange(4 * 512).reshape(4, 512) % 1000
BATCH = {"input_ids": IDS, "labels": IDS}


def llama() -> LlamaForCausalLM:
    """4 layers of width 512 in bfloat16."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=1000, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def lamda(**settings: object) -> PeftModel:
    return get_peft_model(llama(), LamdaConfig(r=32, target_modules="all-linear", **settings))


@pytest.fixture(scope="module")
def floor() -> Iterator[int]:
    """Frozen base, gradient to the input only."""
    model = llama().requires_grad_(False)
    embeddings = model.get_input_embeddings()(IDS).requires_grad_()
    yield saved_activation_bytes(model, {"inputs_embeds": embeddings, "labels": IDS})


@pytest.fixture(scope="module")
def lora() -> tuple[int, int]:
    """PEFT's default LoRA, and the same without its cast to float32."""
    config = LoraConfig(r=8, target_modules="all-linear")
    default = saved_activation_bytes(get_peft_model(llama(), config), BATCH)
    return default, saved_activation_bytes(
        get_peft_model(llama(), config, autocast_adapter_dtype=False), BATCH
    )


@pytest.mark.parametrize("settings", [{}, {"init_b": "vectors", "init_scale": "spectrum"}])
def test_saved_bytes(settings: dict[str, str], floor: int, lora: tuple[int, int]) -> None:
    default, uncast = lora
    model = lamda(**settings)
    ours = saved_activation_bytes(model, BATCH)
    print(f"floor {floor}, LoRA {default}, without the cast {uncast}, LaMDA {ours}")
    assert ours <= 0.55 * default
    assert ours <= 0.86 * uncast
    assert ours <= 1.08 * floor
    assert freeze_columns(model, None, 30, 100) == 28 * 32
    assert saved_activation_bytes(model, BATCH) <= 1.03 * floor


def test_saved_bytes_with_gradient_to_the_input(floor: int) -> None:
    """The same input as the floor's, so that nothing is spared at the first layer."""
    model = lamda()
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    ours = saved_activation_bytes(model, {"inputs_embeds": embeddings, "labels": IDS})
    assert floor < ours <= 1.03 * floor


def test_dropout_keeps_r_numbers_a_token(floor: int) -> None:
    assert saved_activation_bytes(lamda(lamda_dropout=0.1), BATCH) <= 1.08 * floor
