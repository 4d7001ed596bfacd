"""What the figures of `metrics.json` mean: rows with a label, a value and a note, for terminal and page.

Any key may be missing or null: it is shown as "–". Nothing here knows about rich or HTML.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from leantune.report.formats import (
    MISSING,
    format_bytes,
    format_count,
    format_metric,
    format_seconds,
    format_share,
    headline_metric,
    is_finite,
    metric_name,
)

_PEAK_KINDS = {
    "cuda_allocated": "on the GPU, as allocated",
    "cpu_rss": "of the whole process, resident",
}
_SPLITS_BY_WORTH = ("test", "validation", "train")


class Fact(NamedTuple):
    """One figure of a run."""

    label: str
    value: str
    note: str = ""


def section(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The mapping under `name`; empty where it is missing, null or something else."""
    value = metrics.get(name)
    return value if isinstance(value, dict) else {}


def _share(part: Any, whole: Any) -> str:
    """A part of a whole in percent where both are known, else nothing."""
    return format_share(part / whole) if is_finite(part) and is_finite(whole) and whole else ""


def headline_split(evaluation: Mapping[str, Any]) -> str | None:
    """The split whose figures count most: test, else validation, else whatever was evaluated."""
    splits = [*(s for s in _SPLITS_BY_WORTH if s in evaluation), *evaluation]
    return next((s for s in splits if headline_metric(evaluation[s])), None)


def score(metrics: Mapping[str, Any]) -> Fact:
    """The one figure that says how good the model became."""
    evaluation = section(metrics, "evaluation")
    split = headline_split(evaluation)
    if split is None:
        return Fact("Result", MISSING, "not evaluated")
    name = headline_metric(evaluation[split])
    assert name is not None
    return Fact(metric_name(name), format_metric(name, evaluation[split][name]), f"on {split}")


def costs(metrics: Mapping[str, Any]) -> list[Fact]:
    """What the result cost: parameters, memory, time and the size of what is kept."""
    parameters, memory = section(metrics, "parameters"), section(metrics, "memory")
    speed = section(metrics, "speed")
    trained = parameters.get("trainable_end")
    if trained is None:
        trained = parameters.get("trainable_start")
    share, total = _share(trained, parameters.get("total")), format_count(parameters.get("total"))
    step, adapter = speed.get("step_seconds_median"), metrics.get("adapter_bytes")
    return [
        Fact("Trained parameters", format_count(trained), f"{share} of {total}" if share else ""),
        Fact("Peak memory", format_bytes(memory.get("peak_bytes")), _peak_kind(memory)),
        Fact(
            "Training time",
            format_seconds(speed.get("train_seconds")),
            f"{format_seconds(step)} a step" if is_finite(step) else "",
        ),
        Fact("Saved weights", format_bytes(adapter), _saved_note(metrics)),
    ]


def _saved_note(metrics: Mapping[str, Any]) -> str:
    """What the saved weights are: full fine-tuning saves a whole model, everything else a small addition."""
    if not metrics.get("adapter_bytes"):
        return ""
    return "a whole model" if metrics.get("method") in {"full", "none"} else "beside the unchanged base"


def _peak_kind(memory: Mapping[str, Any]) -> str:
    kind = memory.get("peak_kind")
    return "" if kind is None else _PEAK_KINDS.get(str(kind), str(kind))


def parameter_facts(metrics: Mapping[str, Any]) -> list[Fact]:
    """How many parameters there are, are trained and are gone."""
    p = section(metrics, "parameters")
    total, start, end, head = (p.get(k) for k in ("total", "trainable_start", "trainable_end", "head"))
    rows = [
        Fact("In the model", format_count(total)),
        Fact("Trained at the start", format_count(start), _share(start, total)),
        Fact("Trained at the end", format_count(end), _share(end, total)),
    ]
    if head is not None:
        rows.append(Fact("of these in the task head", format_count(head)))
    if p.get("quantized"):
        rows.append(Fact("Held quantised", format_count(p["quantized"]), _share(p["quantized"], total)))
    rows.append(Fact("Removed from the base", format_share(p.get("base_removed_fraction"))))
    return rows


def memory_facts(metrics: Mapping[str, Any]) -> list[Fact]:
    """What the run held in memory and leaves on disk."""
    memory = section(metrics, "memory")
    forecast = [] if memory.get("forecast_peak_bytes") is None else [_forecast(memory)]
    return [
        Fact(
            "Kept for backward", format_bytes(memory.get("saved_activation_bytes")), "one step's activations"
        ),
        Fact("Peak", format_bytes(memory.get("peak_bytes")), _peak_kind(memory)),
        *forecast,
        Fact("Saved weights", format_bytes(metrics.get("adapter_bytes")), _saved_note(metrics)),
    ]


def _forecast(memory: Mapping[str, Any]) -> Fact:
    """The forecast of tensors beside what it can be compared with: on a CPU, what the model's run added."""
    value: Any = memory["forecast_peak_bytes"]
    peak: Any = memory.get("peak_bytes")
    before: Any = memory.get("process_bytes_before_model")
    note = "of tensors"
    if memory.get("peak_kind") == "cpu_rss" and is_finite(peak) and is_finite(before):
        note += f"; the process grew by {format_bytes(peak - before)} from {format_bytes(before)}"
    return Fact("Forecast", format_bytes(value), note)


def speed_facts(metrics: Mapping[str, Any]) -> list[Fact]:
    """How long the run took."""
    speed = section(metrics, "speed")
    rate, estimate = speed.get("tokens_per_second"), speed.get("estimate_seconds")
    rows = [
        Fact("Training", format_seconds(speed.get("train_seconds"))),
        Fact("One step", format_seconds(speed.get("step_seconds_median")), "median"),
        Fact("Tokens a second", format_count(rate), "padding left out" if is_finite(rate) else ""),
    ]
    if skipped := metrics.get("skipped_steps"):
        rows.append(Fact("Skipped steps", format_count(skipped), "loss or gradient was not finite"))
    if estimate:
        rows.insert(0, Fact("Estimation", format_seconds(estimate), "masks, before pruning"))
    return rows
