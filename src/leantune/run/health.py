"""What is told when a loss or a gradient is not finite: which rows, and where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

MOST_ROWS = 16  # named in a message


def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the first module, in the order in which they finish, whose output has a NaN or an infinity.

    Args:
        model: Its modules are watched.
        forward: Runs the model.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not found and any(not bool(torch.isfinite(tensor).all()) for tensor in _floats(output)):
            found.append(name or type(module).__name__)

    handles = [
        module.register_forward_hook(partial(look, name), always_call=False)
        for name, module in model.named_modules()
    ]
    try:
        with undisturbed_modes(model), torch.no_grad(), torch.random.fork_rng(devices=_devices()):
            for training in (False, True):  # without dropout and token selection first: they hide things
                model.train(training)
                forward()
                if found:
                    return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None


def damaged_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer that is itself not finite."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return next((n for n, t in tensors if t.is_floating_point() and not bool(torch.isfinite(t).all())), None)


@contextmanager
def undisturbed_modes(model: nn.Module) -> Iterator[None]:
    """Training and evaluation modes of all modules are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def rows_of(loader: Any, epoch: int, first: int, count: int) -> list[int] | None:
    """Indices of the data's rows in batches `first` … `first + count - 1` of an epoch.

    The order is drawn again, which costs nothing in normal steps. None where the loader does not say.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None:
        return None
    places: list[Any] = [sampler, getattr(sampler, "batch_sampler", None)]
    for place in [*places, *(getattr(place, "sampler", None) for place in places)]:
        if hasattr(place, "set_epoch"):
            place.set_epoch(epoch)
    return [int(row) for batch in islice(iter(sampler), first, first + count) for row in batch]


def told_rows(rows: list[int]) -> str:
    """Row numbers for a message."""
    shown = ", ".join(str(row) for row in rows[:MOST_ROWS])
    return shown + (f", … ({len(rows)} in all)" if len(rows) > MOST_ROWS else "")


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _floats(value))
    elif isinstance(output, list | tuple):
        yield from (tensor for value in output for tensor in _floats(value))


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []
