"""The same training step for real, on random weights, under torch's profiler: to hold forecasts against.

The CPU's allocator reports every block that it gives out and takes back, so the figure is the same in every
run, whatever else the machine does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from leantune.measure import saved_activation_bytes
from leantune.planner.building import build_real, undisturbed
from leantune.planner.setting import Setting, check
from leantune.planner.step import Step, make_batch, make_optimizer


def measure_peak(setting: Setting) -> int:
    """Bytes at the peak of a real training step on the CPU, the optimizer's state in place.

    Args:
        setting: What to train; it must fit in memory.

    Raises:
        UserError: The setting is refused, or a method does not fit the model.
    """
    check(setting)
    torch.manual_seed(0)
    model = build_real(setting)
    optimizer = make_optimizer(model, setting)
    batch = make_batch(setting)
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    held += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    activities = [ProfilerActivity.CPU]
    with undisturbed(), profile(activities=activities, profile_memory=True) as log:
        Step(model, optimizer, setting).run(batch)
    return before + _highest(log)


def measure_saved(setting: Setting) -> int:
    """`leantune.saved_activation_bytes` of the setting's real model and batch."""
    check(setting)
    torch.manual_seed(0)
    return saved_activation_bytes(build_real(setting), make_batch(setting))


def _highest(log: Any) -> int:
    """The largest running sum of the allocator's reports."""
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest
