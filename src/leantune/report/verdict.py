"""What the figures of a comparison say, in words: rules on plain numbers, tested alone.

Against the baseline a method is judged twice. Quality: as good, where the means differ by no more than twice
the pooled standard error of their difference; else better or worse; open, where either has a single seed.
Cost: cheaper, where it takes less memory or time and no more of the other; dearer the other way round; a
trade, where it takes less of one for more of the other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from leantune.report.formats import is_score, metric_name

Quality = Literal["better", "as good", "worse", "open"]
Cost = Literal["cheaper", "dearer", "even", "trade", "unknown"]

WITHIN = 2.0  # standard errors
SAME_COST = 0.05  # ratios this close to 1 are one


@dataclass(frozen=True)
class Standing:
    """A method's figures.

    Attributes:
        key: The method's name as typed.
        name: And as the page writes it.
        values: The metric, one a seed.
        memory: Activation bytes kept by a step, over the baseline's; None: not known.
        time: Seconds of the whole budget of steps, over the baseline's; None: not known.
    """

    key: str
    name: str
    values: Sequence[float]
    memory: float | None = None
    time: float | None = None


@dataclass(frozen=True)
class Metric:
    """What `values` are."""

    name: str
    lower_is_better: bool = False

    def amount(self, difference: float) -> str:
        """A difference without its sign: in points, or in the metric's own unit."""
        if is_score(self.name):
            return f"{100 * abs(difference):.1f} points"
        return f"{abs(difference):.3g} in {metric_name(self.name).lower()}"


@dataclass(frozen=True)
class Judgement:
    """A method beside the baseline.

    Attributes:
        quality: See the module.
        cost: See the module.
        difference: Of the means; above 0 the method is better.
        error: Pooled standard error of the difference; None with a single seed.
        says: Both in a few words.
    """

    quality: Quality
    cost: Cost
    difference: float
    error: float | None
    says: str


@dataclass(frozen=True)
class Verdict:
    """The paragraph, and the key of the method that it advises to take (None: no advice)."""

    text: str
    advice: str | None


def judge(method: Standing, baseline: Standing, metric: Metric) -> Judgement:
    """Put a method beside the baseline. Both have at least one value."""
    difference = statistics.mean(method.values) - statistics.mean(baseline.values)
    if metric.lower_is_better:
        difference = -difference
    error = standard_error(method.values, baseline.values)
    quality, cost = _quality(difference, error), cost_of(method.memory, method.time)
    by = metric.amount(difference)
    if quality == "open":
        by = f"{by} {'above' if difference > 0 else 'below'}"
    less, more = ("memory", "time") if (method.memory or 1) < 1 else ("time", "memory")
    says = _says(quality, cost, by, f"less {less} for more {more}")
    return Judgement(quality, cost, difference, error, says)


