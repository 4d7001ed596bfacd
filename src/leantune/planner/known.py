"""Shapes of well-known models, for plans without any file: `shape:llama-2-7b`."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from leantune.errors import UserError
from leantune.recipes import ModelRecipe
from leantune.run.models import load_config

PREFIX = "shape:"


def _decoder(
    kind: str, vocabulary: int, h: int, layers: int, heads: int, kv: int, f: int, n: int, **more: Any
) -> Any:
    return {
        "model_type": kind, "vocab_size": vocabulary, "hidden_size": h, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": f,
        "max_position_embeddings": n, "dtype": "bfloat16", **more,
    }  # fmt: skip


def _encoder(kind: str, vocabulary: int, h: int, layers: int, n: int = 512, **more: Any) -> Any:
    return {
        "model_type": kind, "vocab_size": vocabulary, "hidden_size": h, "num_hidden_layers": layers,
        "num_attention_heads": h // 64, "intermediate_size": 4 * h, "max_position_embeddings": n,
        "dtype": "float32", **more,
    }  # fmt: skip


def _opt(h: int, layers: int, heads: int) -> Any:
    return {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": h, "word_embed_proj_dim": h,
        "ffn_dim": 4 * h, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": 2048, "dtype": "float16",
    }  # fmt: skip


def _gpt2(h: int, layers: int, heads: int) -> Any:
    return {"model_type": "gpt2", "n_embd": h, "n_layer": layers, "n_head": heads, "dtype": "float32"}


_ROBERTA: dict[str, Any] = {"type_vocab_size": 1, "pad_token_id": 1}
_DEBERTA: dict[str, Any] = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 256,
    "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
# As their makers' config.json has them; what does not concern memory is left out.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _decoder("llama", 32000, 4096, 32, 32, 32, 11008, 4096),
    "llama-2-13b": _decoder("llama", 32000, 5120, 40, 40, 40, 13824, 4096),
    "llama-2-70b": _decoder("llama", 32000, 8192, 80, 64, 8, 28672, 4096),
    "llama-3.1-8b": _decoder("llama", 128256, 4096, 32, 32, 8, 14336, 131072),
    "llama-3.1-70b": _decoder("llama", 128256, 8192, 80, 64, 8, 28672, 131072),
    "llama-3.2-1b": _decoder("llama", 128256, 2048, 16, 32, 8, 8192, 131072, **_TIED),
    "llama-3.2-3b": _decoder("llama", 128256, 3072, 28, 24, 8, 8192, 131072, **_TIED, head_dim=128),
    "mistral-7b": _decoder("mistral", 32000, 4096, 32, 32, 8, 14336, 32768, sliding_window=None),
    "qwen2.5-0.5b": _decoder("qwen2", 151936, 896, 24, 14, 2, 4864, 32768, **_TIED),
    "qwen2.5-1.5b": _decoder("qwen2", 151936, 1536, 28, 12, 2, 8960, 32768, **_TIED),
    "qwen2.5-7b": _decoder("qwen2", 152064, 3584, 28, 28, 4, 18944, 131072),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "bert-base": _encoder("bert", 30522, 768, 12),
    "bert-large": _encoder("bert", 30522, 1024, 24),
    "roberta-base": _encoder("roberta", 50265, 768, 12, 514, **_ROBERTA),
    "roberta-large": _encoder("roberta", 50265, 1024, 24, 514, **_ROBERTA),
    "deberta-v3-base": _encoder("deberta-v2", 128100, 768, 12, **_DEBERTA),
    "deberta-v3-large": _encoder("deberta-v2", 128100, 1024, 24, **_DEBERTA),
}


def is_shape(path: str) -> bool:
    """Whether a model's path names a shape alone."""
    return path.startswith(PREFIX)


def config_of(recipe: ModelRecipe) -> PretrainedConfig:
    """The config of a recipe's model, from the table or from its files.

    Raises:
        UserError: The shape is not in the table, or there is no config to be had.
    """
    if not is_shape(recipe.path):
        return load_config(recipe)
    name = recipe.path.removeprefix(PREFIX)
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        guess = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        raise UserError(f"model.path = {recipe.path!r}: the shapes known are {', '.join(SHAPES)}{guess}")
    settings = dict(SHAPES[name])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)
