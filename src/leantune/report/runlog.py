"""What `log.jsonl` of a run says, as series of points."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leantune.report.formats import is_finite, is_number, real_metrics


@dataclass(frozen=True)
class Points:
    """A series: `y[i]` was seen at step `x[i]`; steps rise."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def __bool__(self) -> bool:
        return bool(self.x)


@dataclass(frozen=True)
class RunLog:
    """The training steps and the evaluations of a run, each step once and in order."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0

    @property
    def last_step(self) -> int:
        """The number of the last step that was logged; 0 for an empty log."""
        return max((int(row["step"]) for row in self.steps), default=0)

    @property
    def epochs(self) -> float | None:
        """How far through the data the log goes; None where no line says it."""
        return max((row["epoch"] for row in self.steps if is_finite(row.get("epoch"))), default=None)

    @property
    def not_finite(self) -> list[int]:
        """Steps whose loss or gradient was NaN or infinite (a skipped one has no loss in the log)."""
        return [
            int(row["step"])
            for row in self.steps
            if row.get("skipped") or (is_number(row.get("loss")) and not is_finite(row["loss"]))
        ]

    def series(self, name: str) -> Points:
        """Finite values of `name` over the training steps."""
        return _points(self.steps, name)

    def metric_names(self) -> list[str]:
        """Metrics of the evaluations, loss left out, in the order in which they first appear."""
        names = (n for row in self.evaluations for n, v in real_metrics(row).items() if is_number(v))
        return [name for name in dict.fromkeys(names) if name != "loss"]

    def splits(self) -> list[str]:
        """Splits that were evaluated, in the order in which they first appear."""
        return list(dict.fromkeys(str(row["evaluation"]) for row in self.evaluations))

    def evaluated(self, split: str, name: str) -> Points:
        """Finite values of metric `name` over the evaluations of `split`."""
        return _points((row for row in self.evaluations if str(row["evaluation"]) == split), name)


def _points(rows: Iterable[dict[str, Any]], name: str) -> Points:
    found = [(row["step"], row[name]) for row in rows if is_finite(row.get(name))]
    return Points([x for x, _ in found], [y for _, y in found])


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file with one JSON object a line, and the number of lines that hold none.

    A run that was killed leaves half a last line; that must not cost the reader the rest. A missing file
    is an empty one.
    """
    if not path.is_file():
        return [], 0
    rows: list[dict[str, Any]] = []
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                unreadable += 1
    return rows, unreadable


def read_log(path: Path) -> RunLog:
    """The log at `path`: of the training itself, where a run has several stages.

    A run that was resumed from an earlier checkpoint logs some steps twice: the later line holds.
    """
    rows, unreadable = read_jsonl(path)
    steps: dict[float, dict[str, Any]] = {}
    evaluations: dict[tuple[float, str], dict[str, Any]] = {}
    for row in rows:
        if row.get("stage") is not None:
            continue  # of the stage before: estimation
        if not is_finite(row.get("step")):
            unreadable += 1
        elif row.get("evaluation") is not None:
            evaluations[row["step"], str(row["evaluation"])] = row
        else:
            steps[row["step"]] = row
    return RunLog(
        [steps[key] for key in sorted(steps)], [evaluations[key] for key in sorted(evaluations)], unreadable
    )


def smooth(points: Points, share: float = 0.05) -> Points:
    """A centred mean over `share` of the points, taken twice: no lag, no kinks.

    At both ends the window is what there is of it, so that one last odd step does not bend the curve.
    """
    reach = int(len(points) * share / 2)
    y = points.y
    for _ in range(2):
        y = _centred_mean(y, reach)
    return Points(points.x, y)


def _centred_mean(y: list[float], reach: int) -> list[float]:
    sums = [0.0]
    for value in y:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(y)):
        first, end = max(0, i - reach), min(len(y), i + reach + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def thin(points: Points, most: int = 400) -> Points:
    """At most about `most` of the points that look the same when drawn: each stretch's lowest and highest.

    Every spike survives, the first and the last point too; nothing is averaged away.
    """
    n = len(points)
    if n <= most:
        return points
    stretches = max(1, most // 2)
    keep = {0, n - 1}
    for s in range(stretches):
        stretch = range(s * n // stretches, (s + 1) * n // stretches)
        keep |= {min(stretch, key=points.y.__getitem__), max(stretch, key=points.y.__getitem__)}
    order = sorted(keep)
    return Points([points.x[i] for i in order], [points.y[i] for i in order])
