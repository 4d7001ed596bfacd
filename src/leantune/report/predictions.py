"""Rows of `predictions.jsonl` as they are shown, and which of them are worth showing."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from leantune.report.formats import MISSING, is_finite, is_number

_LONGEST = 320  # characters of one text; longer ones are cut with an ellipsis
_FREE_TEXT = {"causal-lm", "seq2seq"}


class Verdict(enum.Enum):
    """Whether a prediction agrees with its label. OPEN: there is no label, or agreement is not yes or no."""

    RIGHT = "right"
    WRONG = "wrong"
    OPEN = ""


class Prediction(NamedTuple):
    """One prediction, every field ready to be shown."""

    input: str
    predicted: str
    label: str
    score: str
    verdict: Verdict


def read_prediction(row: Mapping[str, Any], task: str | None = None) -> Prediction:
    """One row of `predictions.jsonl`; missing fields become empty (`predicted`: "–")."""
    score = row.get("score")
    return Prediction(
        input=_text(row.get("input")),
        predicted=_text(row.get("predicted")) or MISSING,
        label=_text(row.get("label")),
        score=f"{score:.2f}" if is_finite(score) else "",
        verdict=_verdict(row, task),
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):  # a pair of texts
        value = " ⏐ ".join(str(part) for part in value)
    text = f"{value:.4g}" if isinstance(value, float) else str(value).strip()
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + "…"


def _verdict(row: Mapping[str, Any], task: str | None) -> Verdict:
    predicted, label = row.get("predicted"), row.get("label")
    if task in _FREE_TEXT or task == "regression" or predicted is None or label is None:
        return Verdict.OPEN
    if is_number(predicted) and isinstance(predicted, float):  # regression: near or far, not right or wrong
        return Verdict.OPEN
    return Verdict.RIGHT if predicted == label else Verdict.WRONG


def spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """At most `count` rows, evenly spaced over all of them: a fair sample, the same every time."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def surest_mistakes(
    rows: Sequence[Mapping[str, Any]], count: int, task: str | None
) -> list[Mapping[str, Any]]:
    """The wrong predictions with the highest scores: where bad labels and real gaps show up first."""
    wrong = [row for row in rows if _verdict(row, task) is Verdict.WRONG and is_finite(row.get("score"))]
    return sorted(wrong, key=lambda row: -row["score"])[:count]
