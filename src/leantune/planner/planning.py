"""`plan`: forecasts of a recipe and of what might stand in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from leantune.errors import UserError
from leantune.planner.closed import estimate
from leantune.planner.forecast import Engine, Figures, Forecast
from leantune.planner.length import Length, find_length
from leantune.planner.rows import Changes, Row, alternatives, changed, own_row
from leantune.planner.setting import Device, Setting, Stage, arguments, check
from leantune.planner.traced import CannotTrace, Tracer
from leantune.recipes import Recipe
from leantune.run.models import load_config, quiet_transformers

Progress = Callable[[int, int, str], None]
# No closed form is asked for more than this.
LARGEST = 1 << 20


@dataclass(frozen=True)
class Plan:
    """Forecasts for one model and batch.

    Attributes:
        model: `model.path`.
        batch: Rows a forward pass.
        length: Of the longest row.
        rows: The recipe's own first.
        memory: The limit in bytes that was asked about, or None.
        fitting: What fits under it, cheapest change of the recipe first.
        largest_batch: For each fitting row, the largest batch at this length, by the closed form scaled to
            the traced peak; 0 where not even one row fits.
    """

    model: str
    batch: int
    length: Length
    rows: tuple[Forecast, ...]
    memory: int | None = None
    fitting: tuple[Forecast, ...] = ()
    largest_batch: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data: dict[str, Any] = {
            "model": self.model,
            "batch": self.batch,
            "length": {"tokens": self.length.tokens, "why": self.length.why, "padded": self.length.padded},
            "rows": [row.to_dict() for row in self.rows],
        }
        if self.memory is not None:
            data |= {
                "memory": self.memory,
                "fitting": [row.to_dict() for row in self.fitting],
                "largest_batch": self.largest_batch,
            }
        return data


def plan(
    recipe: Recipe,
    *,
    batch: int | None = None,
    length: int | None = None,
    memory: int | None = None,
    engine: Engine = "traced",
    device: Device = "cpu",
    compare: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Forecast what a recipe's training takes, and what the alternatives would take. Loads no weights.

    Args:
        recipe: From `Recipe.load`. Of its model only the config is read.
        batch: Rows a forward pass; default: the recipe's.
        length: Tokens of the longest row; default: the data's longest, or `data.max_length`.
        memory: A limit in bytes: which rows fit, and how the recipe can be made to.
        engine: `traced` runs the model's code on fake tensors; `closed form` is instant and rougher. A model
            that cannot be traced gets the closed form either way, and its row says so.
        device: `cpu` or `cuda`; see `Setting`.
        compare: Also forecast the alternatives.
        progress: Called before each row with its number, the number of rows and its name.

    Raises:
        UserError: The recipe cannot be planned for, with the key and the reason.
    """
    config = load_config(recipe.model)
    found = find_length(recipe, config) if length is None else Length(length, "as given", True)
    if config.pad_token_id is None:
        config.pad_token_id = 0  # decoders that classify want one; which it is costs nothing
    base = Setting(
        recipe, config, batch or recipe.train.batch_size, found.tokens, found.padded, device=device
    )
    check(base)
    forecaster = Forecaster(engine)
    rows = [own_row(recipe), *(alternatives(recipe) if compare else [])]
    forecasts = []
    for number, row in enumerate(rows):
        if progress is not None:
            progress(number, len(rows), row.name)
        forecasts.append(forecaster.forecast(base, row))
    result = Plan(recipe.model.path, base.batch, found, tuple(forecasts))
    return result if memory is None else _advise(result, base, memory, forecaster, progress)


class Forecaster:
    """Rows → forecasts, by the engine that was asked for, or by the one that can."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._tracer = engine, Tracer()

    def forecast(self, base: Setting, row: Row) -> Forecast:
        """All stages of one row; what does not work on the model is said in `refused`."""
        forecast = Forecast(row.name, own=not row.changes, changes=row.changes)
        setting = replace(base, recipe=row.recipe, batch=self._batch(base, row))
        try:
            with quiet_transformers():
                return self._stages(forecast, setting)
        except UserError as error:
            if not row.changes:
                raise
            return replace(forecast, refused=str(error).split("\n")[0])

    def _stages(self, forecast: Forecast, setting: Setting) -> Forecast:
        for stage in _stages(setting.recipe):
            found: dict[str, Any] = {stage: self.figures(replace(setting, stage=stage))}
            forecast = replace(forecast, **found)
        return forecast

    def figures(self, setting: Setting) -> Figures:
        """One stage."""
        if self.engine == "traced":
            try:
                return self._tracer.trace(setting)
            except CannotTrace:
                pass
        return estimate(setting)

    @staticmethod
    def _batch(base: Setting, row: Row) -> int:
        given = row.changes.get("train.batch_size")
        return base.batch if given is None else int(given)


def _stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Stages of the recipe's run that a forecast shows."""
    adapter = recipe.lean.adapter
    estimate_too: tuple[Stage, ...] = ("estimate",) if recipe.lean.prune is not None else ()
    freezes = adapter.type == "lamda" and adapter.freeze_ratio < 1
    frozen: tuple[Stage, ...] = ("frozen",) if freezes else ()
    return (*estimate_too, "train", *frozen)


def _advise(
    plan: Plan, base: Setting, memory: int, forecaster: Forecaster, progress: Progress | None
) -> Plan:
    """What fits. Tried in the order of what it costs: first what leaves the result as it is."""
    rows = list(plan.rows)
    if not _fits(rows[0], memory):
        for row in _cheap_changes(base):
            if progress is not None:
                progress(len(rows), len(rows) + 1, row.name)
            forecast = forecaster.forecast(base, row)
            rows.append(forecast)
            if _fits(forecast, memory):
                break
    order = {row.name: number for number, row in enumerate(rows)}
    fitting = sorted(
        (row for row in rows if _fits(row, memory)),
        key=lambda row: (_disturbance(row), _work(base, row), order[row.name]),
    )
    largest = {row.name: _largest_batch(base, row, memory) for row in fitting}
    return replace(plan, rows=tuple(rows), memory=memory, fitting=tuple(fitting), largest_batch=largest)


def _fits(row: Forecast, memory: int) -> bool:
    return row.peak is not None and row.peak <= memory


def _cheap_changes(base: Setting) -> Iterable[Row]:
    """The recipe with the same result: smaller forward passes, then checkpointing, then both."""
    name, size, parts = own_row(base.recipe).name, base.batch, _accumulation(base.recipe)
    splits: list[tuple[str, Changes]] = []
    while size % 2 == 0:
        size, parts = size // 2, parts * 2
        changes = {"train.batch_size": size, "train.gradient_accumulation_steps": parts}
        splits.append((f", batch {size} × {parts}", changes))
    for words, changes in splits:
        yield changed(base.recipe, changes, name + words)
    if not base.checkpointing:
        for words, changes in [("", {}), *splits]:
            both = {"train.gradient_checkpointing": True, **changes}
            yield changed(base.recipe, both, f"{name} + checkpointing{words}")


def _accumulation(recipe: Recipe) -> int:
    """Forward passes an optimizer step."""
    return int(arguments(recipe).get("gradient_accumulation_steps", 1))


def _disturbance(row: Forecast) -> int:
    """How far a row is from the recipe: 0 itself, 1 another way to the same result, 2 another method."""
    return 0 if row.own else 2 if any(key.startswith("lean.") for key in row.changes) else 1


def _work(base: Setting, row: Forecast) -> float:
    """Operations an optimizer step: the price of checkpointing, the gain of choosing tokens."""
    if row.train is None or row.train.forward_flops is None or row.train.backward_flops is None:
        return 0.0
    passes = row.changes.get("train.gradient_accumulation_steps", _accumulation(base.recipe))
    return float(passes) * (row.train.forward_flops + row.train.backward_flops)


def _largest_batch(base: Setting, row: Forecast, memory: int) -> int:
    """By the closed form, scaled so that it agrees with the row's own peak."""
    recipe = changed(base.recipe, row.changes).recipe if row.changes else base.recipe
    stage: Stage = "estimate" if recipe.lean.prune is not None else "train"
    batch = int(row.changes.get("train.batch_size", base.batch))
    setting = replace(base, recipe=recipe, stage=stage, batch=batch)
    factor = (row.peak or 0) / max(1, estimate(setting).peak)

    def fits(rows: int) -> bool:
        return estimate(replace(setting, batch=rows)).peak * factor <= memory

    low, high = 0, 1
    while high < LARGEST and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
