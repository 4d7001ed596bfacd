"""Tiny random models under the names that PEFT's tests ask the hub for.

`from_pretrained("owner/name")` prefers a folder of that name under the working directory to the hub, so a
suite that runs where these folders lie needs no network and no patch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as t

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
_GATED = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024, "n_positions": 128}
_ENCODER = {**_SMALL, "intermediate_size": 64, "max_position_embeddings": 128}
_ENDS = {"bos_token_id": 1020, "eos_token_id": 1021, "pad_token_id": 1022}  # none is in the tests' inputs

MODELS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: t.OPTForCausalLM(
        t.OPTConfig(**_SMALL, word_embed_proj_dim=32, ffn_dim=64, max_position_embeddings=128, **_ENDS)
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(**_GPT, **_ENDS)
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: t.GPTJForCausalLM(
        t.GPTJConfig(**_GPT, rotary_dim=4, **_ENDS, tie_word_embeddings=False)
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: t.LlamaForCausalLM(
        # keys and values as wide as queries: the suite combines LoRAs of rank 20
        t.LlamaConfig(**{**_GATED, "num_key_value_heads": 4}, **_ENDS)
    ),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_GATED, **_ENDS)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**_GATED, head_dim=8, **_ENDS)
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": lambda: (
        t.T5ForConditionalGeneration(
            t.T5Config(
                d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=1024,
                decoder_start_token_id=0,
            )
        )
    ),  # fmt: skip
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=1024,
            max_position_embeddings=128, decoder_start_token_id=1021, forced_eos_token_id=1021, **_ENDS,
        )
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: (
        t.BertForSequenceClassification(t.BertConfig(**_ENCODER))
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: (
        t.RobertaForSequenceClassification(t.RobertaConfig(**_ENCODER))
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: t.LlamaForSequenceClassification(
        t.LlamaConfig(**_GATED, **{**_ENDS, "pad_token_id": None}, num_labels=1)
    ),
}  # fmt: skip


def write_standins(folder: Path) -> None:
    """One folder a model under `folder`, each from the same seed; those that are there already stay."""
    for name, make in MODELS.items():
        if (folder / name / "model.safetensors").is_file():
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make().save_pretrained(folder / name)
