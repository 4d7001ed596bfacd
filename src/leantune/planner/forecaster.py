"""Rows → forecasts, by the engine that was asked for, or by the one that can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from leantune.errors import UserError
from leantune.planner.closed import estimate
from leantune.planner.devices import Device
from leantune.planner.forecast import Forecast
from leantune.planner.rows import Row
from leantune.planner.setting import Setting, Stage, arguments
from leantune.planner.traced import CannotTrace, Tracer
from leantune.recipes import Recipe
from leantune.run.models import quiet_transformers

Progress = Callable[[int, int, str], None]


class Forecaster:
    """Forecasts one row after another.

    Args:
        device: Whose times to tell.
        trace: `none`, `own` or `all`: whose figures are traced.
        progress: Told what is worked on.
    """

    def __init__(self, device: Device, trace: str, progress: Progress | None = None) -> None:
        self.device, self.trace, self._progress = device, trace, progress
        self._tracer = Tracer()

    def announce(self, number: int, count: int, name: str) -> None:
        """Say what is next."""
        if self._progress is not None:
            self._progress(number, count, name)

    def forecast(self, base: Setting, row: Row, traced: bool | None = None) -> Forecast:
        """All stages of one row; what does not work on the model is said in `refused`.

        Args:
            base: Model and batch.
            row: What to do with it.
            traced: Whether to run the model's code; None: as was asked for.
        """
        if traced is None:
            traced = self.trace == "all" or (self.trace == "own" and not row.changes)
        forecast = Forecast(row.name, not row.changes, row.changes)
        setting = self.setting(base, row)
        try:
            with quiet_transformers():
                for stage in stages_of(setting.recipe):
                    found: dict[str, Any] = self._figures(replace(setting, stage=stage), traced)
                    forecast = replace(forecast, **found)
        except UserError as error:
            if not row.changes:
                raise
            return Forecast(row.name, False, row.changes, refused=str(error).split("\n")[0])
        return replace(forecast, step_seconds=self._seconds(forecast, setting))

    def setting(self, base: Setting, row: Row) -> Setting:
        """What a row trains."""
        return replace(base, recipe=row.recipe, batch=row.recipe.train.batch_size)

    def _figures(self, setting: Setting, traced: bool) -> dict[str, Any]:
        if not traced:
            return {setting.stage: estimate(setting)}
        try:
            return {setting.stage: self._tracer.trace(setting)}
        except CannotTrace as error:
            return {setting.stage: estimate(setting), "note": f"{error}; by the closed form"}

    def _seconds(self, forecast: Forecast, setting: Setting) -> float | None:
        if forecast.train is None or forecast.train.flops is None:
            return None
        operations = float(accumulation(setting.recipe) * forecast.train.flops)
        return self.device.seconds(operations, setting.autocast or setting.dtype)


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """Stages of the recipe's run that a forecast shows."""
    adapter = recipe.lean.adapter
    first: tuple[Stage, ...] = ("estimate",) if recipe.lean.prune is not None else ()
    freezes = adapter.type == "lamda" and adapter.freeze_ratio < 1
    last: tuple[Stage, ...] = ("frozen",) if freezes else ()
    return (*first, "train", *last)


def accumulation(recipe: Recipe) -> int:
    """Forward passes an optimizer step."""
    return int(arguments(recipe).get("gradient_accumulation_steps", 1))
