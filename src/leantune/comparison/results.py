"""From the runs' folders to what `compare.json` says."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leantune.comparison.methods import describe
from leantune.comparison.plan import Cell, Method
from leantune.errors import UserError
from leantune.report import method_name
from leantune.report.facts import headline_split
from leantune.report.formats import headline_metric, is_finite, lower_is_better
from leantune.report.runlog import Points, smooth
from leantune.report.verdict import Metric, Standing, Verdict, judge, verdict
from leantune.run.callbacks import read_log
from leantune.run.estimation import STAGE

SCHEMA = 1
FILE = "compare.json"
BASELINES = ("lora", "full")
CURVE_POINTS = 60  # of a training loss


def read_comparison(out: Path) -> dict[str, Any]:
    """What an earlier call wrote; empty where nothing is yet.

    Raises:
        UserError: The folder is something else's.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out = {str(out)!r}: is a file")
    file = out / FILE
    if not file.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"out = {str(out)!r}: the folder is not empty and holds no comparison")
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file}: not valid JSON") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UserError(f"{file}: not a comparison of this release (schema {SCHEMA}); take another out")
    return found


def pick_baseline(names: Sequence[str]) -> str:
    """What the others are judged against: LoRA, else full fine-tuning, else the first."""
    return next((name for name in BASELINES if name in names), names[0])


