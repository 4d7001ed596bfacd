"""Tables that are not of a run: what the methods can do, what the environment has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.table import Table
from rich.text import Text

from leantune.methods import ABILITIES, Method

YES, NO = "✓", "–"


class _Check(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def ok(self) -> bool | None: ...
    @property
    def found(self) -> str: ...
    @property
    def advice(self) -> str: ...


def capability_table(methods: Sequence[Method]) -> Table:
    """A paragraph a method: what it is, for which tasks, what a run with it can do."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for method in methods:
        can = [ability for ability in ABILITIES if method.can.get(ability)]
        table.add_row(method.name, method.what)
        table.add_row("", Text(f"recipe  {method.key}", "dim"))
        table.add_row("", Text(f"tasks   {', '.join(method.tasks)}", "dim"))
        table.add_row("", Text(f"can     {', '.join(can)}", "dim"))
        if method.paper:
            table.add_row("", Text(f"paper   {method.paper}", "dim"))
        table.add_row()
    return table


def capability_markdown(methods: Sequence[Method]) -> str:
    """The same table for the README."""
    head = ["method", "recipe key", "what", "tasks", *ABILITIES]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in methods:
        name = f"[{method.name}]({method.card})" if method.card else method.name
        marks = [YES if method.can.get(ability) else NO for ability in ABILITIES]
        cells = [name, f"`{method.key}`", method.what, ", ".join(method.tasks), *marks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def doctor_table(checks: Sequence[_Check]) -> Table:
    """One row a check."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        mark = {True: Text("✓", "green"), False: Text("✗", "red"), None: Text("·", "dim")}[check.ok]
        table.add_row(mark, check.name, check.found, Text(check.advice, "dim"))
    return table
