"""The same training step for real, on random weights, under torch's profiler: to hold forecasts against.

The CPU's allocator reports every block that it gives out and takes back, so the figure is the same in every
run, whatever else the machine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from leantune.measure import saved_activation_bytes
from leantune.planner.building import build_real, undisturbed
from leantune.planner.setting import Setting, check
from leantune.planner.step import Step, make_batch, make_optimizer


@dataclass(frozen=True)
class Measured:
    """What a real step took.

    Attributes:
        peak: Bytes at the peak of a training step, the optimizer's state in place.
        evaluation_peak: Of an evaluation batch between two steps.
        cpu_seconds: Processor time of a step, the second one.
    """

    peak: int
    evaluation_peak: int
    cpu_seconds: float


def measure(setting: Setting) -> Measured:
    """Train a step and evaluate a batch on the CPU, with random weights.

    Args:
        setting: What to train; it must fit in memory.

    Raises:
        UserError: The setting is refused, or a method does not fit the model.
    """
    check(setting)
    torch.manual_seed(0)
    model = build_real(setting)
    optimizer = make_optimizer(model, setting)
    step, batch = Step(model, optimizer, setting), make_batch(setting)
    peak = allocator_peak(lambda: step.run(batch), [*held_tensors(model, optimizer), *batch.values()])
    model.zero_grad(set_to_none=not setting.accumulates)
    began = time.process_time()
    step.run(batch)
    seconds = time.process_time() - began
    model.zero_grad(set_to_none=True)
    rows = make_batch(replace(setting, batch=setting.evaluation_batch))
    evaluation = allocator_peak(
        lambda: step.evaluate(rows), [*held_tensors(model, optimizer), *rows.values()]
    )
    return Measured(peak, evaluation, seconds)


def measure_peak(setting: Setting) -> int:
    """As `measure`, of the training step alone."""
    check(setting)
    torch.manual_seed(0)
    model = build_real(setting)
    optimizer = make_optimizer(model, setting)
    step, batch = Step(model, optimizer, setting), make_batch(setting)
    return allocator_peak(lambda: step.run(batch), [*held_tensors(model, optimizer), *batch.values()])


def measure_saved(setting: Setting) -> int:
    """`leantune.saved_activation_bytes` of the setting's real model and batch."""
    check(setting)
    torch.manual_seed(0)
    return saved_activation_bytes(build_real(setting), make_batch(setting))


def held_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What is in memory between two steps; of bitsandbytes' layers, the scales, too."""
    held: list[Any] = [*model.parameters(), *model.buffers()]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    held += [value for state in optimizer.state.values() for value in state.values()]
    for module in model.modules():
        states = [
            getattr(module, "state", None),
            getattr(getattr(module, "weight", None), "quant_state", None),
        ]
        states += [getattr(state, "state2", None) for state in states]
        held += [value for state in states if state is not None for value in vars(state).values()]
    return [value for value in held if isinstance(value, Tensor)]


def allocator_peak(action: Callable[[], None], held: list[Tensor]) -> int:
    """Bytes of what is held and of the most that the action has on top, by the CPU allocator's reports.

    Args:
        action: Run once, under torch's profiler.
        held: Tensors that are in memory before it and count as well; emptied, so that they can be let go.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    held.clear()
    activities = [ProfilerActivity.CPU]
    with undisturbed(), profile(activities=activities, profile_memory=True) as log:
        action()
    return sum(storages.values()) + _highest(log)


def _highest(log: Any) -> int:
    """The largest running sum of the allocator's reports."""
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest
