"""Out of memory: the batch goes through the model in parts, with the same loss and the same gradient."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

Batch = dict[str, Any]

# Of the CPU's allocator; of oneDNN, when there is no room for its scratchpad.
_NO_MEMORY = ("not enough memory", "could not create a primitive")


class RowsAtOnce(TrainerCallback, ExportableState):
    """How many rows go through the model at once; in the checkpoint, so that a resumed run splits alike.

    Attributes:
        training: None while nothing has been too large.
        evaluation: The same, in evaluations.
    """

    def __init__(self) -> None:
        self.training: int | None = None
        self.evaluation: int | None = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds."""
        return {"args": {}, "attributes": {"training": self.training, "evaluation": self.evaluation}}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, the CPU's allocator or Python ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def rows_in(batch: Batch) -> int:
    """Number of rows of a batch of tensors."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())


def parts_of(batch: Batch, most: int) -> Iterator[tuple[int, Batch]]:
    """(first row, part) of the batch, in parts of nearly equal size with at most `most` rows; not copied."""
    rows = rows_in(batch)
    count = math.ceil(rows / most)
    edges = [rows * number // count for number in range(count + 1)]
    for start, stop in zip(edges, edges[1:], strict=False):
        yield start, rows_between(batch, start, stop)


def rows_between(batch: Batch, start: int, stop: int) -> Batch:
    """Some of a batch's rows; not copied."""
    rows = rows_in(batch)
    return {
        key: value[start:stop] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for key, value in batch.items()
    }


def release() -> None:
    """Give back what a failed pass still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
