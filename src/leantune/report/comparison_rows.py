"""The table of a comparison: a row a method, for terminal and page alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from leantune.report.formats import (
    MISSING,
    format_bytes,
    format_count,
    format_metric,
    format_seconds,
    format_share,
    is_finite,
    is_score,
    method_name,
    metric_name,
)


class Cell(NamedTuple):
    """A figure, and how it stands to the baseline's ("0.35×", or a few words)."""

    value: str
    note: str = ""


class Row(NamedTuple):
    """A method's figures as text; `failure` instead of them where no run of it is finished."""

    key: str
    name: str
    says: str
    tone: str
    runs: int
    cells: dict[str, Cell]
    failure: str


COLUMNS = ("Kept for backward", "Step", "Inference", "Trained", "Removed from base", "Saved weights")


def score_column(comparison: Mapping[str, Any]) -> str:
    """What stands over the quality: "Accuracy on test"."""
    metric = comparison.get("metric")
    return f"{metric_name(metric['name'])} on {metric['split']}" if metric else "Result"


def comparison_rows(comparison: Mapping[str, Any]) -> list[Row]:
    """Rows in the order in which the methods were named.

    Args:
        comparison: The content of `compare.json`.
    """
    entries = comparison["methods"]
    baseline = entries[comparison["baseline"]]
    return [_row(key, entry, baseline, comparison) for key, entry in entries.items()]


def _row(
    key: str, entry: Mapping[str, Any], baseline: Mapping[str, Any], comparison: Mapping[str, Any]
) -> Row:
    name, figures = method_name(key), entry["figures"]
    if figures is None:
        reason = "; ".join(entry["failed"])
        return Row(key, name, "failed" if reason else "not run yet", "bad" if reason else "", 0, {}, reason)
    reference = baseline["figures"]
    cells = {score_column(comparison): Cell(spread_text(entry, comparison))}
    removed = figures["parameters"]["base_removed_fraction"]["mean"]
    cells["Kept for backward"] = _beside(figures, reference, _kept, format_bytes)
    cells |= _timing_cells(entry, key == comparison["baseline"])
    cells["Trained"] = _beside(figures, reference, _trained, format_count)
    cells["Removed from base"] = Cell(format_share(removed) if removed else MISSING)
    cells["Saved weights"] = _beside(figures, reference, _saved, format_bytes)
    says, tone = _judged(key, entry, comparison)
    return Row(key, name, says, tone, entry["runs"], cells, "; ".join(entry["failed"]))


def _judged(key: str, entry: Mapping[str, Any], comparison: Mapping[str, Any]) -> tuple[str, str]:
    if key == comparison["baseline"]:
        return "baseline", ""
    judgement = entry["judgement"]
    if judgement is None:
        return "", ""
    good = judgement["quality"] == "better" or (
        judgement["quality"] == "as good" and judgement["cost"] == "cheaper"
    )
    return judgement["says"], "good" if good else "bad" if judgement["quality"] == "worse" else ""


def _timing_cells(entry: Mapping[str, Any], alone: bool) -> dict[str, Cell]:
    timing = entry["timing"] or {}
    step, inference = (_times_text(timing.get(f"{what}_ratio")) for what in ("step", "inference"))
    if entry["steps"]["estimation"] and is_finite(timing.get("budget_ratio")):
        step += f", {_times_text(timing['budget_ratio'])} with estimation"
    return {
        "Step": Cell(format_seconds(timing.get("step_seconds")), "" if alone else step),
        "Inference": Cell(format_seconds(timing.get("inference_seconds")), "" if alone else inference),
    }


def _kept(figures: Mapping[str, Any]) -> Any:
    return figures["memory"]["saved_activation_bytes"]["mean"]


def _saved(figures: Mapping[str, Any]) -> Any:
    return figures["adapter_bytes"]["mean"]


def _trained(figures: Mapping[str, Any]) -> float:
    """Trained at the end, without the task head, which every method trains alike."""
    parameters = figures["parameters"]
    return parameters["trainable_end"]["mean"] - parameters["head"]["mean"]


def _beside(
    figures: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
    read: Callable[[Mapping[str, Any]], Any],
    show: Callable[[Any], str],
) -> Cell:
    """A figure with its ratio to the baseline's."""
    value, other = read(figures), read(reference) if reference else None
    both = is_finite(value) and is_finite(other) and other and figures is not reference
    return Cell(show(value), _times_text(value / other) if both else "")


def _times_text(ratio: Any) -> str:
    if not is_finite(ratio):
        return ""
    return f"{ratio:.2f}×" if ratio < 9.95 else f"{ratio:,.0f}×"


def metric_values(entry: Mapping[str, Any], comparison: Mapping[str, Any]) -> list[float]:
    """The metric of a method's finished runs, seed by seed; empty where there is none."""
    metric, figures = comparison.get("metric"), entry["figures"]
    if not metric or not figures:
        return []
    return figures["evaluation"].get(metric["split"], {}).get(metric["name"], {}).get("values", [])


def spread_text(entry: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """Mean ± sample standard deviation: "89.4 ± 0.5 %", "1.234 ± 0.012"."""
    values = metric_values(entry, comparison)
    if not values:
        return MISSING
    name, mean = comparison["metric"]["name"], statistics.mean(values)
    if len(values) < 2:
        return format_metric(name, mean)
    sd = statistics.stdev(values)
    if is_score(name):
        return f"{100 * mean:.1f} ± {100 * sd:.1f} %"
    return f"{format_metric(name, mean)} ± {sd:.3f}"


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """For the terminal.

    Args:
        comparison: The content of `compare.json`.
    """
    shown = {score_column(comparison): score_column(comparison).replace(" on ", ", ")}
    shown |= {"Kept for backward": "Kept", "Step": "Step", "Trained": "Trained"}
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("Method", no_wrap=True)
    for title in shown.values():
        table.add_column(Text(title), justify="right", no_wrap=True)
    table.add_column(f"Beside {method_name(comparison['baseline'])}")
    for row in comparison_rows(comparison):
        method = Text(row.key, style="bold" if row.key == comparison["advice"] else "")
        if not row.cells:
            table.add_row(method, *[MISSING] * len(shown), Text(f"{row.says}: {row.failure}", style="red"))
            continue
        cells = [_figure(row.cells[column], row.key == comparison["baseline"]) for column in shown]
        style = {"good": "green", "bad": "red"}.get(row.tone, "")
        table.add_row(method, *cells, Text(_told(row), style=style))
    return table


def _told(row: Row) -> str:
    return f"{row.says} ({row.failure})" if row.failure else row.says


def _figure(cell: Cell, whole: bool) -> Text:
    """The baseline's figures as they are, the others' as ratios to them: a terminal is narrow."""
    return Text(cell.value if whole or not cell.note else cell.note.split(",")[0])


def seed_table(comparison: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Method → the metric at each seed, as text; a failed or missing run is "failed" or "–"."""
    metric = comparison.get("metric")
    table: dict[str, Sequence[str]] = {}
    for key in comparison["methods"]:
        cells = []
        for run in comparison["runs"]:
            if run["method"] == key:
                cells.append(_seed_cell(run, metric))
        table[key] = cells
    return table


def _seed_cell(run: Mapping[str, Any], metric: Mapping[str, Any] | None) -> str:
    if "failed" in run:
        return "failed"
    if "metrics" not in run or not metric:
        return MISSING
    value = run["metrics"]["evaluation"].get(metric["split"], {}).get(metric["name"])
    return format_metric(metric["name"], value)