def collect(
    cells: Sequence[Cell],
    methods: Sequence[Method],
    failures: Mapping[str, str],
    timing: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Runs, methods with their figures, and the verdict.

    Args:
        cells: Every run, finished or not.
        methods: In the order asked for.
        failures: Cell → why it failed.
        timing: Method → what `timing.summarize` says; empty while nothing was timed.
    """
    runs = [_run(cell, failures) for cell in cells]
    good = [run for run in runs if "metrics" in run]
    metric = _metric(good)
    baseline = pick_baseline([method.name for method in methods])
    entries = {method.name: _entry(method, runs, timing.get(method.name)) for method in methods}
    said = _judge(entries, baseline, metric)
    return {
        "baseline": baseline,
        "metric": metric,
        "methods": entries,
        "verdict": said.text,
        "advice": said.advice,
        "curves": _add_curves(runs, cells, metric),
        "runs": runs,
    }


def _run(cell: Cell, failures: Mapping[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": cell.method.name, "seed": cell.seed, "folder": cell.name}
    metrics = cell.folder.metrics()
    if metrics is not None:
        return row | {"metrics": metrics, "estimation_step_ratio": _estimation_ratio(cell)}
    if cell.name in failures:
        return row | {"failed": failures[cell.name]}
    return row | {"pending": True}


def _metric(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The metric that the methods are compared by: what a run's own page puts first."""
    for run in runs:
        evaluation = run["metrics"]["evaluation"]
        split = headline_split(evaluation)
        if split is not None:
            name = headline_metric(evaluation[split]) or "loss"
            return {"split": split, "name": name, "lower_is_better": lower_is_better(name)}
    return None


def _add_curves(
    runs: Sequence[dict[str, Any]], cells: Sequence[Cell], metric: Mapping[str, Any] | None
) -> dict[str, str] | None:
    """Write each finished run's learning curve into it: [[step, value], …], the estimation's steps counted.

    Returns:
        What the curves are of: the metric on validation, or where that was not evaluated at least twice in
        every run, the smoothed training loss. None without a finished run.
    """
    good = [(run, cell) for run, cell in zip(runs, cells, strict=True) if "metrics" in run]
    if not good or metric is None:
        return None
    evaluated = [_validation(cell, metric["name"]) for _, cell in good]
    enough = all(len(curve) >= 2 for curve in evaluated)
    for (run, cell), curve in zip(good, evaluated, strict=True):
        run["curve"] = curve if enough else _loss(cell)
    return {"name": metric["name"] if enough else "loss", "split": "validation" if enough else "training"}


def _validation(cell: Cell, name: str) -> list[list[float]]:
    before = cell.method.estimation_steps
    return [
        [line["step"] + before, line[name]]
        for line in read_log(cell.folder.log_file)
        if line.get("evaluation") == "validation" and is_finite(line.get(name))
    ]


def _loss(cell: Cell) -> list[list[float]]:
    log, before = cell.folder.log_file, cell.method.estimation_steps
    stages = (read_log(log, STAGE), 0), (read_log(log), before)
    seen = [
        (line["step"] + offset, line["loss"])
        for lines, offset in stages
        for line in lines
        if "evaluation" not in line and is_finite(line.get("loss"))
    ]
    points = smooth(Points([x for x, _ in seen], [y for _, y in seen]))
    curve = [[x, round(y, 6)] for x, y in zip(points.x, points.y, strict=True)]
    # evenly spaced, so that all seeds have the same steps
    return [*curve[: -1 : max(1, len(curve) // CURVE_POINTS)], *curve[-1:]]


def _estimation_ratio(cell: Cell) -> float | None:
    """A step of the first stage over one of the second, within this run; None with a single stage."""
    seconds = []
    for stage in (STAGE, None):
        lines = read_log(cell.folder.log_file, stage)
        seconds.append([line["step_seconds"] for line in lines if "step_seconds" in line])
    if not seconds[0] or not seconds[1]:
        return None
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def _entry(
    method: Method, runs: Sequence[Mapping[str, Any]], timing: Mapping[str, Any] | None
) -> dict[str, Any]:
    own = [run for run in runs if run["method"] == method.name]
    good = [run for run in own if "metrics" in run]
    failed = list(dict.fromkeys(run["failed"] for run in own if "failed" in run))
    entry: dict[str, Any] = {
        "what": describe(method.name),
        "settings": method.settings,
        "learning_rate": method.rate.value,
        "learning_rate_source": method.rate.source,
        "steps": {"estimation": method.estimation_steps, "training": method.training_steps},
        "runs": len(good),
        "failed": failed,
        "figures": _figures([run["metrics"] for run in good]) if good else None,
        "timing": None,
    }
    if timing is not None:
        entry["timing"] = {**timing, **_whole_run(method, good, timing)}
    return entry


def _figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means, sample standard deviations and values over the seeds."""
    return {
        group: {
            name: _spread([found for one in metrics if is_finite(found := one[group].get(name))])
            for name in dict.fromkeys(name for one in metrics for name in one[group])
            if name != "peak_kind"
        }
        for group in ("parameters", "memory", "speed")
    } | {
        "adapter_bytes": _spread([one["adapter_bytes"] for one in metrics]),
        "evaluation": {
            split: {
                name: _spread([one["evaluation"][split][name] for one in metrics])
                for name in metrics[0]["evaluation"][split]
            }
            for split in metrics[0]["evaluation"]
        },
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.mean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def _whole_run(
    method: Method, runs: Sequence[Mapping[str, Any]], timing: Mapping[str, Any]
) -> dict[str, float | None]:
    """Seconds of the whole budget at the timed pace; estimation's steps are as much longer as in the runs."""
    if "step_seconds" not in timing:
        return {}
    ratios = [run["estimation_step_ratio"] for run in runs if run["estimation_step_ratio"] is not None]
    estimation = method.estimation_steps * (statistics.median(ratios) if ratios else 1)
    steps = method.training_steps + estimation
    budget = method.training_steps + method.estimation_steps
    ratio = timing["step_ratio"]
    return {
        "budget_seconds": timing["step_seconds"] * steps,
        "budget_ratio": None if ratio is None else ratio * steps / budget,
    }


def _judge(entries: dict[str, dict[str, Any]], baseline: str, metric: Mapping[str, Any] | None) -> Verdict:
    """Put each method beside the baseline; returns the paragraph and the method that it advises."""
    failed = [method_name(name) for name, entry in entries.items() if entry["failed"] and not entry["runs"]]
    for entry in entries.values():
        entry["judgement"] = None
    if metric is None or not entries[baseline]["runs"]:
        why = "no run of it is finished" if metric is not None else "nothing was evaluated"
        return Verdict(f"No verdict: everything is judged against {method_name(baseline)}, and {why}.", None)
    named = Metric(metric["name"], metric["lower_is_better"])
    found = {n: _standing(n, e, entries[baseline], metric) for n, e in entries.items() if e["runs"]}
    first = found.pop(baseline)
    for name, standing in found.items():
        ratios = {"memory_ratio": standing.memory, "time_ratio": standing.time}
        entries[name]["judgement"] = vars(judge(standing, first, named)) | ratios
    return verdict(first, list(found.values()), named, failed)


def _standing(
    name: str, entry: Mapping[str, Any], baseline: Mapping[str, Any], metric: Mapping[str, Any]
) -> Standing:
    kept, reference = (
        one["figures"]["memory"]["saved_activation_bytes"]["mean"] for one in (entry, baseline)
    )
    time = (entry["timing"] or {}).get("budget_ratio")
    values = entry["figures"]["evaluation"][metric["split"]][metric["name"]]["values"]
    return Standing(name, method_name(name), values, kept / reference if kept and reference else None, time)
