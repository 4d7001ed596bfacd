"""Tables for the terminal, as rich renderables: what a person sees after `leantune train`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from leantune.report import facts
from leantune.report.formats import MISSING, format_metric, metric_name, real_metrics
from leantune.report.predictions import Verdict, read_prediction

_RULES = box.SIMPLE_HEAD
_MARKS = {
    Verdict.RIGHT: Text("✓", style="green"),
    Verdict.WRONG: Text("✗", style="red"),
    Verdict.OPEN: Text(""),
}


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """Parameters, memory and time of one run.

    Args:
        metrics: The content of `metrics.json`; any value may be null or missing and is shown as "–".
    """
    table = Table(box=_RULES, show_header=False, pad_edge=False)
    table.add_column("what")
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("note", style="dim")
    groups = {
        "Parameters": facts.parameter_facts(metrics),
        "Memory": facts.memory_facts(metrics),
        "Time": facts.speed_facts(metrics),
    }
    for index, (name, rows) in enumerate(groups.items()):
        if index:
            table.add_section()
        table.add_row(Text(name, style="bold"), "", "")
        for row in rows:
            # Text, not str: rich would read [brackets] in a string as markup
            table.add_row(Text(f"  {row.label}"), Text(row.value), Text(row.note))
    return table


def metrics_table(evaluation: Mapping[str, Any]) -> Table:
    """Splits down, metrics across.

    Args:
        evaluation: split → metric → value, as under `evaluation` in `metrics.json`.
    """
    splits = {split: real_metrics(values) for split, values in evaluation.items()}
    names = list(dict.fromkeys(name for values in splits.values() for name in values))
    table = Table(box=_RULES, header_style="dim", pad_edge=False)
    table.add_column("Split")
    for name in names:
        table.add_column(Text(metric_name(name)), justify="right", no_wrap=True)
    for split, values in splits.items():
        cells = [Text(format_metric(name, values[name]) if name in values else MISSING) for name in names]
        table.add_row(Text(str(split)), *cells)
    return table


def predictions_table(rows: Iterable[Mapping[str, Any]], *, task: str | None = None) -> Table:
    """Inputs beside what the model said, with a mark where right and wrong can be told.

    Args:
        rows: As in `predictions.jsonl`: `input`, `predicted`, optionally `label` and `score`.
        task: The recipe's task. Generated text (`causal-lm`, `seq2seq`) gets no marks: a different wording is
            not an error.
    """
    read = [read_prediction(row, task) for row in rows]
    marked = any(row.verdict is not Verdict.OPEN for row in read)
    labelled, scored = any(row.label for row in read), any(row.score for row in read)
    columns = [*([""] if marked else []), "Input", "Predicted"]
    columns += [*(["Label"] if labelled else []), *(["Score"] if scored else [])]
    table = Table(box=_RULES, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column == "Score" else "left", overflow="fold")
    for row in read:
        cells = [_MARKS[row.verdict]] if marked else []
        cells += [Text(row.input), Text(row.predicted)]
        cells += [Text(row.label)] if labelled else []
        cells += [Text(row.score)] if scored else []
        table.add_row(*cells)
    return table
