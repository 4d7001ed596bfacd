"""A plan for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from leantune.planner.forecast import Figures, Forecast
from leantune.planner.planning import Plan
from leantune.report.formats import MISSING, format_bytes, format_count

_NARROW = 112  # columns of a terminal that has no room for the whole split
_LARGE = 4 << 30  # from this peak on, sizes are in GiB

# Column → parts of the peak that are added up in it.
_SPLIT: dict[str, tuple[str, ...]] = {
    "Weights": ("weights",),
    "Grads": ("gradients",),
    "Optim": ("optimizer",),
    "Activ": ("activations",),
    "Logits": ("logits",),
    "Temp": ("temporary",),
}
_JOINED: dict[str, tuple[str, ...]] = {
    "Weights": ("weights",),
    "Grads+optim": ("gradients", "optimizer"),
    "Activ": ("activations",),
    "Other": ("logits", "temporary"),
}


def plan_table(plan: Plan, width: int = _NARROW) -> RenderableType:
    """Methods down, the split of the peak across; the recipe's own row is marked, what fits is ticked.

    Args:
        plan: What to show.
        width: Columns of the terminal.
    """
    split = _SPLIT if width >= _NARROW else _JOINED
    unit = "GiB" if max((row.peak or 0 for row in plan.rows), default=0) >= _LARGE else "MiB"
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("Method", overflow="fold")
    last = ("Saved", "Trained", "FLOPs") if split is _SPLIT else ("Trained",)
    for column in ("Peak", *split, *last):
        table.add_column(column, justify="right", no_wrap=True)
    for row in plan.rows:
        _add(table, row, plan.memory, split, unit, last)
    notes = [Text(line, style="dim") for line in _notes(plan, unit)]
    return Group(Text(_title(plan), style="bold"), table, *notes)


def _title(plan: Plan) -> str:
    rows = f"{plan.batch} rows of {plan.length.tokens:,} tokens ({plan.length.why})"
    return f"{plan.model}: memory of a training step, {rows}"


def _add(
    table: Table, row: Forecast, memory: int | None, split: dict[str, tuple[str, ...]], unit: str, last: Any
) -> None:
    mark = Text("▸" if row.own else "")
    if memory is not None and row.peak is not None:
        mark += Text("✓", style="green") if row.peak <= memory else Text("✗", style="red")
    style = "bold" if row.own else ""
    if row.train is None:
        table.add_row(mark, Text(row.name), MISSING)
        return
    shown = max((s for s in (row.train, row.estimate) if s is not None), key=lambda figures: figures.peak)
    sums = [sum(getattr(shown.memory, part) for part in parts) for parts in split.values()]
    sizes = [_size(value, unit) for value in (shown.peak, *sums)]
    ends = {"Saved": _size(shown.saved_activation_bytes, unit), "Trained": _trained(shown, row)}
    ends["FLOPs"] = _operations(row.train)
    table.add_row(mark, Text(row.name), *sizes, *(ends[name] for name in last), style=style)


def _size(value: int, unit: str) -> str:
    return f"{value / 2**30:,.2f}" if unit == "GiB" else f"{value / 2**20:,.1f}"


def _trained(shown: Figures, row: Forecast) -> str:
    start, end = format_count(shown.trained), format_count(row.trained_at_end)
    return start if start == end else f"{start} → {end}"


def _operations(figures: Figures) -> str:
    if figures.forward_flops is None or figures.backward_flops is None:
        return MISSING
    return format_count(figures.forward_flops + figures.backward_flops)


def _notes(plan: Plan, unit: str) -> Iterator[str]:
    for row in plan.rows:
        if row.refused is not None:
            yield f"{row.name}: {row.refused}"
        if row.estimate is not None and row.train is not None:
            after = format_bytes(row.train.peak)
            yield f"{row.name}: the peak is that of its first stage; {after} once heads and neurons are cut"
        if row.train is not None and row.train.engine == "closed form":
            yield f"{row.name}: by the closed form (within about 10 %, at worst 20 %)"
    yield f"{unit}, split at the moment of the peak. Saved: kept from forward to backward. ▸ the recipe."
    if plan.memory is not None:
        yield from _advice(plan)


def _advice(plan: Plan) -> Iterator[str]:
    limit = format_bytes(plan.memory)
    own, fitting = plan.rows[0], plan.fitting
    if not fitting:
        yield f"Nothing of this fits in {limit}."
        return
    if own in fitting:
        yield f"The recipe fits in {limit}."
    else:
        first = fitting[0]
        changes = " ".join(f"{key}={_typed(value)}" for key, value in first.changes.items())
        yield f"The recipe does not fit in {limit}. The cheapest change that makes it fit: {changes}"
    for number, row in enumerate(fitting, 1):
        largest = (plan.largest_batch or {}).get(row.name)
        most = "" if largest is None else f", largest batch about {largest}"
        yield f"{number}. {row.name}: {format_bytes(row.peak)}{most}"


def _typed(value: object) -> str:
    """A value as it is typed in `key=value` on a command line."""
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {_typed(each)}" for key, each in value.items() if each is not None)
        return f"'{{{inner}}}'"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
