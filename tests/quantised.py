"""Tiny quantised models, and their weights unpacked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from leantune.recipes import ModelRecipe
from leantune.run.models import load_base
from leantune.run.quantization import KINDS


def need(kind: str) -> None:
    """Skip where the library of a kind is not installed."""
    pytest.importorskip(KINDS[kind].package)


def save_llama(folder: Path) -> None:
    """A tiny Llama with weights large enough that rounding them shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def open_llama(folder: Path, kind: str | None, dtype: str = "float32") -> Any:
    """It, quantised; the same at every call."""
    recipe = ModelRecipe(path=str(folder), task="causal-lm", dtype=dtype)  # type: ignore[arg-type]
    config = LlamaConfig.from_pretrained(folder)
    return load_base(recipe, AutoModelForCausalLM, config, quantize=kind)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# The 16 values of 4-bit NormalFloat (QLoRA, appendix E), and of bitsandbytes' FP4 (a sign bit, then eight).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
TABLES = {"nf4": NF4, "fp4": (*_FP4, *(-value for value in _FP4))}


def unpacked(layer: nn.Module) -> Tensor:
    """The weight of a quantised layer in float64, from the stored numbers alone: (d_out, d_in)."""
    weight: Any = layer.weight
    kind = type(weight).__name__
    if kind == "Int8Params":
        scale = weight.SCB if layer.state.SCB is None else layer.state.SCB  # type: ignore[union-attr]
        return weight.data.double() * scale.double()[:, None] / 127
    if kind == "Int8Tensor":
        return weight.qdata.double() * weight.scale.double().reshape(-1, 1)
    state = weight.quant_state
    codes = weight.data.flatten()
    table = torch.tensor(TABLES[state.quant_type], dtype=torch.float64)
    values = table[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    inner = state.state2  # the blocks' scales are quantised themselves, in blocks of 256, around their mean
    scales = inner.code.double()[state.absmax.long()]
    scales = scales * inner.absmax.double().repeat_interleave(inner.blocksize)[: len(scales)] + state.offset
    scales = scales.repeat_interleave(state.blocksize)[: len(values)]
    return (values * scales)[: state.shape.numel()].reshape(state.shape)
