"""What a good baseline does besides LoRA: the loss of a language model without all its logits at once."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leantune.anatomy import find_head

CHUNK = 256  # tokens whose logits are held at a time
IGNORED = -100


def chunk_loss(model: nn.Module) -> str:
    """Let the head compute its loss chunk by chunk in training; evaluation stays as it is.

    Args:
        model: A causal language model, with or without adapter; changed in place.

    Returns:
        Whose implementation: Liger's fused one where it can be imported on CUDA, else the one below.
    """
    head: Any = find_head(model)
    ordinary, losses = head.forward, _losses(next(model.parameters()).device)

    def forward(input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None or not head.training:
            return ordinary(input_ids=input_ids, labels=labels, **inputs)
        hidden = head.base_model(input_ids=input_ids, **inputs).last_hidden_state  # (batch, n, h)
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (batch, n): the next token
        loss = losses(hidden.flatten(0, 1), head.get_output_embeddings().weight, target.flatten())
        return _Loss(loss)

    head.forward = forward
    return "Liger" if losses is _liger else "chunked"


class _Loss(dict[str, Tensor]):
    """An output with a loss alone."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__(loss=loss)
        self.loss = loss


def _losses(device: torch.device) -> Any:
    return _liger if device.type == "cuda" and importlib.util.find_spec("liger_kernel") else chunked


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)(weight, hidden, target)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, size: int = CHUNK) -> Tensor:
    """Mean cross-entropy of hidden @ weight.T, recomputed chunk by chunk in the backward pass.

    Args:
        hidden: (tokens, h).
        weight: (vocabulary, h), of the output head.
        target: (tokens,), -100 where there is none.
        size: Tokens a chunk.
    """
    pieces = zip(hidden.split(size), target.split(size), strict=True)
    total = sum(checkpoint(_summed, rows, weight, labels, use_reentrant=False) for rows, labels in pieces)
    return torch.as_tensor(total) / (target != IGNORED).sum()


def _summed(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((rows @ weight.T).float(), labels, ignore_index=IGNORED, reduction="sum")
