"""What to tell a run that has run out of memory: which changes of its recipe would have fitted."""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig

from leantune.planner.advice import advise, how_far
from leantune.planner.devices import find_device
from leantune.planner.forecast import Forecast
from leantune.planner.forecaster import Forecaster
from leantune.planner.rows import Row, alternatives, own_row
from leantune.planner.setting import Setting
from leantune.planner.sharing import Sharing
from leantune.planner.table import typed_changes
from leantune.recipes import Recipe
from leantune.report.formats import format_bytes
from leantune.run.models import quiet_transformers

_TOLD = 3
_SURE = 0.9  # of what tensors had: the closed form errs, and not all of a process is tensors
_LEAST_LENGTH = 8  # tokens; a shorter text is no advice


def what_would_fit(
    recipe: Recipe,
    config: PretrainedConfig,
    rows: int,
    length: int,
    had: int | None,
    sharing: Sharing = Sharing(),  # noqa: B008 - frozen
) -> str | None:
    """Changes of a recipe that would fit, by the closed form; or, if none surely does, those that need less.

    Args:
        recipe: That did not.
        config: Its model's; is not changed.
        rows: That went through the model at once when memory ran out.
        length: Their tokens.
        had: Bytes that tensors had at the most until then: memory was at least that large. None: not known.
        sharing: How many processes there were.

    Returns:
        For a message; None where nothing that leantune knows would need less.

    Raises:
        UserError: Such a run cannot be forecast.
    """
    train = recipe.train.model_copy(update={"batch_size": rows})
    recipe = recipe.model_copy(update={"train": train})
    device = find_device(None, measure=False)
    base = Setting(
        recipe,
        copy.deepcopy(config),
        rows,
        length,
        padded=True,
        device=device.kind,
        evaluates=False,
        sharing=sharing,
    )
    forecaster = Forecaster(device, trace="none")
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        own = forecaster.forecast(base, own_row(recipe))
        failed = own.peak or 0
        every = [own_row(recipe), *alternatives(recipe)]
        forecasts = [own, *(forecaster.forecast(base, row) for row in every[1:])]
        bounds = {"would fit by that": failed if had is None else min(failed, had), "need less": failed}
        for words, bound in bounds.items():
            found = _changes(forecasts, every, base, int(_SURE * bound), forecaster)
            if found:
                return f"it is forecast at {format_bytes(failed)}; {words}: {'; '.join(found)}"
    return None


def _changes(
    forecasts: list[Forecast], rows: list[Row], base: Setting, budget: int, forecaster: Forecaster
) -> list[str]:
    """As they are typed, least change first, with what they need."""
    advice = advise(forecasts, rows, base, budget, forecaster)
    changed = [row for row in advice.fitting[:_TOLD] if row.changes]
    told = [f"{typed_changes(row.changes)} ({format_bytes(row.needed)})" for row in changed]
    shorter = how_far(rows[0], forecasts[0], base, budget, forecaster).length
    if _LEAST_LENGTH <= shorter < base.length:
        told.insert(1, f"data.max_length={shorter} ({format_bytes(budget)})")
    return told
