"""Execute the runs of a comparison: each in a process of its own, what is finished kept, a failure noted."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from leantune.comparison.plan import Cell
from leantune.comparison.progress import RunsProgress
from leantune.recipes import yaml
from leantune.run.folder import write_text
from leantune.run.stopping import StopOnSignal

LOOK_EVERY = 0.5  # seconds between looks at a running process
LONGEST_REASON = 300  # characters


class Stopped(Exception):  # noqa: N818 - not an error: the person asked for it
    """A signal came; the run that was under way has saved its checkpoint."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def finished(cell: Cell) -> bool:
    """Whether the cell's run is done."""
    return cell.folder.metrics_file.is_file()


def execute(
    cells: Sequence[Cell], failures: dict[str, str], progress: RunsProgress, after_each: Callable[[], object]
) -> int:
    """Run what is not finished; a run that failed before is tried again.

    Args:
        cells: In this order.
        failures: Cell → reason; filled in.
        progress: Is told of every run.
        after_each: Called whenever a run has ended.

    Returns:
        How many runs were executed.

    Raises:
        Stopped: SIGINT or SIGTERM came.
    """
    stop, executed = StopOnSignal(), 0
    with stop.listening():
        for cell in cells:
            if finished(cell):
                progress.kept(cell)
                continue
            progress.begin(cell)
            failures.pop(cell.name, None)
            reason = run_in_process(cell, stop, progress)
            if stop.received is not None and not finished(cell):
                raise Stopped(stop.received)
            executed += 1
            if reason is not None:
                failures[cell.name] = reason
            progress.end(cell, reason)
            _drop_checkpoints(cell)
            after_each()
            if stop.received is not None:
                raise Stopped(stop.received)
    return executed


def _drop_checkpoints(cell: Cell) -> None:
    """A finished run needs none, and those of full fine-tuning would fill the disk."""
    if finished(cell):
        shutil.rmtree(cell.folder.checkpoints, ignore_errors=True)


def run_in_process(cell: Cell, stop: StopOnSignal, progress: RunsProgress) -> str | None:
    """One run through the command line, resumed where it was begun before.

    Returns:
        Why it failed, in one line; None when it is done (or was stopped).
    """
    cell.recipe_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(cell.recipe_file, yaml.dump(cell.recipe.to_dict()))
    command = [sys.executable, "-m", "leantune.cli", "train", str(cell.recipe_file), "--json"]
    if cell.folder.recipe_file.is_file():
        command.append("--resume")
    with tempfile.TemporaryFile() as said:
        # A session of its own: Ctrl-C in the terminal reaches us alone, and we pass it on once.
        process = subprocess.Popen(  # noqa: S603 - our own command line
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        try:
            _wait(process, cell, stop, progress)
        except BaseException:  # a second Ctrl-C, or a fault of ours: no run goes on unseen
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        return None if process.returncode == 0 else _reason(process.returncode, said)


def _wait(process: subprocess.Popen[bytes], cell: Cell, stop: StopOnSignal, progress: RunsProgress) -> None:
    """Wait for the run; a signal of ours is passed on to it, and it saves."""
    passed_on = False
    while True:
        try:
            process.wait(LOOK_EVERY)
            return
        except subprocess.TimeoutExpired:
            progress.look(cell)
        if stop.received is not None and not passed_on:
            process.send_signal(stop.received)
            progress.stopping(cell)
            passed_on = True


def _reason(returncode: int, said: IO[bytes]) -> str:
    """What a failed run said last."""
    said.seek(0)
    lines = said.read().decode("utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return f"ended by {name}" + (", for want of memory perhaps" if name == "SIGKILL" else "")
    own = [line.removeprefix("leantune: ") for line in lines if line.startswith("leantune: ")]
    last = (own or lines or [f"exit code {returncode}"])[-1]
    return last if len(last) <= LONGEST_REASON else last[: LONGEST_REASON - 1] + "…"


def write_base(out: Path, recipe: dict[str, object]) -> Path:
    """The compared recipe, resolved, beside the recipes of the runs."""
    place = out / "recipes" / "recipe.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, yaml.dump(recipe))
    return place
