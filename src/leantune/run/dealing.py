"""Which rows a training step sees, and which of them each process gets.

The order of an epoch's rows depends on the seed, the epoch and the rows of a whole step alone. N processes
with batches of b rows therefore take, step by step, the rows that one process with batches of N · b takes:
process r has rows r · b … (r + 1) · b - 1 of each batch. accelerate deals them so, and fills the last batch
of an epoch up with rows from its beginning; those are taken out again (`Dealt`), and each process's loss
enters by the rows that it really has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochSampler(Sampler[int]):
    """Another sampler, with an order that depends on the seed and the epoch alone.

    transformers' LengthGroupedSampler draws from the global generator, so a run that is resumed in the middle
    of an epoch would see other batches than the one that was not. And it groups by one process's batches.

    Args:
        sampler: The Trainer's.
        seed: Of the order.
        processes: That share its rows.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, processes: int = 1) -> None:
        sampler.batch_size *= processes
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer (through accelerate's data loader) before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(self.sampler)


@dataclass(frozen=True)
class Dealt:
    """An epoch's last batch, which has not enough rows for all processes.

    Attributes:
        left: Rows of all processes together.
        size: Rows that each was dealt, filled up.
        rank: Of this process.
        processes: That share them.
    """

    left: int
    size: int
    rank: int
    processes: int

    @property
    def own(self) -> int:
        """How many of this process's rows are its own, the first ones."""
        return min(max(self.left - self.rank * self.size, 0), self.size)

    @property
    def share(self) -> float:
        """Factor for a mean over its own rows, so that the mean over processes is that over all rows."""
        return self.own * self.processes / self.left
