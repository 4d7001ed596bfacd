"""Several processes in a test: forked, so that nothing is imported again, and joined by gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

WAIT = 240.0  # seconds


class Team:
    """Processes that run the same function; see `together`.

    Attributes:
        members: The processes, by rank.
    """

    def __init__(self, count: int, work: Callable[..., Any], *args: Any, **environment: str) -> None:
        context = multiprocessing.get_context("fork")
        port = free_port()
        self.members, self._ends = [], []
        for rank in range(count):
            here, there = context.Pipe(duplex=False)
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
            member = context.Process(target=_run, args=(there, names, work, args), daemon=True)
            member.start()
            there.close()
            self.members.append(member)
            self._ends.append(here)

    def results(self) -> list[Any]:
        """What the function returned in each process, or the exception it raised; None for a killed one."""
        found = []
        for member, end in zip(self.members, self._ends, strict=True):
            try:
                found.append(end.recv() if end.poll(WAIT) else TimeoutError("no answer"))
            except EOFError:
                found.append(None)
            member.join(WAIT)
        for member in self.members:
            member.kill()
        return found


def together(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `work(*args)` in so many processes, each as a launcher would have started it.

    Returns:
        Its results by rank.

    Raises:
        Exception: What one of them raised.
    """
    results = Team(count, work, *args).results()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _run(
    end: Connection, environment: dict[str, Any], work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    try:
        result = work(*args)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test is told
        error.add_note("".join(traceback.format_exception(error)))
        result = error
    try:
        end.send(result)
    except Exception as error:  # noqa: BLE001 - what cannot be pickled
        end.send(RuntimeError(f"{result!r}: {error}"))
    end.close()
    os._exit(0)  # nothing of pytest's own is to happen here


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
