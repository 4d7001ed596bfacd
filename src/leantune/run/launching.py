"""`leantune train --processes N`: the command starts itself N times, through torch's own launcher.

That is what `torchrun --nproc-per-node N -m leantune.cli train …` does, with a free port, without its log
lines, and with an exit code that says what happened.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from typing import Any

import torch

from leantune.errors import RunError, UserError


def launch(processes: int, arguments: list[str]) -> int:
    """Run `leantune ARGUMENTS` in so many processes on this machine, and wait for them.

    A signal is handed on: they save and stop. When one process dies the others are told to stop, and after 30
    seconds (or TORCH_ELASTIC_SHUTDOWN_TIMEOUT) they are ended.

    Args:
        processes: How many, 2 or more. With GPUs, at most as many as there are: each gets one.
        arguments: Of the command line, without the program's name.

    Returns:
        The exit code: the main process's, or 128 + the number of the signal that came.

    Raises:
        UserError: There are fewer GPUs.
        RunError: A process was killed.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise UserError(f"--processes {processes}: this machine has {torch.cuda.device_count()} GPU(s)")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is told in one line
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # else DDP warns that it looks for unused parameters
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "leantune.cli", *arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        return _exit_code(failed.failures)
    return 0


def _exit_code(failures: dict[int, Any]) -> int:
    """The main process's, whose line says what happened; else that of the one that failed first."""
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    code = failures[0].exitcode if 0 in failures and failures[0].exitcode > 0 else first.exitcode
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        raise RunError(f"process {first.local_rank} was ended by {name}; the others were stopped")
    return int(code)
