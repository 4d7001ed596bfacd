"""What autograd keeps: what the adapter reads and its bottleneck, in the dtype of the model; nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from leantune import saved_activation_bytes
from leantune.bottleneck import BottleneckConfig
from leantune.bottleneck.model import bottleneck_layers
from leantune.measure.saved import saved_storages

IDS = torch.arange(2 * 128).reshape(2, 128) % 100
BATCH = {"input_ids": IDS, "labels": IDS}
TARGETS = ["o_proj", "down_proj"]


@pytest.mark.parametrize(("activation", "numbers"), [("relu", 8), ("tanh", 8), ("gelu", 16), ("silu", 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_of_one_layer(mode: str, activation: str, numbers: int, dtype: torch.dtype) -> None:
    config = BottleneckConfig(
        r=8, mode=mode, activation=activation, target_modules=["0"], init_weights=False, bottleneck_alpha=2.0
    )
    model = get_peft_model(nn.Sequential(nn.Linear(96, 64)).to(dtype), config)
    (layer,) = bottleneck_layers(model).values()
    assert layer.bottleneck_down["default"].dtype == torch.float32
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(5, 96, dtype=dtype, requires_grad=True)
    kept = saved_storages(lambda: layer(x), exclude=own)
    assert sum(kept.values()) == 5 * ((64 if mode == "serial" else 96) + numbers) * dtype.itemsize
    model.set_requires_grad("default", requires_grad=False)
    kept = saved_storages(lambda: layer(x), exclude=own)
    assert sum(kept.values()) <= 5 * numbers * dtype.itemsize


def test_less_than_lora_on_the_same_layers(mode: str) -> None:
    """bfloat16 Llama; LoRA as PEFT makes it (with a float32 copy of every input)."""

    def llama() -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=100, max_position_embeddings=128,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(torch.bfloat16)

    lora = get_peft_model(llama(), LoraConfig(r=8, target_modules=TARGETS))
    ours = get_peft_model(llama(), BottleneckConfig(r=16, mode=mode, target_modules=TARGETS))
    assert saved_activation_bytes(ours, BATCH) < 0.87 * saved_activation_bytes(lora, BATCH)
