"""What watches a training run: the log and the progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leantune.measure import StepClock
from leantune.run.folder import sync, write_text

SECONDARY = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class RunLog(TrainerCallback):
    """`log.jsonl`: one line a training step, one line an evaluation.

    Args:
        file: The log.
        extra: More figures for a step's line.
        stage: Written into every line where a run has several stages; the last stage, the training itself,
            has None.
    """

    def __init__(
        self, file: Path, extra: Callable[[], dict[str, float]] = dict, stage: str | None = None
    ) -> None:
        self.file = file
        self.extra = extra
        self.stage = stage
        self._clock = StepClock()
        self._seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop lines from after the checkpoint that this run resumes from; set up the clock."""
        self._clock = StepClock(args.device)
        lines = _upto(self.file, state.global_step, self.stage)
        if not was_evaluated(state):  # after the checkpoint was written: it will be again
            lines = (line for line in lines if not _is_evaluation(line, state.global_step))
        write_text(self.file, "".join(lines))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock (with gradient accumulation a step is the whole of it)."""
        self._clock.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self._seconds = self._clock.stop()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a training step's line."""
        if not logs or "learning_rate" not in logs:
            return
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        line |= {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        if "skipped" in logs:
            line["skipped"] = True  # the update, because loss or gradient were not finite
        line["step_seconds"] = round(self._seconds, 6)
        self._write(line | self.extra())

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write an evaluation's line."""
        if not metrics:
            return
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        self._write(line | {"evaluation": "validation"} | plain_metrics(metrics, "eval"))

    def flush(self) -> None:
        """Force what is written to disk: before a checkpoint that this log must reach up to."""
        if self.file.is_file():
            sync(self.file)

    def _write(self, line: dict[str, Any]) -> None:
        if self.stage is not None:
            line = {"stage": self.stage} | line
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(file: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """One stage's lines of the log as plain data."""
    lines = [json.loads(line) for line in _upto(file, None, stage)]
    return [line for line in lines if line.get("stage") == stage]


def _upto(file: Path, step: int | None, stage: str | None) -> Iterator[str]:
    """Whole lines up to a step of a stage, with all of the stages before; half a line is left out."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            content = json.loads(line)
            at, of = content["step"], content.get("stage")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if (of == stage and (step is None or at <= step)) or (stage is None and of is not None):
            yield line


def _is_evaluation(line: str, step: int) -> bool:
    content = json.loads(line)
    return "evaluation" in content and content["step"] == step


def was_evaluated(state: TrainerState) -> bool:
    """Whether the model was evaluated after the step that the state is of."""
    for entry in reversed(state.log_history):
        if entry.get("step") != state.global_step:
            return False
        if "eval_runtime" in entry:
            return True
    return False


def plain_metrics(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Trainer's metrics without the prefix and without its timings."""
    return {
        key.removeprefix(f"{prefix}_"): float(value)
        for key, value in metrics.items()
        if key.startswith(f"{prefix}_") and not key.endswith(SECONDARY)
    }


class ProgressBar(TrainerCallback):
    """A bar with steps, loss and time left; drawn on a terminal, a line an epoch elsewhere."""

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self.bar: Progress | None = None
        self.row: TaskID | None = None
        self.loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar."""
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar.start()
        self.row = self.bar.add_task(self.what, total=state.max_steps, completed=state.global_step, loss="")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Move the bar."""
        if not logs or "loss" not in logs:
            return
        value = float(logs["loss"])
        self.loss = value if self.loss is None else 0.95 * self.loss + 0.05 * value
        if self.bar is not None and self.row is not None:
            self.bar.update(self.row, completed=state.global_step, loss=f"loss {self.loss:.3f}")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say where the run is, for those who read a log file."""
        if self.bar is None and self.loss is not None:
            done = f"{self.what}: step {state.global_step}/{state.max_steps}"
            self.console.print(f"{done}, epoch {state.epoch:.2f}, loss {self.loss:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar standing."""
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
