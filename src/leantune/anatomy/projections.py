"""What the projections of attention and feed-forward blocks are called: the table that `blocks` reads.

Names are relative to the module that holds the block ("../output.dense": beside it). Where one layer makes
several projections at once, its layout is a fact of the class's code and cannot be read off shapes, so such
classes are listed one by one. Everything else (sizes, head counts, which attributes must follow) is read off
the modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Apart:
    """Attention with one layer each for queries, keys and values."""

    query: str
    key: str
    value: str
    out: str


@dataclass(frozen=True)
class Fused:
    """Attention whose queries, keys and values come out of one layer.

    Attributes:
        qkv: The layer.
        out: The output projection.
        layout: `blocks`: all queries, then all keys, then all values; `heads`: head by head, each with its
            query, key and value.
    """

    qkv: str
    out: str
    layout: Literal["blocks", "heads"] = "blocks"


@dataclass(frozen=True)
class Forward:
    """A feed-forward block; `up` lists the layers whose outputs are one neuron each (a gate's, too)."""

    up: tuple[str, ...]
    down: str


APART = (
    Apart("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma, ViT, …
    Apart("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, GPT-J, GPT-Neo, CLIP, …
    Apart("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    Apart("q_proj", "k_proj", "v_proj", "Wo"),  # ModernBERT's decoder
    Apart("query", "key", "value", "../output.dense"),  # BERT, RoBERTa, ELECTRA, …
    Apart("query_proj", "key_proj", "value_proj", "../output.dense"),  # DeBERTa-v2/v3
    Apart("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT, XLM
    Apart("q", "k", "v", "o"),  # T5, MPNet
)
# Projections beside those of queries and keys, with the same features: DeBERTa-v2's of relative positions.
ALSO_HEADS = ("pos_key_proj", "pos_query_proj")

FUSED = {
    "GPT2Attention": Fused("c_attn", "c_proj"),
    "ModernBertAttention": Fused("Wqkv", "Wo"),
    "Phi3Attention": Fused("qkv_proj", "o_proj"),
    "GPTNeoXAttention": Fused("query_key_value", "dense", "heads"),
}
# A GPT-2 that attends to an encoder: queries apart, keys and values fused.
CROSS = {"GPT2Attention": ("q_attn", "c_attn", "c_proj")}

FORWARD = (
    Forward(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, …
    Forward(("up_proj",), "down_proj"),  # Nemotron
    Forward(("fc1",), "fc2"),  # OPT, BART, Phi, ViT, …
    Forward(("fc_in",), "fc_out"),  # GPT-J, CodeGen
    Forward(("c_fc",), "c_proj"),  # GPT-2
    Forward(("lin1",), "lin2"),  # DistilBERT, XLM
    Forward(("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa, MPNet
    Forward(("wi",), "wo"),  # T5
    Forward(("wi_0", "wi_1"), "wo"),  # T5 v1.1 and later
    Forward(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)
# One layer for gate and up: the first half of its features, then the second.
FUSED_FORWARD = {
    **dict.fromkeys(("ModernBertMLP", "ModernBertDecoderMLP"), Forward(("Wi",), "Wo")),
    **dict.fromkeys(("Phi3MLP", "GlmMLP", "Glm4MLP"), Forward(("gate_up_proj",), "down_proj")),
}
# Classes that the rules above would take for what they are not.
UNFIT = {
    **dict.fromkeys(
        ("BigBirdSelfAttention", "BigBirdBlockSparseAttention"),
        "it is rebuilt from the config when the length of the input changes",
    ),
}

# A learned bias per head and relative distance: an embedding (buckets, heads), handed on from layer to layer.
BIAS_TABLE = "relative_attention_bias"
BIAS_ARGUMENTS = ("position_bias", "alibi")

# Attributes of an attention module.
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
SHARING = ("num_key_value_groups",)  # query heads that read one KV head
WIDTH = ("all_head_size", "inner_dim", "split_size", "embed_dim", "hidden_size", "dim")
# Never one of these, whatever its value: (lengths, buckets and numbers of layers may equal a width by chance)
NEVER = (
    *HEAD_DIM,
    "num_key_value_groups",
    *("layer_idx", "layer_id", "sliding_window", "rotary_ndims", "rotary_dim"),
    *("max_relative_positions", "position_buckets", "pos_ebd_size"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
NEURONS = ("intermediate_size", "ffn_dim", "d_ff", "inner_dim", "hidden_dim")
