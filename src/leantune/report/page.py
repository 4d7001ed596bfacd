"""`report.html`: one run on one self-contained page."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leantune.errors import UserError
from leantune.report import facts
from leantune.report.formats import (
    MISSING,
    format_bytes,
    format_count,
    format_metric,
    is_finite,
    is_number,
    method_name,
    metric_name,
    real_metrics,
)
from leantune.report.predictions import Verdict, read_prediction, spread, surest_mistakes
from leantune.report.pruning import read_pruning
from leantune.report.ranks import read_ranks
from leantune.report.runlog import RunLog, read_jsonl, read_log

if TYPE_CHECKING:
    from jinja2 import Environment

_SAMPLE = 12  # rows of each table of predictions


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run, as it was read from disk."""

    folder: Path
    metrics: dict[str, Any]
    log: RunLog
    recipe_text: str
    recipe: dict[str, Any]
    predictions: list[dict[str, Any]]


def read_run(run_folder: Path) -> RunRecord:
    """Read a run folder; only `metrics.json` has to be there.

    Raises:
        UserError: There is no readable `metrics.json`: the run has not finished, or this is no run folder.
    """
    run_folder = Path(run_folder)
    path = run_folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        raise UserError(f"{run_folder} holds no finished run: {path.name} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(metrics, dict):
        raise UserError(f"{path} holds a {type(metrics).__name__}, not an object with keys")
    recipe_path = run_folder / "recipe.yaml"
    recipe_text = recipe_path.read_text("utf-8", errors="replace") if recipe_path.is_file() else ""
    predictions, _ = read_jsonl(run_folder / "predictions.jsonl")
    log = read_log(run_folder / "log.jsonl")
    return RunRecord(run_folder, metrics, log, recipe_text, _parse_recipe(recipe_text), predictions)


def _parse_recipe(text: str) -> dict[str, Any]:
    """The recipe's keys; empty where it cannot be parsed (its text is shown all the same)."""
    import yaml

    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def write_report(run_folder: Path) -> Path:
    """Write `report.html` of the run in `run_folder`; an older one is replaced as a whole or not at all.

    Returns:
        The path of the page.

    Raises:
        UserError: See `read_run`.
    """
    return write_page(Path(run_folder) / "report.html", render_report(read_run(run_folder)))


def render_report(run: RunRecord) -> str:
    """The page of `run` as HTML."""
    from leantune.report.curves import run_plots

    return render("report.html.j2", title=_name(run), plots=run_plots(run.log), **_context(run))


def environment() -> Environment:
    """Templates of this package. Everything that comes from data is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    env = Environment(
        loader=PackageLoader("leantune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["glue"] = lambda text: str(text).replace(" ", "\u00a0")  # a figure and its unit on one line
    env.filters["breakable"] = lambda text: escape(text).replace("_", Markup("_<wbr>"))  # long_label_names
    return env


def render(template: str, **context: Any) -> str:
    """`template` of this package with the style sheet inlined."""
    from markupsafe import Markup

    css = files("leantune.report").joinpath("page.css").read_text(encoding="utf-8")
    return environment().get_template(template).render(css=Markup(css), **context)  # noqa: S704 our own file


def write_page(path: Path, html: str) -> Path:
    """Write `html` to `path` so that no reader ever sees half a page."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the page from everybody else
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _name(run: RunRecord) -> str:
    return run.folder.resolve().name


def _context(run: RunRecord) -> dict[str, Any]:
    metrics = run.metrics
    return {
        "about": _about(run),
        "score": facts.score(metrics),
        "costs": facts.costs(metrics),
        "remarks": _remarks(run.log),
        "pruning": read_pruning(run.folder),
        "ranks": read_ranks(run.folder),
        "tables": {
            "Parameters": facts.parameter_facts(metrics),
            "Memory": facts.memory_facts(metrics),
            "Time": facts.speed_facts(metrics),
        },
        "evaluation": _evaluation(metrics),
        "predictions": _predictions(run),
        "recipe": run.recipe_text.strip(),
        "command": _command(run),
        "versions": flat_facts(facts.section(metrics, "versions")),
        "hardware": flat_facts(facts.section(metrics, "hardware")),
    }


def _about(run: RunRecord) -> dict[str, str]:
    """The words of the sentence under the title."""
    data, seed, log = facts.section(run.recipe, "data"), run.metrics.get("seed"), run.log
    length = f"{log.last_step:,} steps" if log.last_step else ""
    if length and log.epochs:
        length += f", {log.epochs:.3g} epoch" + ("" if log.epochs == 1 else "s")
    return {
        "model": str(run.metrics.get("model") or MISSING),
        "method": method_name(run.metrics.get("method")),
        "data": str(data.get("path") or ""),
        "length": length,
        "seed": "" if seed is None else f"seed {seed}",
    }


def _remarks(log: RunLog) -> list[str]:
    """What a reader must know before trusting the figures."""
    remarks = []
    if bad := log.not_finite:
        count = "one step" if len(bad) == 1 else f"{len(bad):,} steps"
        remarks.append(f"The loss of {count} was not a finite number, first at step {bad[0]:,}.")
    if log.unreadable:
        lines = "One line" if log.unreadable == 1 else f"{log.unreadable:,} lines"
        remarks.append(
            f"{lines} of log.jsonl could not be read and {'is' if log.unreadable == 1 else 'are'} left out."
        )
    return remarks


def _evaluation(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the metrics, and their values as text for each split."""
    splits = {split: real_metrics(values) for split, values in facts.section(metrics, "evaluation").items()}
    names = list(dict.fromkeys(name for values in splits.values() for name in values))
    rows = {s: [format_metric(n, values.get(n)) for n in names] for s, values in splits.items()}
    return {"names": [metric_name(name) for name in names], "rows": rows}


def _predictions(run: RunRecord) -> list[dict[str, Any]]:
    """Tables of predictions: a fair sample, and the mistakes that the model was surest of."""
    task = facts.section(run.recipe, "model").get("task")
    sample = spread(run.predictions, _SAMPLE)
    mistakes = surest_mistakes(run.predictions, _SAMPLE, task) if len(run.predictions) > _SAMPLE else []
    whole = len(sample) == len(run.predictions)
    tables = [
        ("A sample" if whole else f"A sample: {_SAMPLE} of {len(run.predictions):,}, evenly spaced", sample),
        ("Mistakes it was surest of", mistakes),
    ]
    return [_prediction_table(title, rows, task) for title, rows in tables if rows]


def _prediction_table(title: str, rows: list[Mapping[str, Any]], task: str | None) -> dict[str, Any]:
    shown = [read_prediction(row, task) for row in rows]
    return {
        "title": title,
        "rows": shown,
        "marked": any(row.verdict is not Verdict.OPEN for row in shown),
        "labelled": any(row.label for row in shown),
        "scored": any(row.score for row in shown),
    }


def _command(run: RunRecord) -> str:
    """The command that repeats the run from its resolved recipe, beside the original."""
    if not run.recipe_text:
        return ""
    folder = run.folder.as_posix()
    return f"leantune train {shlex.quote(folder + '/recipe.yaml')} {shlex.quote(f'output={folder}-again')}"


def flat_facts(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys as one list of names and texts; sizes and counts in readable units."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flat_facts(value, f"{name} ")
        elif name.endswith("bytes") and is_finite(value):
            flat[name.removesuffix("bytes").strip("_ ") or name] = format_bytes(value)
        elif is_number(value):
            flat[name.replace("_", " ")] = format_count(value) if isinstance(value, int) else f"{value:g}"
        elif isinstance(value, list):
            flat[name.replace("_", " ")] = ", ".join(map(str, value)) or MISSING
        else:
            flat[name.replace("_", " ")] = MISSING if value is None else str(value)
    return flat
