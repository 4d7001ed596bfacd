"""Where a comparison is: one line that moves on a terminal, a line a run elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from leantune.comparison.plan import Cell
from leantune.report import format_metric, format_seconds
from leantune.report.facts import headline_split
from leantune.report.formats import headline_metric, metric_name


class RunsProgress:
    """The runs of a comparison, as they go by.

    Args:
        console: Where to.
        total: Number of runs.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.bar: Progress | None = None
        self.row: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=24),
                TextColumn("{task.fields[done]}/" + f"{self.total} runs"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.row = self.bar.add_task("", total=self.total, done=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, cell: Cell) -> None:
        """A run starts."""
        self._show(cell, 0)

    def look(self, cell: Cell) -> None:
        """A run goes on."""
        if self.bar is not None:
            self._show(cell, _logged_steps(cell))

    def kept(self, cell: Cell) -> None:
        """A run was finished before."""
        self.done += 1

    def stopping(self, cell: Cell) -> None:
        """A signal came; the run needs a moment."""
        self.console.print(
            f"stopping: {cell.method.name}, seed {cell.seed}, saves its checkpoint", markup=False
        )

    def end(self, cell: Cell, failure: str | None) -> None:
        """A run is over."""
        self.done += 1
        told = f"failed: {failure}" if failure is not None else _outcome(cell)
        self.console.print(
            f"[{self.done}/{self.total}] {cell.method.name}, seed {cell.seed}: {told}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def _show(self, cell: Cell, steps: int) -> None:
        if self.bar is None or self.row is None:
            return
        budget = cell.method.estimation_steps + cell.method.training_steps
        about = f"{cell.method.name}, seed {cell.seed}: step {steps:,} of {budget:,}"
        done = self.done + min(steps / budget, 1)
        self.bar.update(self.row, completed=done, description=escape(about), done=self.done)


def _logged_steps(cell: Cell) -> int:
    """Steps in the run's log; evaluations are few and have no loss rate of their own."""
    try:
        return cell.folder.log_file.read_bytes().count(b'"step_seconds"')
    except OSError:
        return 0


def _outcome(cell: Cell) -> str:
    metrics = cell.folder.metrics() or {}
    evaluation = metrics.get("evaluation", {})
    split = headline_split(evaluation)
    seconds = metrics["speed"]["train_seconds"] + metrics["speed"]["estimate_seconds"]
    took = f"{format_seconds(seconds)} of training"
    if split is None:
        return took
    name = headline_metric(evaluation[split]) or ""
    return f"{metric_name(name).lower()} {format_metric(name, evaluation[split][name])} on {split}, {took}"
