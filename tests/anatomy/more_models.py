"""Tiny models beside those of `tests/tiny_models.py`, whose blocks are laid out in ways of their own."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.tiny_models import CAUSAL, IMAGE, MLM, S2S, SEQ, tiny

_COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {"num_key_value_heads": 2, "use_cache": False}),
    "gpt-neox": ("GPTNeoX", {"use_cache": False}),
    "mpnet": ("MPNet", _DROPOUT),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "bitnet": ("BitNet", {"num_key_value_heads": 2}),
    "bloom": ("Bloom", {"n_head": 4, "n_layer": 3}),
    "trocr": (
        "TrOCR",
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    ),
    "bigbird": ("BigBird", _DROPOUT),
    "albert": ("Albert", {**_DROPOUT, "embedding_size": 16}),
}
SUFFIX = {
    CAUSAL: "ForCausalLM",
    SEQ: "ForSequenceClassification",
    MLM: "ForMaskedLM",
    S2S: "ForConditionalGeneration",
    IMAGE: "ForImageClassification",
    "base": "Model",
}


def build(family: str, task: str, attn_implementation: str = "eager", **overrides: Any) -> Any:
    """A tiny random float64 model in eval mode: one of `tiny_models`, of those here, or a gated T5."""
    if family == "t5-gated":
        overrides = {"feed_forward_proj": "gated-gelu", **overrides}
        return tiny("t5", task, attn_implementation=attn_implementation, **overrides)
    if family not in _MORE:
        return tiny(family, task, attn_implementation=attn_implementation, **overrides)
    stem, settings = _MORE[family]
    config = getattr(transformers, f"{stem}Config")(**{**_COMMON, **settings, **overrides})
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, stem + SUFFIX[task])(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1:
                parameter.data += 0.5
    return model.double().eval()
