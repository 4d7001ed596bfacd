"""Small models to forecast, as a recipe and a batch."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig, DebertaV2Config, GPT2Config, LlamaConfig, PretrainedConfig

from leantune.planner import Setting
from leantune.recipes import Recipe

_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
_DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "share_att_key": True,
}
LORA, LAMDA = {"type": "lora", "r": 4}, {"type": "lamda", "r": 8}


def config(model: str) -> PretrainedConfig:
    """A config of the family."""
    if model == "bert":
        return BertConfig(**_SIZES)
    if model == "deberta":
        return DebertaV2Config(**_SIZES, **_DEBERTA)
    if model == "gpt2":
        return GPT2Config(**_GPT2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaConfig(**_SIZES, num_key_value_heads=2)


def recipe(model: str, lean: dict[str, Any], path: str = "unused", **train: Any) -> Recipe:
    """A recipe; only its model, lean and train count."""
    task = "classification" if model in ("bert", "deberta") else "causal-lm"
    data = {"model": {"path": path, "task": task}, "data": {"path": "unused"}, "output": "unused"}
    return Recipe.model_validate(data | {"lean": lean, "train": {"eval_batch_size": 6, **train}})


def setting(
    model: str,
    lean: dict[str, Any],
    stage: Any = "train",
    padded: bool = False,
    **train: Any,
) -> Setting:
    """Four rows of 48 tokens."""
    return Setting(recipe(model, lean, **train), config(model), 4, 48, padded, stage)