def standard_error(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Of the difference of two means, from their pooled variance; None where either is of one value."""
    if min(len(one), len(other)) < 2:
        return None
    freedom = len(one) + len(other) - 2
    squares = (len(one) - 1) * statistics.variance(one) + (len(other) - 1) * statistics.variance(other)
    return math.sqrt(squares / freedom * (1 / len(one) + 1 / len(other)))


def _quality(difference: float, error: float | None) -> Quality:
    if error is None:
        return "open"
    # a rounding error above twice nothing is nothing
    if abs(difference) <= WITHIN * error + 1e-12:
        return "as good"
    return "better" if difference > 0 else "worse"


def cost_of(memory: float | None, time: float | None) -> Cost:
    """Both ratios in one word."""
    known = [_side(ratio) for ratio in (memory, time) if ratio is not None]
    if not known:
        return "unknown"
    if min(known) < 0 < max(known):
        return "trade"
    return "cheaper" if min(known) < 0 else "dearer" if max(known) > 0 else "even"


def _side(ratio: float) -> int:
    return -1 if ratio < 1 - SAME_COST else int(ratio > 1 + SAME_COST)


def _says(quality: Quality, cost: Cost, by: str, trade: str) -> str:
    """The judgement in a few words; `by` is the difference, `trade` what is paid with what."""
    price = trade if cost == "trade" else {"even": "", "unknown": ""}.get(cost, cost)
    if quality == "as good":
        words = {"cheaper": "cheaper and as good", "dearer": "within noise, but dearer"}
        return words.get(cost, _listed("within noise", price))
    if quality == "worse":
        return f"cheaper but worse by {by}" if cost == "cheaper" else f"worse by {by}"
    if quality == "better":
        return f"cheaper and better by {by}" if cost == "cheaper" else _listed(f"better by {by}", price)
    return _listed(price, f"{by}, one seed")


def _listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def ratios(method: Standing) -> str:
    """Memory and time in words: "0.35× the memory, 0.60× the time"; empty where neither is known."""
    parts = [("memory", method.memory), ("time", method.time)]
    return " and ".join(f"{ratio:.2f}× the {what}" for what, ratio in parts if ratio is not None)


def expense(method: Standing) -> float:
    """One number to rank by: the geometric mean of the ratios that are known."""
    known = [ratio for ratio in (method.memory, method.time) if ratio is not None]
    return math.prod(known) ** (1 / len(known)) if known else math.inf


def verdict(
    baseline: Standing, others: Sequence[Standing], metric: Metric, failed: Sequence[str] = ()
) -> Verdict:
    """The paragraph at the top: which one to take, what else there is, and how far to trust it.

    Args:
        baseline: What the others are judged against.
        others: Every other method that has figures.
        metric: Of the values.
        failed: Names of methods without figures.
    """
    judged = [(one, judge(one, baseline, metric)) for one in others]
    advice: Standing | None = None
    if not judged:
        sentences = [f"{baseline.name} stands alone: there is nothing to compare it with."]
    elif all(judgement.quality == "open" for _, judgement in judged):
        sentences = _one_seed(baseline, judged, metric)
    else:
        advice, sentences = _choice(baseline, judged, metric)
    if failed:
        sentences.append(f"Failed: {', '.join(failed)}.")
    return Verdict(" ".join(sentences), None if advice is None else advice.key)


Judged = Sequence[tuple[Standing, Judgement]]


def _choice(baseline: Standing, judged: Judged, metric: Metric) -> tuple[Standing, list[str]]:
    """Take the cheapest that is no worse; then the best, if that is another; then what is cheaper still."""
    good = [(one, j) for one, j in judged if j.cost == "cheaper" and j.quality in ("as good", "better")]
    if good:
        taken, judgement = min(good, key=lambda pair: expense(pair[0]))
        said = [f"Take {taken.name}: {_quality_words(judgement, baseline, metric)}, at {ratios(taken)}."]
    else:
        taken = baseline
        said = [f"Stay with {baseline.name}: nothing that is cheaper is as good."]
    better = [(one, j) for one, j in judged if j.quality == "better" and one is not taken]
    if better:
        best, judgement = max(better, key=lambda pair: pair[1].difference)
        at = f", at {ratios(best)}" if ratios(best) else ""
        words = _quality_words(judgement, baseline, metric)
        said.append(f"Best, if cost does not count: {best.name}, {words}{at}.")
    said += _short_of_memory(taken, judged)
    limit = expense(taken) if taken is not baseline else 1.0
    cheap = [(one, j) for one, j in judged if (j.quality, j.cost) == ("worse", "cheaper")]
    cheap = [(one, j) for one, j in cheap if expense(one) < limit]
    if cheap:
        one, judgement = max(cheap, key=lambda pair: (round(pair[1].difference, 9), -expense(pair[0])))
        amount = metric.amount(judgement.difference)
        still = "Cheaper still" if taken is not baseline else "Cheaper"
        said.append(f"{still}, but worse by {amount}: {one.name}, at {ratios(one)}.")
    return taken, said


def _short_of_memory(taken: Standing, judged: Judged) -> list[str]:
    """A trade of time for memory that costs no quality, where it saves more than what is taken."""
    found = [
        one
        for one, j in judged
        if j.cost == "trade" and j.quality in ("as good", "better") and one.memory is not None
    ]
    found = [one for one in found if (one.memory or 0) < (taken.memory or 1) - SAME_COST]
    if not found:
        return []
    least = min(found, key=lambda one: one.memory or 0)
    return [f"If memory is what is short: {least.name}, no worse, at {ratios(least)}."]


def _one_seed(baseline: Standing, judged: Judged, metric: Metric) -> list[str]:
    best, judgement = max(judged, key=lambda pair: pair[1].difference)
    said = ["One seed: no statement about noise, so no advice; take three seeds or more."]
    if judgement.difference > 0:
        at = f", at {ratios(best)}" if ratios(best) else ""
        ahead = metric.amount(judgement.difference)
        said.append(f"On this one {best.name} is ahead, {ahead} above {baseline.name}{at}.")
    else:
        said.append(f"On this one nothing is ahead of {baseline.name}.")
    cheapest, judgement = min(judged, key=lambda pair: expense(pair[0]))
    if expense(cheapest) < 1 - SAME_COST and cheapest is not best:
        words = _quality_words(judgement, baseline, metric)
        said.append(f"Cheapest: {cheapest.name}, at {ratios(cheapest)}, {words}.")
    return said


def _quality_words(judgement: Judgement, baseline: Standing, metric: Metric) -> str:
    amount = metric.amount(judgement.difference)
    if judgement.error is None:
        return f"{amount} {'above' if judgement.difference > 0 else 'below'} {baseline.name}"
    if judgement.quality == "as good":
        noise = metric.amount(WITHIN * judgement.error)
        return f"as good as {baseline.name} within noise (difference {amount}, noise {noise})"
    return f"{judgement.quality} than {baseline.name} by {amount}"
