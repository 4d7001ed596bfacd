"""DeBERTa-v2/v3's disentangled attention, written as a kernel with any number of queries.

He et al., "DeBERTa: Decoding-enhanced BERT with disentangled attention" (ICLR 2021), equation 4: the score of
query i on key j is

    q_i · k_j  +  q_i · pos_k[δ(i, j)]  +  k_j · pos_q[δ(j, i)]        (content, content→position, p→c)

transformers' code takes the distances δ as one n × n table and assumes as many queries as keys. Here the
table has one row per query (its own for every sequence of the batch, if need be), so that chosen queries can
look at all keys. `disentangled_forward` takes the place of the module's forward while a handler is active.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DisentangledSelfAttention,
    build_relative_position,
    scaled_size_sqrt,
)

from leantune.anatomy.attention import current_handler


def is_disentangled(module: nn.Module) -> bool:
    """Whether the module is DeBERTa-v2/v3's self-attention."""
    return isinstance(module, DisentangledSelfAttention)


def disentangled_forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`DisentangledSelfAttention.forward` through the active handler; (batch, n, d) in and out."""
    handler = current_handler()
    assert handler is not None
    query = _heads(module, module.query_proj(hidden_states if query_states is None else query_states))
    key = _heads(module, module.key_proj(hidden_states))  # (batch, heads, n, d)
    value = _heads(module, module.value_proj(hidden_states))
    if module.relative_attention and relative_pos is None:
        relative_pos = build_relative_position(
            query, key, module.position_buckets, module.max_relative_positions
        )
    output, weights = handler(
        disentangled_kernel,
        module,
        query,
        key,
        value,
        attention_mask.bool(),
        query_rows=relative_pos,  # (1, n, n): rows belong to queries, as the mask's do
        rel_embeddings=rel_embeddings,
    )
    return output.flatten(2), weights if output_attentions else None


def disentangled_kernel(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_rows: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Disentangled attention of k queries on n keys.

    Args:
        module: The attention module (its projections, dropout and settings are used).
        query: (batch, heads, k, d).
        key: (batch, heads, n, d).
        value: (batch, heads, n, d).
        mask: Bool, (batch or 1, 1, k, n); True where attention is allowed.
        query_rows: Bucketed distances δ(i, j), (batch or 1, k, n), int64.
        rel_embeddings: (2 · span, hidden), shared by all layers.
        **kwargs: Not used.

    Returns:
        Context (batch, k, heads, d) and attention probabilities (batch, heads, k, n).
    """
    terms = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    scale = scaled_size_sqrt(query, terms).to(query.dtype)  # rounded to float32, as the model's own
    scores = query @ (key.transpose(-1, -2) / scale)  # (batch, heads, k, n)
    if module.relative_attention and query_rows is not None:
        table = module.pos_dropout(rel_embeddings)
        scores = scores + _position_scores(module, query, key, query_rows.long(), table) / scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(query.dtype).min)
    weights = module.dropout(scores.softmax(-1))
    return (weights @ value).transpose(1, 2), weights


def _position_scores(module: Any, query: Tensor, key: Tensor, distance: Tensor, table: Tensor) -> Tensor:
    span = module.pos_ebd_size
    table = table[: 2 * span].unsqueeze(0)  # (1, 2·span, hidden)
    shape = (*query.shape[:3], key.size(2))  # (batch, heads, k, n)
    total = query.new_zeros(())
    if "c2p" in module.pos_att_type:
        project = module.key_proj if module.share_att_key else module.pos_key_proj
        by_bucket = query @ _heads(module, project(table)).transpose(-1, -2)  # (batch, heads, k, 2·span)
        bucket = (distance + span).clamp(0, 2 * span - 1).unsqueeze(1)  # (batch or 1, 1, k, n)
        total = total + by_bucket.gather(-1, bucket.expand(shape))
    if "p2c" in module.pos_att_type:
        project = module.query_proj if module.share_att_key else module.pos_query_proj
        by_bucket = key @ _heads(module, project(table)).transpose(-1, -2)  # (batch, heads, n, 2·span)
        # δ(j, i) = -(-δ(i, j)): transformers looks up the bucket of -δ(j, i), which is δ(i, j) again
        bucket = (distance + span).clamp(0, 2 * span - 1).unsqueeze(1).transpose(-1, -2)
        total = total + by_bucket.gather(-1, bucket.expand(*shape[:2], shape[3], shape[2])).transpose(-1, -2)
    return total


def _heads(module: Any, x: Tensor) -> Tensor:
    """(batch, n, heads · d) → (batch, heads, n, d)."""
    return x.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
