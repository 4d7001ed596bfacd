"""A plan for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from leantune.planner.advice import Advice
from leantune.planner.forecast import Figures, Forecast
from leantune.planner.planning import Plan
from leantune.report.formats import MISSING, format_bytes, format_count, format_seconds

_LARGE = 4 << 30  # from this peak on, sizes are in GiB
_GAP = 2  # columns of a terminal between two columns of the table
_NARROW = 100  # below this the parts of the peak are joined

# Column → parts of the peak that are added up in it.
_PARTS: dict[str, tuple[str, ...]] = {
    "Weights": ("weights",),
    "Grads": ("gradients",),
    "Optim": ("optimizer",),
    "Activ": ("activations",),
    "Logits": ("logits",),
    "Temp": ("temporary",),
    "Quant": ("quantization",),
    "Comm": ("communication",),
}
_JOINED: dict[str, tuple[str, ...]] = {
    "Weights": ("weights", "quantization"),
    "Gr+opt": ("gradients", "optimizer"),
    "Activ": ("activations",),
    "Other": ("logits", "temporary", "communication"),
}
# What goes first where the terminal is too narrow for all.
_DISPENSABLE = ("FLOPs", "Save", "Trained", "Comm", "Quant")
_Column = tuple[str, Callable[[Forecast, Figures], str]]


def plan_table(plan: Plan, width: int = 80) -> RenderableType:
    """Methods down, the split of the peak across; the recipe's own row is marked, what fits is ticked.

    Args:
        plan: What to show.
        width: Columns of the terminal.
    """
    unit = "GiB" if max((row.peak or 0 for row in plan.rows), default=0) >= _LARGE else "MiB"
    columns = _columns(plan, width, unit)
    table = _new_table()
    table.add_column("", no_wrap=True)
    table.add_column("Method", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in plan.rows:
        figures = row.largest
        cells = [MISSING] if figures is None else [show(row, figures) for _, show in columns]
        table.add_row(_mark(plan, row), Text(row.name), *cells, style="bold" if row.own else "")
    notes = [Text(line, style="dim") for line in _notes(plan, unit)]
    advice = [] if plan.advice is None else _advice(plan, plan.advice)
    return Group(Text(_title(plan), style="bold"), "", table, "", *notes, *advice)


def _new_table() -> Table:
    return Table(
        box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )


def _title(plan: Plan) -> str:
    rows = f"{plan.batch} × {plan.length.tokens:,} tokens ({plan.length.why})"
    shared = (
        "" if plan.sharing.gpus == 1 else f", on each of {plan.sharing.gpus} GPUs ({plan.sharing.strategy})"
    )
    model = Path(plan.model).name if Path(plan.model).is_dir() else plan.model  # a long path would be cut
    return f"{model}: peak memory of training, {rows}{shared}"


def _mark(plan: Plan, row: Forecast) -> Text:
    mark = Text("▸" if row.own else " ")
    if plan.memory is not None and row.needed is not None:
        fits = row.needed <= plan.memory - plan.reserve
        mark += Text("✓", style="green") if fits else Text("✗", style="red")
    return mark


def _columns(plan: Plan, width: int, unit: str) -> list[_Column]:
    """As many columns as there is room for."""

    def size(value: int) -> str:
        return f"{value / 2**30:,.2f}" if unit == "GiB" else f"{value / 2**20:,.0f}"

    def part(names: tuple[str, ...]) -> Callable[[Forecast, Figures], str]:
        return lambda row, figures: size(sum(getattr(figures.memory, name) for name in names))

    def peak(row: Forecast, figures: Figures) -> str:
        return ("≈" if figures.engine == "closed form" else "") + size(figures.peak)

    parts = _JOINED if width < _NARROW else _used_parts(plan)
    columns: list[_Column] = [("Peak", peak), *((name, part(names)) for name, names in parts.items())]
    columns += [
        ("Eval", lambda row, figures: size(row.train.evaluation_peak) if row.train else MISSING),
        ("Save", lambda row, figures: size(row.train.saving_peak) if row.train else MISSING),
        ("Trained", lambda row, figures: format_count(figures.trained)),
        ("FLOPs", lambda row, figures: format_count(row.train.flops) if row.train else MISSING),
        ("Step", lambda row, figures: format_seconds(row.step_seconds)),
    ]
    known = [(row, row.largest) for row in plan.rows if row.largest is not None]
    taken = {
        name: _GAP + max(len(name), *(len(show(row, figures)) for row, figures in known))
        for name, show in columns
    }
    first = 4 + _GAP + max(len(row.name) for row in plan.rows)
    dispensable = [name for name in _DISPENSABLE if name in taken]
    while first + sum(taken.values()) > width and dispensable:
        taken.pop(dispensable.pop(0))
    return [(name, show) for name, show in columns if name in taken]


def _used_parts(plan: Plan) -> dict[str, tuple[str, ...]]:
    """All parts but those that nobody has."""
    seldom = {"Logits": "logits", "Quant": "quantization", "Comm": "communication"}
    figures = [row.largest for row in plan.rows if row.largest is not None]
    unused = {name for name, part in seldom.items() if not any(getattr(f.memory, part) for f in figures)}
    return {name: parts for name, parts in _PARTS.items() if name not in unused}


def _notes(plan: Plan, unit: str) -> Iterator[str]:
    for row in plan.rows:
        said = row.refused or row.note
        if said is not None:
            yield f"{row.name}: {said}"
    pruned = next((row for row in plan.rows if row.estimate is not None and row.train is not None), None)
    if pruned is not None and pruned.train is not None:
        after = format_bytes(pruned.train.peak)
        yield f"{pruned.name}: the peak of its first stage; {after} once heads and neurons are cut"
    if any(row.largest is not None and row.largest.engine == "closed form" for row in plan.rows):
        yield "≈ by the closed form: 4 % off as a rule, at worst 20 %; --trace runs every model's code"
    yield f"{unit}, split at the moment of the peak. ▸ the recipe. Step on {plan.device.basis}."


def _advice(plan: Plan, advice: Advice) -> list[RenderableType]:
    limit, reserve = format_bytes(plan.memory), format_bytes(plan.reserve)
    why = "CUDA's context: an assumption" if plan.device.kind == "cuda" else "interpreter and libraries"
    lines: list[RenderableType] = [
        Text(f"\n{limit}, of which {reserve} are not for tensors ({why}).", style="bold")
    ]
    best = advice.best
    if best is None:
        return [*lines, Text("Nothing of this fits, with batches of one row and checkpointing neither.")]
    own = plan.rows[0]
    if not best.changes:
        lines.append(Text("The recipe fits."))
    else:
        fits_training = own.peak is not None and own.peak <= (plan.memory or 0) - plan.reserve
        where = " (its evaluation does not)" if fits_training else ""
        lines.append(Text(f"The recipe does not fit{where}. The least change that makes it fit:"))
        lines.append(Text(f"  {typed_changes(best.changes)}", style="green"))
    return [*lines, "", _fitting_table(advice)]


def _fitting_table(advice: Advice) -> Table:
    """Ranked: what fits, and how far it could go."""
    table = _new_table()
    for name in ("", "What fits", "Needs", "Step", "Largest batch", "or longest row"):
        table.add_column(name, justify="left" if name in ("", "What fits") else "right", no_wrap=True)
    for number, row in enumerate(advice.fitting, 1):
        room = advice.room[row.name]
        sizes = (
            format_bytes(row.needed),
            format_seconds(row.step_seconds),
            f"{room.batch:,}",
            f"{room.length:,}",
        )
        table.add_row(str(number), Text(row.name), *sizes)
    return table


def typed_changes(changes: dict[str, Any]) -> str:
    """As they are typed after a recipe on the command line."""
    return " ".join(f"{key}={_typed(value)}" for key, value in changes.items())


def _typed(value: object) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {_typed(each)}" for key, each in value.items() if each is not None)
        return f"'{{{inner}}}'"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
