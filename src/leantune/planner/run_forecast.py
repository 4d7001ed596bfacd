"""What `leantune train` says before it starts: the closed form for the run's own rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from transformers import PretrainedConfig

from leantune.errors import UserError
from leantune.planner.closed import estimate
from leantune.planner.forecast import Figures
from leantune.planner.setting import Setting
from leantune.planner.sharing import Sharing
from leantune.recipes import Recipe
from leantune.report.formats import format_bytes
from leantune.run.models import quiet_transformers

_SMALL = 0.02  # parts of the peak below this share are not told


@dataclass(frozen=True)
class RunForecast:
    """A run's forecast, or why there is none.

    Attributes:
        line: For a person.
        peak_bytes: Of tensors, in the main stage with its evaluations and checkpoints; None: no forecast.
    """

    line: str
    peak_bytes: int | None


def forecast_run(
    recipe: Recipe,
    config: PretrainedConfig,
    train: Dataset,
    evaluates: bool,
    packed: bool,
    cuda: bool,
    sharing: Sharing = Sharing(),  # noqa: B008 - frozen
) -> RunForecast:
    """Forecast a run whose data are read already. Never stands in its way.

    Args:
        recipe: The run's.
        config: Its model's; is not changed.
        train: Encoded rows.
        evaluates: Whether there is a validation split.
        packed: Whether all rows have the same length.
        cuda: Whether it runs on a GPU.
        sharing: How many processes there are; the forecast is of each.
    """
    setting = Setting(
        recipe,
        copy.deepcopy(config),
        batch=min(recipe.train.batch_size, len(train)),
        length=longest(train),
        padded=not packed,
        device="cuda" if cuda else "cpu",
        evaluates=evaluates,
        sharing=sharing,
    )
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            figures = estimate(setting)
            first = estimate(replace(setting, stage="estimate")) if recipe.lean.prune is not None else None
    except UserError as error:
        return RunForecast(f"no forecast of memory: {str(error).splitlines()[0]}", None)
    peak = max(figures.peak, figures.evaluation_peak, figures.saving_peak)
    line = _line(figures, first, peak) + (" in each process" if sharing.gpus > 1 else "")
    if cuda and peak > (total := torch.cuda.get_device_properties(0).total_memory):
        line += f"; more than the GPU's {format_bytes(total)}: `leantune plan` says what would fit"
    return RunForecast(line, peak)


def longest(rows: Dataset) -> int:
    """Tokens of the longest row."""
    lengths: Any = pyarrow.compute.list_value_length(rows.data.column("input_ids"))
    return int(pyarrow.compute.max(lengths).as_py())


def _line(figures: Figures, first: Figures | None, peak: int) -> str:
    memory = figures.memory
    parts = {field.name: getattr(memory, field.name) for field in fields(memory)}
    told = sorted((n for n in parts if parts[n] > _SMALL * memory.total), key=lambda n: -parts[n])
    split = ", ".join(f"{name} {format_bytes(parts[name])}" for name in told)
    line = f"forecast: about {format_bytes(memory.total)} of tensors at the peak of a training step ({split})"
    if first is not None:
        line += f", {format_bytes(first.peak)} in the first stage"
    if peak > memory.total:
        line += f"; evaluation {format_bytes(figures.evaluation_peak)}"
    return line
