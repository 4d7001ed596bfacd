"""`plan`: forecasts of a recipe and of what might stand in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from leantune.errors import UserError
from leantune.measure import resident_bytes
from leantune.planner.advice import Advice, advise
from leantune.planner.devices import Device, find_device
from leantune.planner.forecast import Forecast
from leantune.planner.forecaster import Forecaster, Progress
from leantune.planner.known import config_of
from leantune.planner.length import Length, find_length, given_length
from leantune.planner.rows import alternatives, own_row
from leantune.planner.setting import Setting, check
from leantune.planner.sharing import Sharing, parse_sharing
from leantune.planner.sizes import parse_size
from leantune.recipes import Recipe

Trace = Literal["none", "own", "all"]
# CUDA's context and the rounding of its allocator's blocks; an assumption, no measurement.
CUDA_RESERVE = 600 << 20


@dataclass(frozen=True)
class Plan:
    """Forecasts for one model and batch.

    Attributes:
        model: `model.path`.
        batch: Rows a forward pass and process.
        length: Of the longest row.
        device: Where it is to run.
        sharing: Over how many processes.
        rows: The recipe's own first.
        memory: The limit in bytes a process, as asked about, or None.
        reserve: Of it, what the process takes besides tensors.
        advice: What fits under it.
    """

    model: str
    batch: int
    length: Length
    device: Device
    sharing: Sharing
    rows: tuple[Forecast, ...]
    memory: int | None = None
    reserve: int = 0
    advice: Advice | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data: dict[str, Any] = {
            "model": self.model,
            "batch": self.batch,
            "length": {"tokens": self.length.tokens, "why": self.length.why, "padded": self.length.padded},
            "device": {"name": self.device.name, "times": self.device.basis},
            "gpus": self.sharing.gpus,
            "strategy": self.sharing.strategy if self.sharing.gpus > 1 else None,
            "rows": [row.to_dict() for row in self.rows],
        }
        if self.memory is not None and self.advice is not None:
            data |= {"memory": self.memory, "reserve": self.reserve, **self.advice.to_dict()}
        return data


def plan(
    recipe: Recipe,
    *,
    batch: int | None = None,
    length: int | None = None,
    memory: int | str | None = None,
    reserve: int | str | None = None,
    device: str | None = None,
    gpus: int = 1,
    strategy: str | None = None,
    methods: Sequence[str] | None = None,
    trace: Trace = "own",
    progress: Progress | None = None,
) -> Plan:
    """Forecast what a recipe's training takes, and what the alternatives would take. Loads no weights.

    Args:
        recipe: From `Recipe.load`. Of its model only the config is read; `shape:NAME` needs no file at all.
        batch: Rows a forward pass and process; default: the recipe's.
        length: Tokens of the longest row; default: the data's longest, or `data.max_length`.
        memory: A limit for each process, in bytes or as `24GiB`: which settings fit, and how the recipe can
            be made to. Default: the device's memory, where it is known.
        reserve: Of that, what is not for tensors. Default: on a CPU what this process has in memory now (an
            interpreter with torch and transformers), on a GPU 600 MiB.
        device: `cpu`, `cuda`, or a GPU's name (`leantune.planner.devices`); default: what is here.
        gpus: Processes, one GPU each.
        strategy: How they share the model: `ddp`, `zero1`, `zero2`, `zero3`, `fsdp`.
        methods: Names as of `leantune.compare`; default: a usual choice. Empty: none.
        trace: Whose figures come from running the model's code on fake tensors: nobody's, the recipe's own
            or everybody's. The rest is by the closed form, instant and rougher. A model that cannot be traced
            gets the closed form in any case, and its row says so.
        progress: Told what is worked on: number, count, name.

    Raises:
        UserError: The recipe cannot be planned for, with the key and the reason.
    """
    where, sharing = find_device(device), parse_sharing(gpus, strategy)
    limit = parse_size(memory) if isinstance(memory, str) else memory
    limit = where.memory if limit is None else limit
    base, found = base_setting(recipe, batch, length, where, sharing)
    forecaster = Forecaster(where, trace, progress)
    rows = [own_row(base.recipe), *alternatives(base.recipe, methods)]
    forecasts = []
    for number, row in enumerate(rows):
        forecaster.announce(number, len(rows), row.name)
        forecasts.append(forecaster.forecast(base, row))
    result = Plan(recipe.model.path, base.batch, found, where, sharing, tuple(forecasts))
    if limit is None:
        return result
    kept = _reserve(reserve, where)
    if kept >= limit:
        raise UserError(f"--memory: {limit:,} bytes are not more than what is reserved, {kept:,}")
    return replace(
        result, memory=limit, reserve=kept, advice=advise(forecasts, rows, base, limit - kept, forecaster)
    )


def base_setting(
    recipe: Recipe,
    batch: int | None = None,
    length: int | None = None,
    device: Device | None = None,
    sharing: Sharing | None = None,
) -> tuple[Setting, Length]:
    """What a recipe's own run is, as something to forecast.

    Raises:
        UserError: It cannot be forecast.
    """
    config = config_of(recipe.model)
    found = find_length(recipe, config) if length is None else given_length(recipe, length)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # decoders that classify want one; which it is costs nothing
    if batch is not None:
        train = recipe.train.model_copy(update={"batch_size": batch})
        recipe = recipe.model_copy(update={"train": train})
    setting = Setting(
        recipe,
        config,
        recipe.train.batch_size,
        found.tokens,
        found.padded,
        device=device.kind if device else "cpu",
        sharing=sharing or Sharing(),
        evaluates=found.evaluates,
    )
    check(setting)
    return setting, found


def _reserve(asked: int | str | None, device: Device) -> int:
    if asked is not None:
        return parse_size(asked, "--reserve") if isinstance(asked, str) else asked
    return CUDA_RESERVE if device.kind == "cuda" else resident_bytes() or 0
