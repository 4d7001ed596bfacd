"""Several processes that train one model: which one this is, and how all of them stay in step.

    launcher (leantune train --processes N, torchrun, accelerate launch)
        └─ N times `leantune train`: `join()` → train together → `leave()` → the first goes on alone

Every process reads data and model and trains on its part of each batch. Only the first, the *main* one,
prints and writes the run folder; the others wait where it does so. An error that all processes know of is
*shared*: the main one tells it. After training the others are done, and the main one evaluates and reports
as a single process would.

Start them: run/launching.py. Who gets which rows: run/dealing.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from leantune.errors import RunError, UserError, first_line

T = TypeVar("T")

# What launchers set for the processes that they start.
_LAUNCHERS_OWN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# Parts of what gloo, NCCL and torch say when another process is gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "connectFullMesh",
    "gloo",
    "NCCL",
    "Broken pipe",
)


def started_with(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher says there are; before `join`, and without importing much."""
    return int(environment.get("WORLD_SIZE", "1"))


def count() -> int:
    """How many processes train together; 1 before `join` and after `leave`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def join() -> None:
    """Become one of the processes that a launcher has started; does nothing in a single one.

    Raises:
        UserError: The launcher started something else than what it was asked for.
        RunError: The others are not to be found.
    """
    world = started_with()
    if world == 1:
        _check_not_alone()
        return
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE = {world}, but no RANK or LOCAL_RANK: start with --processes, or torchrun"
        )
    _check_launcher()
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # made before, it would not look again
    try:
        PartialState(cpu=not torch.cuda.is_available())
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the {world} processes do not come together: {first_line(error)}") from error
    if count() != world:
        raise shared(UserError(f"a launcher was asked for {world} processes, but {count()} came together"))


def leave() -> None:
    """Training together is over: wait for all, then be a single process."""
    if count() == 1:
        return
    from accelerate.state import AcceleratorState

    dist.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
    dist.destroy_process_group()
    for name in (*_LAUNCHERS_OWN, "ACCELERATE_USE_FSDP"):  # accelerate sets the last for itself
        os.environ.pop(name, None)


def _check_not_alone() -> None:
    """`accelerate launch --cpu --num_processes 2` silently starts one process, with an address to meet at."""
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and has started one: use "
            "`leantune train RECIPE --processes N`, or torchrun"
        )


def _check_launcher() -> None:
    """What a launcher's own options would change silently has its place in the recipe, or none."""
    for name, what in (
        ("FSDP", "--use_fsdp: write train.fsdp: true in the recipe instead"),
        ("DEEPSPEED", "--use_deepspeed: DeepSpeed is not supported, see docs/processes.md"),
        ("MEGATRON_LM", "--use_megatron_lm: Megatron-LM is not supported"),
    ):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise shared(UserError(f"accelerate launch {what}"))


# -- in step -------------------------------------------------------------------------------------------------


def any_of(number: int) -> int:
    """The largest of all processes' numbers; every process must call it."""
    if count() == 1:
        return number
    value = torch.tensor(number, device=_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def gathered(value: T) -> list[T]:
    """Every process's value, by rank; every process must call it."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def from_main(work: Callable[[], T]) -> T:
    """Let the main process do something and give its result to all; its error is everybody's."""
    if count() == 1:
        return work()
    result: list[Any] = [None]
    with together():
        if is_main():
            result = [work()]
    dist.broadcast_object_list(result, src=0)
    return cast(T, result[0])


@contextmanager
def together() -> Iterator[None]:
    """What goes wrong in here in one process goes wrong in all of them, and the main one tells it.

    There may be no exchange between processes inside: a process that fails would leave the others in it.
    """
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    outcomes = gathered(_outcome(error))
    first = next((number for number, outcome in enumerate(outcomes) if outcome), None)
    if first is None:
        return
    if error is not None and not isinstance(error, UserError | RunError):
        raise error  # with its traceback; `shared` is not set, so every process that has one shows it
    kind, text = cast(tuple[type[Exception], str], outcomes[first])
    alone = sum(outcome is not None for outcome in outcomes) < count()
    raise shared(kind(f"process {first}: {text}" if alone and first else text)) from error


def shared(error: Exception) -> Exception:
    """Mark an error as known to all processes: the main one tells it, the others keep quiet."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def _outcome(error: Exception | None) -> tuple[type[Exception], str] | None:
    if error is None:
        return None
    if isinstance(error, UserError | RunError):
        return UserError if isinstance(error, UserError) else RunError, str(error)
    return RunError, f"{type(error).__name__}: {first_line(error)}"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone."""
    if count() == 1:
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in _LOST)
    )


def _device() -> torch.device:
    """Where numbers that all processes compare must lie: NCCL moves nothing on a CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )
