"""What fits under a limit: for each method the least change that makes it fit, and how far it could go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from leantune.planner.closed import estimate
from leantune.planner.forecast import Forecast
from leantune.planner.forecaster import Forecaster, accumulation
from leantune.planner.rows import CHECKPOINTING, Changes, Row, changed
from leantune.planner.setting import Setting, Stage, is_checkpointed

# No closed form is asked for more than this.
_LARGEST = 1 << 17


@dataclass(frozen=True)
class Room:
    """How far a setting could go under the limit, the rest as it is; by the closed form.

    Attributes:
        batch: Most rows at this length.
        length: Most tokens at this batch; the model's limit is one, too.
    """

    batch: int
    length: int


@dataclass(frozen=True)
class Advice:
    """What fits.

    Attributes:
        fitting: Settings that fit, least change of the recipe first; at most one a method.
        recipes: Name of each → the recipe.
        room: Name of each → how far it could go.
    """

    fitting: tuple[Forecast, ...]
    recipes: dict[str, Any]
    room: dict[str, Room]

    @property
    def best(self) -> Forecast | None:
        """The least change."""
        return self.fitting[0] if self.fitting else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "fitting": [row.to_dict() for row in self.fitting],
            "room": {name: vars(room) for name, room in self.room.items()},
        }


def advise(
    forecasts: Sequence[Forecast], rows: Sequence[Row], base: Setting, budget: int, forecaster: Forecaster
) -> Advice:
    """Find what fits.

    Args:
        forecasts: The plan's, the recipe's own first.
        rows: What they are of.
        base: Model and batch.
        budget: Bytes for tensors, a process.
        forecaster: For settings that are not among them.
    """
    found: list[tuple[Row, Forecast]] = []
    for row, forecast in zip(rows, forecasts, strict=True):
        forecaster.announce(len(found), len(rows), f"{row.name}: what fits")
        made = None if forecast.train is None else _made_to_fit(row, forecast, base, budget, forecaster)
        if made is not None and not any(made[0].recipe == other.recipe for other, _ in found):
            found.append(made)
    order = sorted(range(len(found)), key=lambda i: (_disturbance(found[i][1]), _work(found[i]), i))
    ranked = [found[i] for i in order]
    return Advice(
        tuple(forecast for _, forecast in ranked),
        {row.name: row.recipe for row, _ in ranked},
        {row.name: how_far(row, forecast, base, budget, forecaster) for row, forecast in ranked},
    )


def _made_to_fit(
    row: Row, forecast: Forecast, base: Setting, budget: int, forecaster: Forecaster
) -> tuple[Row, Forecast] | None:
    """The row itself, or the first of its variants with the same result that fits."""
    factor = _factor(row, forecast, base, forecaster)
    for variant in _variants(row, base.recipe):
        if variant is row:
            made = forecast
        else:
            made = forecaster.forecast(base, variant, traced=False)
            if made.peak is None or made.peak * factor > budget:
                continue
            if _is_traced(forecast):
                made = forecaster.forecast(base, variant, traced=True)
        if made.peak is not None and made.peak <= budget:
            smaller = _evaluate_less(variant, made, base, budget, forecaster)
            if smaller is not None:
                return smaller
    return None


def _is_traced(forecast: Forecast) -> bool:
    return forecast.train is not None and forecast.train.engine == "traced"


def _factor(row: Row, forecast: Forecast, base: Setting, forecaster: Forecaster) -> float:
    """The row's own peak in terms of the closed form."""
    if not _is_traced(forecast):
        return 1.0
    quick = forecaster.forecast(base, row, traced=False)
    return (forecast.peak or 0) / max(1, quick.peak or 0)


def _variants(row: Row, recipe: Any) -> Iterator[Row]:
    """Ways to the same result: smaller forward passes, then checkpointing, then both."""
    yield row
    size, parts = row.recipe.train.batch_size, accumulation(row.recipe)
    splits: list[tuple[str, Changes]] = []
    for smaller in range(size // 2, 0, -1):
        if size % smaller == 0:
            times = parts * size // smaller
            changes = {"train.batch_size": smaller, "train.gradient_accumulation_steps": times}
            splits.append((f" {smaller} × {times}", changes))
    for words, changes in splits:
        yield _with(row, recipe, changes, words)
    if not is_checkpointed(row.recipe):
        for words, changes in [("", {}), *splits]:
            yield _with(row, recipe, {CHECKPOINTING: True, **changes}, f"+ckpt{words}")


def _with(row: Row, recipe: Any, changes: Changes, words: str) -> Row:
    """The row with further changes of the recipe."""
    return changed(recipe, row.changes | changes, row.name + words)


def _evaluate_less(
    row: Row, forecast: Forecast, base: Setting, budget: int, forecaster: Forecaster
) -> tuple[Row, Forecast] | None:
    """The row with evaluation batches small enough, which change no result."""
    size = row.recipe.train.eval_batch_size
    while forecast.needed is not None and forecast.needed > budget:
        size //= 2
        if size == 0:
            return None
        row = _with(row, base.recipe, {"train.eval_batch_size": size}, "")
        peak = estimate(replace(forecaster.setting(base, row), stage="train")).evaluation_peak
        assert forecast.train is not None
        train = replace(forecast.train, evaluation_peak=peak)
        forecast = replace(forecast, train=train, changes=row.changes)
    return row, forecast


def _disturbance(row: Forecast) -> int:
    """How far a row is from the recipe: 0 itself, 1 another way to the same result, 2 another method."""
    return 2 if any(key.startswith("lean.") for key in row.changes) else 1 if row.changes else 0


def _work(found: tuple[Row, Forecast]) -> float:
    """Operations an optimizer step: the price of checkpointing, the gain of choosing tokens."""
    row, forecast = found
    flops = None if forecast.train is None else forecast.train.flops
    return float(accumulation(row.recipe) * flops) if flops is not None else float("inf")


def how_far(row: Row, forecast: Forecast, base: Setting, budget: int, forecaster: Forecaster) -> Room:
    """How far a setting could go; by the closed form, scaled so that it agrees with the row's own peak."""
    stage: Stage = "estimate" if forecast.largest is not forecast.train else "train"
    setting = replace(forecaster.setting(base, row), stage=stage)
    factor = (forecast.peak or 0) / max(1, estimate(setting).peak)
    limit = getattr(setting.config.get_text_config(), "max_position_embeddings", None)

    def rows_fit(rows: int) -> bool:
        return estimate(replace(setting, batch=rows)).peak * factor <= budget

    def tokens_fit(tokens: int) -> bool:
        return estimate(replace(setting, length=tokens)).peak * factor <= budget

    return Room(_most(rows_fit, _LARGEST), _most(tokens_fit, min(limit or _LARGEST, _LARGEST)))


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits; 0 if none does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
