"""`compare.html`: many methods on one recipe, on one self-contained page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from leantune.errors import UserError
from leantune.report import facts
from leantune.report.comparison_curves import curve_plots
from leantune.report.comparison_rows import (
    COLUMNS,
    comparison_rows,
    metric_values,
    score_column,
    seed_table,
)
from leantune.report.formats import (
    format_bytes,
    format_metric,
    format_rate,
    format_seconds,
    is_finite,
    method_name,
    metric_name,
)
from leantune.report.page import flat_facts, render, write_page
from leantune.report.plots import Plot
from leantune.report.pruning import read_pruning
from leantune.report.trade_off import Mark, trade_off_plot


def write_comparison(folder: Path) -> Path:
    """Write `compare.html` of the comparison in `folder`; an older one is replaced as a whole or not at all.

    Returns:
        The path of the page.

    Raises:
        UserError: There is no readable `compare.json`.
    """
    file = Path(folder) / "compare.json"
    try:
        comparison = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no comparison: {file.name} is missing") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    return write_page(Path(folder) / "compare.html", render_comparison(comparison, Path(folder)))


def render_comparison(comparison: Mapping[str, Any], folder: Path) -> str:
    """The page as HTML.

    Args:
        comparison: The content of `compare.json`.
        folder: With the runs, whose pruning plans are shown.
    """
    return render(
        "compare.html.j2",
        title=folder.resolve().name,
        about=_about(comparison),
        verdict=_sentences(comparison["verdict"]),
        remarks=_remarks(comparison),
        baseline=method_name(comparison["baseline"]),
        advice=comparison["advice"],
        score_column=score_column(comparison),
        columns=[score_column(comparison), *COLUMNS],
        rows=comparison_rows(comparison),
        notes=_notes(comparison),
        plots=_trade_offs(comparison),
        curves=curve_plots(comparison),
        curves_of=_curves_of(comparison),
        pruned=_pruned(comparison, folder),
        settings=_settings(comparison),
        seeds=comparison["seeds"],
        by_seed=_by_seed(comparison, folder),
        command=comparison["command"],
        recipe=_yaml(comparison["recipe"]),
        versions=flat_facts(facts.section(comparison, "versions")),
        hardware=flat_facts(facts.section(comparison, "hardware")),
    )


def _about(comparison: Mapping[str, Any]) -> dict[str, str]:
    """The words of the sentence under the title."""
    methods, seeds = len(comparison["methods"]), len(comparison["seeds"])
    return {
        "methods": "one method" if methods == 1 else f"{methods} methods",
        "model": str(comparison["recipe"]["model"]["path"]),
        "data": str(comparison["recipe"]["data"]["path"]),
        "seeds": "one seed" if seeds == 1 else f"{seeds} seeds",
        "steps": f"{comparison['budget_steps']:,} steps each",
    }


def _sentences(text: str) -> list[str]:
    """The verdict's sentences: the first is the answer."""
    return re.split(r"(?<=\.) (?=[A-Z])", text)


