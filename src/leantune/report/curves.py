"""Which plots a run's log deserves."""

from __future__ import annotations

from collections.abc import Iterator

from leantune.report.formats import is_score, metric_name
from leantune.report.plots import SERIES_ROLES, Plot, Series, Size, frame, line_plot
from leantune.report.runlog import Points, RunLog, smooth, thin

_FEW = 30  # so few points are shown as they are: there is nothing to smooth
_WIDE = 50  # highest over lowest from which a linear axis hides most of a curve


def run_plots(log: RunLog) -> list[Plot]:
    """Plots of one run, the important ones (loss, metrics) first; a curve without points has none."""
    details = {"learning_rate": _rate, "frozen_columns": _frozen, "grad_norm": _gradient}
    found = {plot: points for name, plot in details.items() if (points := log.series(name))}
    # three share a row; fewer are as large as the plots above them and leave no hole
    size: Size = "small" if len(found) == len(details) else "large"
    return [
        *_loss(log),
        *_metrics(log),
        *(plot(points, size, log.last_step) for plot, points in found.items()),
    ]


def _loss(log: RunLog) -> Iterator[Plot]:
    series = _noisy("training", log.series("loss"))
    for split, role in zip(log.splits(), SERIES_ROLES[1:], strict=False):
        if points := log.evaluated(split, "loss"):
            series.append(Series(split, points, role, "dots"))
    if series:
        yield line_plot("Loss", series, log=_is_wide(series), last=log.last_step)


def _metrics(log: RunLog) -> Iterator[Plot]:
    """Scores share one plot in percent; every other metric has a scale of its own."""
    names = log.metric_names()
    scores = [name for name in names if is_score(name)]
    for group in [scores, *([name] for name in names if name not in scores)]:
        series = [s for name in group for split in log.splits() if (s := _evaluated(log, split, name))]
        # more lines than colours would be told apart by nobody
        series = [
            Series(s.label, s.points, role, "dots") for s, role in zip(series, SERIES_ROLES, strict=False)
        ]
        if series:
            within = all(0 <= y <= 1 for s in series for y in s.points.y)
            title = metric_name(group[0]) if len(group) == 1 else "Scores"
            yield line_plot(title, series, percent=within and group is scores, last=log.last_step)


def _evaluated(log: RunLog, split: str, name: str) -> Series | None:
    points = log.evaluated(split, name)
    return Series(f"{metric_name(name)}, {split}", points) if points else None


def _rate(points: Points, size: Size, last: int) -> Plot:
    series = [Series("learning rate", thin(points))]
    return line_plot("Learning rate", series, size=size, from_zero=True, last=last)


def _frozen(points: Points, size: Size, last: int) -> Plot:
    series = [Series("frozen columns of B", thin(points), "third", "steps")]
    return line_plot("Frozen share of columns", series, size=size, percent=True, from_zero=True, last=last)


def _gradient(points: Points, size: Size, last: int) -> Plot:
    series = _noisy("gradient norm", points)
    return line_plot("Gradient norm", series, size=size, log=_is_wide(series), last=last)


def _noisy(label: str, points: Points) -> list[Series]:
    """What is seen step by step, faintly, and its smoothed course on top of it.

    Of the faint line the outermost hundredths may leave the frame: one odd batch of a thousand would press
    the curve that matters into a corner.
    """
    if not points:
        return []
    if len(points) < _FEW:
        return [Series(label, points)]
    y = sorted(points.y)
    within = (y[len(y) // 100], y[-1 - len(y) // 100])
    return [
        Series(label, thin(points), style="faint", within=within),
        Series(f"{label}, smoothed", thin(smooth(points))),
    ]


def _is_wide(series: list[Series]) -> bool:
    low, high = frame([each for each in series if each.style != "faint"])
    return frame(series)[0] > 0 and high / low > _WIDE
