"""Learning curves of a comparison: a small plot a method, the baseline behind it in each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from leantune.report.formats import is_score, method_name
from leantune.report.plots import Plot, Series, Style, line_plot
from leantune.report.runlog import Points


def curve_plots(comparison: Mapping[str, Any]) -> list[Plot]:
    """One plot a method, all with the same axes; empty where no run has a curve.

    A dozen lines in one plot are told apart by nobody. Here each method has a plot of its own: its mean over
    the seeds, its seeds faintly, and the baseline's mean to compare it with.
    """
    if not comparison["curves"]:
        return []
    by_method = {key: _curves(key, comparison) for key in comparison["methods"]}
    drawn = {key: curves for key, curves in by_method.items() if curves}
    values = [y for curves in drawn.values() for curve in curves for y in curve.y]
    within = (min(values), max(values))
    score = is_score(comparison["curves"]["name"]) and within[0] >= 0 and within[1] <= 1
    baseline = comparison["baseline"]
    reference = _mean(drawn[baseline]) if baseline in drawn else Points()
    style: Style = "line" if comparison["curves"]["split"] == "training" else "dots"
    plots = []
    for key, curves in drawn.items():
        role = "second" if key == baseline else "first"
        series = [Series("one seed", each, role, "faint") for each in curves if len(curves) > 1]
        if key != baseline and reference:
            series.append(Series(method_name(baseline), reference, "second", within=within))
        series.append(Series(method_name(key), _mean(curves), role, style, within))
        title = method_name(key)[:1].upper() + method_name(key)[1:]
        last = comparison["budget_steps"]
        plots.append(line_plot(title, series, size="small", percent=score, last=last))
    return plots


def _curves(key: str, comparison: Mapping[str, Any]) -> list[Points]:
    runs = [run for run in comparison["runs"] if run["method"] == key and run.get("curve")]
    return [Points([x for x, _ in run["curve"]], [y for _, y in run["curve"]]) for run in runs]


def _mean(curves: Sequence[Points]) -> Points:
    """Over the seeds, at the steps that all of them have."""
    at = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    steps = [x for x in curves[0].x if all(x in each for each in at)]
    return Points(steps, [statistics.mean(each[x] for each in at) for x in steps])
