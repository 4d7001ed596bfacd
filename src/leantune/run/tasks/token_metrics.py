"""Metrics of models that write: sums over each row's tokens first, means over a whole split last."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


def row_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Small enough to keep for every row of a split.

    Args:
        logits: (batch, n, vocabulary), of the token that `labels` has at the same place.
        labels: (batch, n), -100 where nothing is counted.

    Returns:
        (batch, 3) float64: summed loss in nats, tokens counted, tokens right.
    """
    logits = logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )  # (batch, n)
    counted = labels != IGNORED
    right = (logits.argmax(dim=-1) == labels) & counted
    return torch.stack([loss.sum(1).double(), counted.sum(1).double(), right.sum(1).double()], dim=1)


def mean_metrics(sums: Any) -> dict[str, float]:
    """Rows of `row_sums` → loss over all counted tokens (not over batches), perplexity, token accuracy."""
    loss, counted, right = np.asarray(sums, dtype=np.float64).sum(axis=0)
    mean = loss / counted
    return {
        "loss": float(mean),
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "token_accuracy": float(right / counted),
    }