def _remarks(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the figures."""
    remarks, runs = [], comparison["runs"]
    done = sum("metrics" in run for run in runs)
    failed = [run for run in runs if "failed" in run]
    if pending := len(runs) - done - len(failed):
        remarks.append(f"Not complete: {pending} of {len(runs)} runs are still to be done.")
    by_reason: dict[tuple[str, str], list[str]] = {}
    for run in failed:
        by_reason.setdefault((run["method"], run["failed"]), []).append(str(run["seed"]))
    for (method, reason), seeds in by_reason.items():
        which = "seed" if len(seeds) == 1 else "seeds"
        remarks.append(f"{method_name(method)} failed, {which} {', '.join(seeds)}: {reason}")
    for name, entry in comparison["methods"].items():
        if why := (entry["timing"] or {}).get("failed"):
            remarks.append(f"{method_name(name)} could not be timed: {why}")
    timing = comparison["timing"]
    if timing is None and done:
        remarks.append("Steps are not timed yet.")
    elif timing and not timing["interleaved"]:
        remarks.append(
            "The models do not fit into memory together: they were timed one after the other, so what else "
            "the machine did meanwhile is in the ratios."
        )
    return remarks


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    """How the figures came about."""
    notes = []
    if len(comparison["seeds"]) > 1:
        notes.append(
            "± is the sample standard deviation over the seeds. Noise is twice the pooled standard error of "
            "the difference of two means; it says nothing of how the rows of the split were chosen."
        )
    notes.append(
        f"Every method has the same {comparison['budget_steps']:,} optimizer steps. Where a first stage "
        f"estimates what to prune, its steps are of these, and the second stage is shorter."
    )
    if timing := comparison["timing"]:
        how = "turn by turn in one process, on the same batches" if timing["interleaved"] else "one by one"
        notes.append(
            f"Step and inference are medians of {timing['rounds']} rounds of {timing['batch_size']} rows, "
            f"all methods {how}; ratios are taken within a round. Inference is of the model as it was "
            f"trained: nothing is merged."
        )
    notes.append(
        "Kept for backward is what autograd holds after the forward pass of a step: the same on every "
        "machine. Trained is at the end of the run, without the task head."
    )
    return notes


def _trade_offs(comparison: Mapping[str, Any]) -> list[Plot]:
    """Quality against memory and against time."""
    costs: dict[str, tuple[str, Callable[[Any], str], Callable[[Mapping[str, Any]], float | None]]] = {
        "memory": ("activations kept by a step", format_bytes, _kept),
        "time": ("a step, estimation shared out", format_seconds, partial(_pace, comparison)),
    }
    metric, plots = comparison["metric"], []
    for what, (axis, show, read) in costs.items():
        marks = []
        for key, entry in comparison["methods"].items():
            values = metric_values(entry, comparison)
            cost = read(entry) if values else None
            if cost is not None and is_finite(cost):
                marks.append(Mark(method_name(key), cost, values, _role(key, comparison)))
        if marks:
            title = f"{metric_name(metric['name'])} against {what}"
            quality = partial(format_metric, metric["name"])
            plots.append(
                trade_off_plot(
                    title, marks, cost=axis, show_cost=show, show_quality=quality,
                    lower_is_better=metric["lower_is_better"], base=1024 if what == "memory" else 1000,
                )
            )  # fmt: skip
    return plots


def _kept(entry: Mapping[str, Any]) -> float | None:
    return entry["figures"]["memory"]["saved_activation_bytes"]["mean"]


def _pace(comparison: Mapping[str, Any], entry: Mapping[str, Any]) -> float | None:
    seconds = (entry["timing"] or {}).get("budget_seconds")
    return None if seconds is None else seconds / comparison["budget_steps"]


def _role(key: str, comparison: Mapping[str, Any]) -> str:
    """The baseline has one colour on the whole page."""
    if key == comparison["baseline"]:
        return "second"
    return "first" if key == comparison["advice"] else "ink"


def _curves_of(comparison: Mapping[str, Any]) -> str:
    curves = comparison["curves"]
    if not curves:
        return ""
    if curves["split"] == "training":
        return "Training loss, smoothed; estimation's steps come first."
    return f"{metric_name(curves['name'])} on validation; estimation's steps are counted."


def _pruned(comparison: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What each pruned method's first finished run cut."""
    found = []
    for key in comparison["methods"]:
        done = [run for run in comparison["runs"] if run["method"] == key and "metrics" in run]
        pruning = read_pruning(folder / done[0]["folder"]) if done else {}
        if pruning:
            found.append({"name": method_name(key), "seed": done[0]["seed"], "pruning": pruning})
    return found


def _settings(comparison: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for key, entry in comparison["methods"].items():
        steps = entry["steps"]
        first = f"{steps['estimation']:,} + " if steps["estimation"] else ""
        rows.append(
            {
                "name": method_name(key),
                "what": entry["what"],
                "settings": brief(entry["settings"]),
                "rate": format_rate(entry["learning_rate"]),
                "source": entry["learning_rate_source"],
                "steps": f"{first}{steps['training']:,}",
            }
        )
    return rows


def brief(settings: Mapping[str, Any]) -> str:
    """A method's settings in a line: what somebody would want to change."""
    lean, train = settings["lean"], settings["train"]
    parts = []
    if lean["adapter"]["type"] != "none":
        parts.append(f"{lean['adapter']['type']} r {lean['adapter']['r']}")
    if lean["prune"]:
        shares = ((what, lean["prune"][what]) for what in ("heads", "neurons", "modules", "ranks"))
        parts.append("prune " + ", ".join(f"{what} {share}" for what, share in shares if share))
    if lean["tokens"]:
        parts.append(f"keep {lean['tokens']['keep']} of tokens, {lean['tokens']['strategy']}")
    parts += [f"{key.replace('_', ' ')} {str(value).lower()}" for key, value in train.items()]
    return "; ".join(parts)


def _by_seed(comparison: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The metric run by run, with the way to each run's own page."""
    rows = []
    for key, cells in seed_table(comparison).items():
        runs = [run for run in comparison["runs"] if run["method"] == key]
        pages = [f"{run['folder']}/report.html" for run in runs]
        links = [page if (folder / page).is_file() else "" for page in pages]
        rows.append({"name": method_name(key), "cells": list(zip(cells, links, strict=True))})
    return rows


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).strip()
