"""The terminal's tables."""

import io

import pytest
from rich.console import Console

from leantune.report import metrics_table, predictions_table, summary_table
from tests.report.runs import METRICS


def shown(renderable, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def row(text, label):
    return next(line for line in text.splitlines() if label in line)


def test_summary_says_what_was_trained_and_what_it_cost():
    text = shown(summary_table(METRICS))
    assert "22.8 M" in row(text, "In the model")
    assert "66.5 k" in row(text, "Trained at the end") and "0.29 %" in row(text, "Trained at the end")
    assert "29.6 k" in row(text, "task head")
    assert "30.0 MiB" in row(text, "Kept for backward")
    assert "1.18 GiB" in row(text, "Peak") and "whole process" in row(text, "Peak")
    assert "2 min 43 s" in row(text, "Training")
    assert "81.0 ms" in row(text, "One step")
    assert "Estimation" not in text


@pytest.mark.parametrize(
    "metrics", [{}, {"parameters": None, "memory": {"peak_bytes": None}, "speed": [], "adapter_bytes": None}]
)
def test_missing_figures_are_dashes(metrics):
    text = shown(summary_table(metrics))
    assert "–" in row(text, "In the model") and "–" in row(text, "Peak") and "–" in row(text, "One step")
    assert "None" not in text


def test_metrics_table_has_a_line_a_split():
    text = shown(
        metrics_table(METRICS["evaluation"] | {"other": {"accuracy": None, "runtime": 3.0}, "odd": None})
    )
    assert "Accuracy" in text and "Macro F1" in text and "Runtime" not in text
    assert "91.5 %" in row(text, "test") and "0.341" in row(text, "test")
    assert row(text, "other").count("–") == 3


def test_marks_only_where_right_and_wrong_can_be_told():
    rows = [
        {"input": "a", "predicted": "yes", "label": "yes", "score": 0.9},
        {"input": "b", "predicted": "no", "label": "yes", "score": 0.8},
        {"input": "c", "predicted": "no"},
    ]
    text = shown(predictions_table(rows))
    assert text.count("✓") == 1 and text.count("✗") == 1 and "0.90" in text
    assert "✗" not in shown(predictions_table(rows, task="causal-lm"))
    regression = shown(predictions_table([{"input": "a", "predicted": 1.23456789, "label": 1.5}]))
    assert "✗" not in regression and "1.235" in regression
    bare = shown(predictions_table([{"input": "a", "predicted": "b"}]))
    assert "Label" not in bare and "Score" not in bare


def test_texts_from_data_are_not_markup():
    rows = [{"input": "[bold red]x[/] [/oops]", "predicted": "[link=http://x]y", "label": "[z]"}]
    text = shown(predictions_table(rows))
    assert "[bold red]x[/] [/oops]" in text and "[link=http://x]y" in text and "[z]" in text
    assert "[b]" in shown(metrics_table({"[b]": {"[i]x[/i]": 1.0}}))


def test_long_texts_are_cut_and_fit_a_narrow_terminal():
    text = shown(predictions_table([{"input": "word " * 500, "predicted": "x" * 100}]), width=40)
    assert "…" in text and all(len(line) <= 40 for line in text.splitlines())
