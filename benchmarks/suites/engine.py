"""Measure a suite: memory of each case alone, then times, turn by turn, until done or out of time."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.suites.build import Built, NotInstalled, build, setting_of
from benchmarks.suites.cases import SUITES, Group
from benchmarks.suites.memory import measure_memory
from benchmarks.suites.record import Results, command_line, record
from leantune.measure import device_synchronize
from leantune.planner import estimate
from leantune.planner.setting import TASKS

ROUNDS = {"cpu": 3, "cuda": 2}
STEPS = {"cpu": 1, "cuda": 5}  # timed in a round
WARM_UP = {"cpu": 0, "cuda": 2}  # steps before them in a round; measuring memory has warmed a CPU's up
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class How:
    """What holds for a whole call.

    Attributes:
        device: `cpu` or `cuda`.
        scale: Of `shapes`.
        deadline: `time.monotonic()` at which nothing new is begun.
        rounds: Times each case is timed.
        memory: Bytes a case may take; None: whatever the device has.
    """

    device: str
    scale: str
    deadline: float
    rounds: int
    memory: int | None

    @property
    def is_over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() >= self.deadline


@dataclass
class Case:
    """One method of a group, while it is measured."""

    name: str
    row: dict[str, Any] = field(default_factory=dict)
    built: Built | None = None

    @property
    def failed(self) -> bool:
        """Whether it cannot go on."""
        return self.row.get("status", "ok") != "ok"


def run_suite(name: str, how: How, results: Results, progress: Progress) -> bool:
    """Measure what is missing.

    Returns:
        Whether all of the suite is there.
    """
    groups = list(SUITES[name].cases(how.scale, how.device))
    total = sum(len(methods) for _, methods in groups) * (1 + how.rounds)
    bar = progress.add_task(name, total=total)
    for group, methods in groups:
        if results.is_done(group.name, methods):
            progress.advance(bar, len(methods) * (1 + how.rounds))
            continue
        if how.is_over:
            return False
        conditions = record(how.device, command_line(), how.rounds)
        cases = [Case(method) for method in methods]

        def tell(case: Case, group: Group = group) -> None:
            progress.update(bar, advance=1, description=f"{name}: {group.name}: {case.name}")

        def put(
            complete: bool, group: Group = group, cases: list[Case] = cases, began: Any = conditions
        ) -> None:
            rows = {case.name: case.row for case in cases if case.row}
            results.put(group.name, began, rows, complete=complete)

        measure = _interleaved if how.device == "cpu" else _in_rounds
        complete = measure(group, cases, how, tell, put)
        put(complete)
        free(cases)
        if not complete:
            return False
    return True


Tell = Callable[[Case], None]
Put = Callable[[bool], None]


def _interleaved(group: Group, cases: list[Case], how: How, tell: Tell, put: Put) -> bool:
    """All methods in memory; each takes a step in turn."""
    for case in cases:
        if how.is_over:
            return False
        attempt(case, lambda case=case: _start(case, group, how))
        trim()
        tell(case)
        put(False)
    for number in range(how.rounds):
        if how.is_over:
            return False
        turn = number % len(cases)
        for case in [*cases[turn:], *cases[:turn]]:
            attempt(case, lambda case=case: clock(case, how.device))
            tell(case)
        put(False)
    return True


def _in_rounds(group: Group, cases: list[Case], how: How, tell: Tell, put: Put) -> bool:
    """One method in memory at a time; built anew in every round."""
    for number in range(how.rounds):
        for case in cases:
            if how.is_over:
                return False
            begin = _start if number == 0 else _again
            attempt(case, lambda case=case, begin=begin: begin(case, group, how))
            attempt(case, lambda case=case: clock(case, how.device))
            free([case])
            tell(case)
            if number == 0:
                tell(case)
            put(False)
    return True


def _start(case: Case, group: Group, how: How) -> None:
    forecast = forecast_peak(group, case.name, how)
    case.row = {"status": "ok", "forecast_peak": forecast}
    if how.memory is not None and forecast is not None and forecast > how.memory:
        raise torch.OutOfMemoryError(
            f"forecast {forecast / 2**30:.2f} GiB, allowed {how.memory / 2**30:.2f} GiB"
        )
    case.built = build(group, case.name, how.scale, how.device)
    case.row |= measure_memory(case.built, how.device)
    for what in ("training", "evaluation"):
        case.row[what] |= {"seconds": [], "cpu_seconds": []}


def _again(case: Case, group: Group, how: How) -> None:
    case.built = build(group, case.name, how.scale, how.device)


def clock(case: Case, device: str) -> None:
    """A round's steps and evaluations."""
    built = case.built
    assert built is not None
    for what, action in (("training", built.train), ("evaluation", built.evaluate)):
        for _ in range(WARM_UP[device]):
            action()
        for _ in range(STEPS[device]):
            gc.collect()
            device_synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            device_synchronize(device)
            case.row[what]["seconds"].append(round(time.perf_counter() - wall, 6))
            case.row[what]["cpu_seconds"].append(round(time.process_time() - cpu, 6))


def forecast_peak(group: Group, name: str, how: How) -> int | None:
    """The planner's closed form, bytes; None where it knows no formula."""
    setting = setting_of(group, name, how.scale, how.device)
    return estimate(setting).peak if setting.recipe.model.task in TASKS else None


def attempt(case: Case, action: Callable[[], None]) -> None:
    """Do a part of the case; what goes wrong is a row, and the others go on."""
    if case.failed:
        return
    try:
        action()
        return
    except NotInstalled as missing:
        found = {"status": "not installed", "why": str(missing)}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this case's row
        found = {"status": OUT_OF_MEMORY if is_out_of_memory(error) else "failed", "why": _first_line(error)}
    case.row |= found  # outside the handler: its traceback holds on to tensors
    free([case])


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's and the CPU allocator's way of saying so."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said


def free(cases: list[Case]) -> None:
    """Let models and optimizers go."""
    for case in cases:
        case.built = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Give what glibc's malloc keeps of a measured step back to the system: it would add up to gigabytes."""
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
