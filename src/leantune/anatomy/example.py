"""A tiny batch that a model can be tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from leantune.anatomy.heads import Task
from leantune.errors import UserError

_LENGTH = 13  # a number that no head dimension, head count or group count is likely to equal


def example(head: PreTrainedModel, task: Task, padded: bool = True) -> dict[str, Tensor]:
    """Two short sequences (or two images) with labels, on the model's device.

    If `padded`, the second row of a text batch is padded at its end, so padding is part of what is tried.

    Raises:
        UserError: The model reads neither text nor images.
    """
    draw = torch.Generator().manual_seed(0)
    device = next(head.parameters()).device
    if head.main_input_name == "pixel_values":
        batch = {"pixel_values": _images(head.config, draw).to(head.dtype)}
    elif head.main_input_name == "input_ids":
        batch = _text(head.config, draw, padded)
    else:
        raise UserError(f"{type(head).__name__} reads {head.main_input_name}, neither text nor images")
    batch |= _labels(head.config, task, batch, draw)
    return {name: value.to(device) for name, value in batch.items()}


def _images(config: Any, draw: torch.Generator) -> Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise UserError(f"{type(config).__name__} names no image_size")
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=draw)


def _text(config: Any, draw: torch.Generator, padded: bool) -> dict[str, Tensor]:
    text = config.get_text_config()
    special = {
        v
        for k, v in {**config.to_dict(), **text.to_dict()}.items()
        if k.endswith("_token_id") and type(v) is int
    }
    words = torch.tensor([i for i in range(min(text.vocab_size, 512)) if i not in special])
    ids = words[torch.randint(len(words), (2, _LENGTH), generator=draw)]  # (2, n)
    mask = torch.ones_like(ids)
    pad, eos = getattr(text, "pad_token_id", None), getattr(text, "eos_token_id", None)
    if isinstance(eos, int) and eos < text.vocab_size:
        ids[0, -2] = ids[1, -5] = eos  # not the last real token: heads that pool one are told from the other
    if padded and pad is not None and pad >= 0:
        ids[1, -3:], mask[1, -3:] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def _labels(config: Any, task: Task, batch: dict[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    count = getattr(config, "num_labels", 2) or 2
    if task == "classification":
        return {"labels": torch.randint(count, (2,), generator=draw)}
    if task == "question-answering":
        return {"start_positions": torch.tensor([2, 1]), "end_positions": torch.tensor([5, 8])}
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if task == "seq2seq":
        labels, mask = ids.flip(1)[:, :-4].contiguous(), mask[:, :-4]
    else:
        labels = (
            torch.randint(count, ids.shape, generator=draw) if task == "token-classification" else ids.clone()
        )
    hidden = torch.rand(labels.shape, generator=draw) < 0.2
    return {"labels": labels.masked_fill(hidden | ~mask, -100)}
