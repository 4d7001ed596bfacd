"""Forecasts of a run's memory and compute, from a config alone.

Two engines that check each other: `trace` runs the model's own code on fake tensors, `estimate` is a closed
form over its shapes. `plan` puts a recipe beside its alternatives.
"""

from leantune.planner.closed import estimate
from leantune.planner.forecast import Figures, Forecast, Memory
from leantune.planner.planning import Plan, plan
from leantune.planner.setting import Setting
from leantune.planner.sharing import Sharing
from leantune.planner.sizes import parse_size
from leantune.planner.traced import CannotTrace, Tracer, trace

__all__ = [
    "CannotTrace",
    "Figures",
    "Forecast",
    "Memory",
    "Plan",
    "Setting",
    "Sharing",
    "Tracer",
    "estimate",
    "parse_size",
    "plan",
    "trace",
]
