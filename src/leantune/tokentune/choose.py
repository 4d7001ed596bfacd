"""Which tokens of each row are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leantune.tokentune.config import TokenTuneConfig

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass
class Candidates:
    """What is known about the tokens of a batch when a choice is made.

    Attributes:
        real: (batch, n) bool, False on padding.
        supervised: (batch, n) bool, tokens whose output enters the loss; None where the head pools.
        pooled: (batch,) int64, the position that feeds the head, or -1; None for tokenwise heads.
        special: (batch, n) bool, tokens that are chosen ahead of others ([CLS]); None if there are none.
        score: (batch, n) float, the higher the sooner; None to draw at random.
    """

    real: Tensor
    supervised: Tensor | None = None
    pooled: Tensor | None = None
    special: Tensor | None = None
    score: Tensor | None = None


def generator_for(seed: int, step: int, rank: int, side: int = 0) -> torch.Generator:
    """A CPU generator that depends on all four numbers and on nothing else."""
    mixed = seed
    for number in (step, rank, side):
        mixed = ((mixed ^ (number + 1)) * _GOLDEN) % 2**64
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed % 2**63)


def choose(
    config: TokenTuneConfig,
    candidates: Candidates,
    generator: torch.Generator,
    part: tuple[int, int] | None = None,
) -> Tensor:
    """Choose tokens, row by row.

    Args:
        config: How many, and how.
        candidates: Of the batch.
        generator: For the draws.
        part: (first row, rows in all) if these rows are a part of a batch: the choice is that for the whole.

    In this order: the pooled token; one supervised token (so that no row is without loss); the special token;
    with `supervised`, the other supervised ones; with `span`, those of its window; the rest by score, or
    uniformly. Padding never, except a pooled position that the model itself reads.

    Returns:
        (batch, k) int64, ascending, padded at the end with -1 where a row has fewer; k is the longest row's.
    """
    real = candidates.real
    if candidates.pooled is not None:
        real = real.scatter(1, candidates.pooled[:, None], True)
    start, total = part or (0, len(real))
    draw = torch.rand((total, real.size(1)), generator=generator, dtype=torch.float64)
    draw = draw[start : start + len(real)].to(real.device)
    priority = draw if candidates.score is None else _ranked(candidates.score, draw)  # in [0, 1)
    count = config.count(real.sum(1))
    if config.strategy == "span":
        place = torch.rand(total, generator=generator, dtype=torch.float64)[start : start + len(real)]
        bearing = real if candidates.supervised is None else candidates.supervised & real
        priority = (priority + _window(real, bearing, count, place.to(real.device))) / 2
    supervised = candidates.supervised
    if supervised is not None:
        supervised = supervised & real
        if config.strategy == "supervised":
            priority = priority + supervised.double()
        first = priority.masked_fill(~supervised, -1.0).argmax(1, keepdim=True)  # one per row, if it has any
        priority = priority.scatter_add(1, first, 4.0 * supervised.gather(1, first).double())
    if candidates.special is not None:
        priority = priority + 2.0 * (candidates.special & real)
    if candidates.pooled is not None:
        pooled = candidates.pooled[:, None]
        priority = priority.scatter_add(1, pooled, priority.new_full(pooled.shape, 8.0))
    return _top(priority.masked_fill(~real, -1.0), count)


def _window(real: Tensor, bearing: Tensor, count: Tensor, place: Tensor) -> Tensor:
    """One window of consecutive real tokens a row, of which one at least lies between the first and the last
    that bear a label.

    Args:
        real: (batch, n) bool.
        bearing: (batch, n) bool, a part of `real`; a row without any has its window anywhere.
        count: (batch,) int64, the window's width.
        place: (batch,) float in [0, 1): which of the possible beginnings.

    Returns:
        (batch, n) bool.
    """
    number = real.long().cumsum(1) - 1  # (batch, n): the how-manieth real token, from 0
    length = real.sum(1)
    bearing = torch.where(bearing.any(1, keepdim=True), bearing, real)
    first = number.masked_fill(~bearing, real.size(1)).amin(1)
    last = number.masked_fill(~bearing, -1).amax(1)
    lowest = (first - count + 1).clamp_min(0)
    highest = torch.minimum(last, length - count).clamp_min(lowest)
    begin = lowest + (place * (highest - lowest + 1)).long()
    return real & (number >= begin[:, None]) & (number < (begin + count)[:, None])


def _ranked(score: Tensor, draw: Tensor) -> Tensor:
    """Ranks of the scores in [0, 1), ties by chance; so that tiers can be added to them."""
    by_chance = draw.argsort(1)
    order = score.double().gather(1, by_chance).argsort(dim=1, stable=True)
    ranks = torch.empty_like(draw)
    step = torch.arange(draw.size(1), device=draw.device, dtype=draw.dtype).expand_as(draw)
    return ranks.scatter(1, by_chance.gather(1, order), step / draw.size(1))


def _top(priority: Tensor, count: Tensor) -> Tensor:
    k = max(1, int(count.max()))
    n = priority.size(1)
    position = priority.topk(min(k, n), dim=1).indices  # best first: (batch, k)
    empty = torch.arange(position.size(1), device=position.device) >= count[:, None]
    position = position.masked_fill(empty, n).sort(1).values
    return position.masked_fill(position == n, -1)
