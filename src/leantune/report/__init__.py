"""Tables for the terminal, plots, and the self-contained `report.html` of a run.

Pure data in, text or HTML out: nothing here imports torch, and matplotlib and jinja2 are loaded only when a
page is written.
"""

from leantune.report.formats import (
    format_bytes,
    format_count,
    format_metric,
    format_seconds,
    format_share,
    lower_is_better,
    method_name,
)
from leantune.report.page import RunRecord, read_run, render_report, write_report
from leantune.report.tables import metrics_table, predictions_table, summary_table

__all__ = [
    "RunRecord",
    "format_bytes",
    "format_count",
    "format_metric",
    "format_seconds",
    "format_share",
    "lower_is_better",
    "method_name",
    "metrics_table",
    "predictions_table",
    "read_run",
    "render_report",
    "summary_table",
    "write_report",
]
