"""Numbers as people read them. One place, used by the terminal tables and by the page alike."""

from __future__ import annotations

import bisect
import math
import re
from typing import Any

MISSING = "–"

# Metrics that lie in 0..1 and are read in percent have one of these words in their name.
_SCORES = {"accuracy", "f1", "precision", "recall", "match", "auc", "rouge", "rouge1", "rouge2", "rougel"}
_LOWER_IS_BETTER = {"loss", "perplexity", "mse", "rmse", "mae", "error"}
# What a reader wants first of several metrics; whatever is not named comes before the loss.
_HEADLINE_ORDER = ("accuracy", "exact_match", "f1", "macro_f1", "matthews_correlation", "pearson", "spearman")
_CAPITALS = {"f1": "F1", "auc": "AUC", "mse": "MSE", "rmse": "RMSE", "mae": "MAE", "bleu": "BLEU"}
_SPANS = (
    (3600, (60, "min"), (1, "s")),
    (86_400, (3600, "h"), (60, "min")),
    (math.inf, (86_400, "d"), (3600, "h")),
)
# Book-keeping that trainers write between the metrics.
_NOT_METRICS = {"step", "epoch", "evaluation", "runtime", "samples_per_second", "steps_per_second"}

_METHODS = {
    "lamda": "LaMDA",
    "lamda++": "LaMDA++",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "vera": "VeRA",
    "lora-fa": "LoRA-FA",
    "full": "full fine-tuning",
    "none": "full fine-tuning",
    "tokentune": "TokenTune",
    "light-peft": "Light-PEFT",
    "bottleneck": "Adapter",
    "ckpt": "checkpointing",
    "nf4": "NF4 base",
    "fp4": "FP4 base",
    "int8": "8-bit base",
    "int8-torchao": "8-bit base (torchao)",
}


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float (a bool is neither; NaN and infinity are)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that is neither NaN nor infinite."""
    return is_number(value) and math.isfinite(value)


def _odd(value: Any) -> str:
    """What to show for something that is no finite number: absent, or said as it is."""
    if value is None:
        return MISSING
    if is_number(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "−infinite")
    return str(value)


def _significant(value: float, digits: int = 3) -> str:
    """`value` with about three digits, never in scientific notation: 6.74, 22.7, 412."""
    rounded = float(f"{value:.{digits}g}")  # first: 0.9997 becomes 1.00, not 1.000
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded)))) if rounded else 0
    return f"{value:,.{places}f}".replace("-", "−")


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    """`value` in the largest of `units` (each `base` times the one before) that keeps it at one or more."""
    unit = 0
    # 999.7 would be shown as "1,000" of its unit: the next one says it better
    while abs(value) >= base - 0.5 and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    return f"{_significant(value)} {units[unit]}".rstrip()


def format_count(value: Any) -> str:
    """A count of things: 8,064 · 147 k · 22.7 M · 6.74 B."""
    if not is_finite(value):
        return _odd(value)
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    return _scaled(value, 1000, ("", "k", "M", "B", "T"))


def format_bytes(value: Any) -> str:
    """A size in binary units: 412 B · 35.2 KiB · 1.21 GiB."""
    if not is_finite(value):
        return _odd(value)
    if abs(value) < 1024:
        return f"{value:.0f} B"
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_seconds(value: Any) -> str:
    """A duration: 12.3 ms · 4.56 s · 3 min 20 s · 1 h 2 min · 2 d 3 h."""
    if not is_finite(value):
        return _odd(value)
    if value < 0.9995:
        return f"{_significant(value * 1000)} ms"
    if value < 59.95:
        return f"{_significant(value)} s"
    limits = [limit for limit, *_ in _SPANS]
    # rounded first: 3,599.7 seconds are an hour, not 59 min 60 s
    _, (big, unit), (small, subunit) = _SPANS[bisect.bisect_right(limits, round(value))]
    whole, rest = divmod(round(value / small) * small, big)
    return f"{whole} {unit} {rest // small} {subunit}" if rest else f"{whole} {unit}"


def format_share(value: Any) -> str:
    """A fraction of a whole, in percent: 12 % · 0.65 % · < 0.01 %."""
    if not is_finite(value):
        return _odd(value)
    percent = 100 * value
    if percent in (0, 100):
        return f"{percent:.0f} %"
    if 99.99 < percent < 100:
        return "> 99.99 %"
    if 0 < percent < 0.01:
        return "< 0.01 %"
    # 99.97 % must not read as all of it
    return f"{percent:.1f} %" if percent < 99.95 and percent >= 1 else f"{percent:.2f} %"


def format_rate(value: Any) -> str:
    """A small positive setting such as a learning rate: 5e-4 · 0.01."""
    if not is_finite(value):
        return _odd(value)
    if value and abs(value) < 0.01:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.3g}"


def format_metric(name: str, value: Any) -> str:
    """The value of metric `name`: scores in percent, everything else with three digits or four places."""
    if not is_finite(value):
        return _odd(value)
    if is_score(name) and 0 <= value <= 1:
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return format_count(value)
    return f"{value:.3f}".replace("-", "−") if abs(value) < 10 else _significant(value)


def is_score(name: str) -> bool:
    """Whether metric `name` lies in 0..1 and is read in percent."""
    return not _SCORES.isdisjoint(name.lower().split("_"))


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of metric `name` is the better one."""
    return not _LOWER_IS_BETTER.isdisjoint(name.lower().split("_"))


def metric_name(name: str) -> str:
    """Metric `name` as a person writes it: "f1_macro" → "F1 macro"."""
    words = [_CAPITALS.get(word, word) for word in name.replace("-", "_").split("_")]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def method_name(method: Any) -> str:
    """A method, or several joined by "+", as their papers write them: "lamda+lean" → "LaMDA + lean"."""
    if method is None:
        return MISSING
    if isinstance(method, (list, tuple)):
        return " + ".join(method_name(each) for each in method)
    if str(method) in _METHODS:
        return _METHODS[str(method)]
    return " + ".join(
        _METHODS.get(part.strip(), part.strip()) for part in re.split(r"\+(?=[^+])", str(method))
    )


def real_metrics(values: Any) -> dict[str, Any]:
    """The metrics among `values`, the trainer's book-keeping (steps, run times) left out."""
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if name not in _NOT_METRICS}


def headline_metric(values: Any) -> str | None:
    """The metric among `values` that a reader wants first; None where there is none."""
    present = [name for name, value in real_metrics(values).items() if is_number(value)]
    for name in _HEADLINE_ORDER:
        if name in present:
            return name
    return next((name for name in present if name != "loss"), "loss" if "loss" in present else None)
