"""How long training steps take: the median of them, and tokens a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def device_synchronize(device: torch.device | str) -> None:
    """Wait until `device` has done all that was asked of it; a CPU always has.

    Without this a clock shows how long it took to ask, not how long the work took.
    """
    device = torch.device(device)
    if device.type == "cpu" or device.type == "meta":
        return
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "cuda":
        torch.cuda.synchronize(device)
    else:
        torch.accelerator.synchronize(device)


class StepClock:
    """Seconds and tokens of each training step; the first `warm_up` steps are kept but do not count.

    The first steps pay for things that later ones find done: kernels chosen, memory taken, caches filled. A
    run that is shorter than its warm-up counts all its steps, which is better than no figure.

        clock = StepClock(device)
        for batch in batches:
            with clock.step(tokens=int(batch["attention_mask"].sum())):
                train_on(batch)
        clock.median_seconds, clock.tokens_per_second

    Args:
        device: Where the steps run; the clock waits for it at both ends of a step.
        warm_up: Number of first steps that do not count.
        now: The clock to read, in seconds; tests pass their own.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        warm_up: int = 3,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        if warm_up < 0:
            raise ValueError(f"warm_up must be 0 or more, not {warm_up}")
        self.device = torch.device(device)
        self.warm_up = warm_up
        self.seconds: list[float] = []
        self.tokens: list[int | None] = []
        self._now = now
        self._started: float | None = None

    def start(self) -> None:
        """Begin a step. A step that was begun and never stopped (it failed) is forgotten."""
        device_synchronize(self.device)
        self._started = self._now()

    def stop(self, tokens: int | None = None) -> float:
        """End the step and return its seconds.

        Args:
            tokens: How many tokens it trained on, padding left out; None where nobody knows.

        Raises:
            RuntimeError: No step was begun.
        """
        if self._started is None:
            raise RuntimeError("StepClock.stop() without start()")
        device_synchronize(self.device)
        seconds = self._now() - self._started
        self._started = None
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        return seconds

    @contextmanager
    def step(self, tokens: int | None = None) -> Iterator[None]:
        """Time the block as one step; a block that raises is no step."""
        self.start()
        try:
            yield
        except BaseException:
            self._started = None
            raise
        self.stop(tokens)

    @property
    def median_seconds(self) -> float | None:
        """Median over the steps that count; None before the first step."""
        counted = self.seconds[self._first_counted :]
        return statistics.median(counted) if counted else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens over seconds of the steps that count; None where a step's tokens are not known."""
        first = self._first_counted
        seconds, tokens = sum(self.seconds[first:]), self.tokens[first:]
        known = [count for count in tokens if count is not None]
        if not known or len(known) < len(tokens) or not seconds:
            return None
        return sum(known) / seconds

    @property
    def _first_counted(self) -> int:
        return self.warm_up if len(self.seconds) > self.warm_up else 0
