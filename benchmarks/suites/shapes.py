"""Model shapes without weights, at three scales.

`full` is what the papers trained. `small` keeps the family and the order of depth to width (and of blocks to
vocabulary) and is sized for one CPU thread, with batches of 2,000 tokens and more, so that arithmetic and not
Python takes the time. `tiny` is for tests.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

SCALES = ("full", "small", "tiny")
# Off everywhere: baselines and methods are compared without it (dropout keeps masks, or random states).
NO_DROPOUT = (
    "dropout", "attention_dropout", "activation_dropout", "classifier_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)  # fmt: skip


def _bart(h: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * h}
    return {"model_type": "bart", "d_model": h, "vocab_size": vocabulary, **sides}


def _encoder(kind: str, h: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": vocabulary, "hidden_size": h, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 4 * h, "max_position_embeddings": 514,
        "pad_token_id": 1,
    }  # fmt: skip


def _opt(h: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "vocab_size": vocabulary, "hidden_size": h, "word_embed_proj_dim": h,
        "ffn_dim": 4 * h, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }  # fmt: skip


def _llama(h: int, layers: int, heads: int, kv: int, f: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": h, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": f,
        "max_position_embeddings": 8192, "use_cache": False,
    }  # fmt: skip


# Name → task, and the config at each scale.
SHAPES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "BART-large": ("seq2seq", {
        "full": _bart(1024, 12, 16, 50265), "small": _bart(512, 3, 16, 25136), "tiny": _bart(128, 2, 4, 97),
    }),
    "RoBERTa-large": ("classification", {
        "full": _encoder("roberta", 1024, 24, 16, 50265),
        "small": _encoder("roberta", 512, 6, 16, 25136),
        "tiny": _encoder("roberta", 128, 2, 4, 97),
    }),
    "BERT-large": ("classification", {
        "full": _encoder("bert", 1024, 24, 16, 30522),
        "small": _encoder("bert", 384, 8, 12, 11448),
        "tiny": _encoder("bert", 128, 2, 4, 97),
    }),
    "OPT-1.3B": ("causal-lm", {
        "full": _opt(2048, 24, 32, 50272), "small": _opt(512, 6, 16, 12568), "tiny": _opt(128, 2, 4, 97),
    }),
    "OPT-6.7B": ("causal-lm", {
        "full": _opt(4096, 32, 32, 50272), "small": _opt(512, 4, 16, 6288), "tiny": _opt(128, 3, 4, 97),
    }),
    "Llama-2-7B": ("causal-lm", {
        "full": _llama(4096, 32, 32, 32, 11008, 32000),
        "small": _llama(384, 6, 12, 12, 1024, 3000),
        "tiny": _llama(128, 2, 4, 4, 344, 97),
    }),
    "Llama-3.1-8B": ("causal-lm", {
        "full": _llama(4096, 32, 32, 8, 14336, 128256),
        "small": _llama(384, 6, 12, 3, 1344, 12024),
        "tiny": _llama(128, 2, 4, 2, 448, 97),
    }),
}  # fmt: skip


def task_of(shape: str) -> str:
    """What a shape is trained for."""
    return SHAPES[shape][0]


def config_of(shape: str, scale: str) -> PretrainedConfig:
    """The config of a shape at a scale, without dropout, attention through SDPA."""
    settings = dict(SHAPES[shape][1][scale])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    for name in NO_DROPOUT:
        if getattr(config, name, None) is not None:
            setattr(config, name, 0.0)
    config._attn_implementation = "sdpa"
    return config
