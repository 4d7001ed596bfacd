"""Ctrl-C and SIGTERM: a run saves and stops, whatever it is doing."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leantune.recipes import Recipe
from leantune.run import processes
from leantune.run.folder import RunFolder


class Stopped(KeyboardInterrupt):
    """A signal came while nothing was under way that could save: raised wherever the program stood."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Interrupted(Exception):  # noqa: N818 - not an error: the person asked for it
    """A run was stopped by a signal; its checkpoint is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.signal_number)


class EvaluationStopped(Exception):  # noqa: N818 - not an error: the person asked for it
    """A signal came in the middle of an evaluation during training."""


class StopOnSignal(TrainerCallback):
    """What a signal does: in training, finish the step, save a checkpoint, stop; else stop at once.

    A second signal stops at once in any case. An evaluation during training is given up; a run that is
    resumed there makes up for it.

    Args:
        waits: Whether something is under way that looks at `received`. A training stage says so with
            `waiting()`.

    Attributes:
        received: The signal's number; None while there was none. Several processes agree on it at the end of
            each step: what came to one of them came to all.
    """

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, the signals are ours (in the main thread; elsewhere nothing changes)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts, a signal is only noted: training looks for it at the end of each step."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def _receive(self, number: int, frame: Any) -> None:
        again = self.received is not None
        self.received = number
        if again or not self.waits:
            raise Stopped(number)

    def agreed(self) -> int | None:
        """The signal that came, here or in another process; all processes ask at the same places."""
        self.received = processes.any_of(self.received or 0) or None
        return self.received

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer to save and stop."""
        if self.agreed() is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the evaluation up."""
        if self.agreed() is not None:
            raise EvaluationStopped

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer takes a stop for an epoch's end: no evaluation, which can wait for the resumed run."""
        if self.agreed() is not None:
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True


def go_on(recipe: Recipe) -> str:
    """What to tell a person whose run has stopped."""
    again = ["leantune", "train", str(RunFolder(recipe.output).recipe_file), "--resume"]
    if processes.count() > 1:
        again += ["--processes", str(processes.count())]
    return f"go on with: {shlex.join(again)}"
