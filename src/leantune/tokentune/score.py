"""Scores of tokens that pass 1 gives away for nothing (named as future work by the paper)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantune.anatomy import Kernel, Side
from leantune.errors import UserError
from leantune.tokentune.passes import Call
from leantune.tokentune.plan import Plan
from leantune.tokentune.record import Recording
from leantune.tokentune.rows import Rows

_CHUNK = 128  # queries at a time: no n × n matrix for the whole batch is ever held


class Scorer:
    """What a strategy asks of pass 1.

    Args:
        strategy: Of the config.
        plan: The model's shape.
        labels: Gives token labels (batch, n), aligned with the tokens that predict them.
        pooled: Gives the position (batch,) that feeds the head; None where no one position does.

    Attributes:
        needs_output: Whether the output head must run on all tokens.
    """

    def __init__(
        self,
        strategy: str,
        plan: Plan,
        labels: Callable[[], Tensor],
        pooled: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self.strategy, self.plan, self.labels, self.pooled = strategy, plan, labels, pooled
        self.needs_output = strategy == "loss"
        self._received: dict[Side, Tensor] = {}

    @property
    def watch(self) -> Callable[..., None] | None:
        """Called at every attention call of pass 1; None if not needed."""
        return self._attention_received if self.strategy == "attention" else None

    def scores(self, recording: Recording, output: Any) -> dict[Side, Tensor]:
        """Scores (batch, n) per side; a side without one is drawn at random."""
        if self.strategy == "norm":
            return {side: x.float().norm(dim=-1) for side, x in recording.entering.items()}
        if self.strategy == "attention":
            return self._received
        if self.strategy == "loss":
            return {"decoder": self._losses(output["logits"])}
        return {}

    def _losses(self, logits: Tensor) -> Tensor:
        """Cross-entropy of each token (batch, n); below zero where there is no label."""
        labels = self.labels()
        per_row = [
            F.cross_entropy(row.float(), target, reduction="none", ignore_index=-100)
            for row, target in zip(logits, labels, strict=True)
        ]
        return torch.stack(per_row).masked_fill(labels == -100, -1.0)

    def _attention_received(
        self, recording: Recording, kernel: Kernel, module: nn.Module, query: Tensor, call: Call, kwargs: Any
    ) -> None:
        """Attention that each key of a side's last layer receives: from the one position that feeds the head,
        or, where there is none, in the mean over the queries that may see it.
        """
        number = recording.invocations - 1
        if not self.plan.is_last(number) or recording.calls_made > 1:
            return
        assert call.key is not None
        scaling = kwargs.get("scaling") or query.size(-1) ** -0.5
        batch, heads, n, _ = query.shape
        key = call.key.repeat_interleave(heads // call.key.size(1), 1)  # (batch, heads, n, d)
        asking = self.pooled() if recording.side() == "decoder" else None
        if asking is not None:
            self._received[recording.side()] = _from_one(query, key, Rows(asking[:, None], n), call, scaling)
            return
        total, seen = query.new_zeros(batch, key.size(2)), query.new_zeros(1, key.size(2))
        for start in range(0, n, _CHUNK):
            rows = torch.arange(start, min(start + _CHUNK, n), device=query.device)
            scores = query[:, :, rows] @ key.transpose(-1, -2) * scaling  # (batch, heads, chunk, n)
            allowed = _allowed(call, rows, key.size(2))
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
            total = total + scores.softmax(-1).mean(1).sum(1)
            seen = seen + allowed.any(1).sum(1)
        self._received[recording.side()] = total / seen.clamp_min(1)


def _from_one(query: Tensor, key: Tensor, asking: Rows, call: Call, scaling: float) -> Tensor:
    """Attention (batch, n) from one query a row, in the mean over heads."""
    scores = asking.gather(query, 2) @ key.transpose(-1, -2) * scaling  # (batch, heads, 1, n)
    if call.mask is not None:
        part = call.mask if call.mask.size(-2) == 1 else asking.gather(call.mask, call.mask.dim() - 2)
        scores = scores.masked_fill(~_as_bool(part), torch.finfo(scores.dtype).min)
    elif call.causal:
        later = torch.arange(key.size(2), device=key.device) > asking.index[:, :, None]  # (batch, 1, n)
        scores = scores.masked_fill(later[:, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1).mean(1)[:, 0]


def _as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _allowed(call: Call, rows: Tensor, n: int) -> Tensor:
    """(batch or 1, heads or 1, chunk, n) bool: which keys these queries may see."""
    if call.mask is None:
        keys = torch.arange(n, device=rows.device)
        allowed = (
            keys <= rows[:, None] if call.causal else torch.ones(len(rows), n, device=rows.device).bool()
        )
        return allowed[None, None]
    part = call.mask if call.mask.size(-2) == 1 else call.mask[..., rows, :]
    return _as_bool(part)


def check_strategy(strategy: str, plan: Plan) -> None:
    """Refuse a strategy that means nothing for a model.

    Raises:
        UserError: `loss` or `supervised` on a head without token labels.
    """
    if strategy == "loss" and plan.task not in ("causal-lm", "masked-lm", "token-classification", "seq2seq"):
        raise UserError(
            f"strategy='loss' needs one label per token; {plan.task} has none: use 'norm' or 'attention'"
        )
