"""Tables that are not of a run: what the methods can do, what the environment has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Protocol

from rich.table import Table
from rich.text import Text

from leantune.methods import Method

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


@dataclass(frozen=True)
class Capabilities:
    """What was tried, and what came out: methods × architectures and tasks × abilities.

    Attributes:
        abilities: In the order of the table's columns.
        architectures: As "bert classification".
        cells: Method or combination → architecture → ability → True, or the line that refuses it.
    """

    abilities: tuple[str, ...]
    architectures: tuple[str, ...]
    cells: dict[str, dict[str, dict[str, bool | str]]]

    @classmethod
    def load(cls) -> Capabilities:
        """The table that `scripts/capabilities.py` wrote."""
        data = json.loads(files("leantune").joinpath("capabilities.json").read_text(encoding="utf-8"))
        return cls(tuple(data["abilities"]), tuple(data["architectures"]), data["cells"])

    def mark(self, method: str, ability: str) -> str:
        """✓ on every architecture where it was tried, – on none, else on how many."""
        found = [cell[ability] is True for cell in self.cells[method].values() if ability in cell]
        if all(found) or not any(found):
            return YES if found and all(found) else NO
        return f"{sum(found)} of {len(found)}"


def methods_table(methods: Sequence[Method]) -> Table:
    """A paragraph a method: what it is and how a recipe says it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for method in methods:
        table.add_row(method.name, method.what)
        table.add_row("", Text(f"recipe  {method.key}", "dim"))
        if method.paper:
            table.add_row("", Text(f"paper   {method.paper}", "dim"))
        table.add_row()
    return table


def capability_table(capabilities: Capabilities) -> Table:
    """Methods and combinations × abilities."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    for ability in capabilities.abilities:
        table.add_column(ability, justify="center")
    for method in capabilities.cells:
        table.add_row(method, *(capabilities.mark(method, ability) for ability in capabilities.abilities))
    return table


def tried_on(capabilities: Capabilities) -> str:
    """The architectures, in one line, and what was tried on some of them alone."""
    line = "tried on " + ", ".join(capabilities.architectures)
    for ability in capabilities.abilities:
        places = [
            name
            for name in capabilities.architectures
            if any(ability in cells[name] for cells in capabilities.cells.values())
        ]
        if len(places) < len(capabilities.architectures):
            line += f"; {ability} on {', '.join(places)}"
    return line


def methods_markdown(methods: Sequence[Method]) -> str:
    """What there is, for the README."""
    head = ["method", "recipe key", "what", "paper"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in methods:
        name = f"[{method.name}]({method.card})" if method.card else method.name
        lines.append("| " + " | ".join([name, f"`{method.key}`", method.what, method.paper]) + " |")
    return "\n".join(lines) + "\n"


def capability_markdown(capabilities: Capabilities) -> str:
    """The capability table for the README."""
    head = ["", *capabilities.abilities]
    lines = ["| " + " | ".join(head) + " |", "|---|" + ":---:|" * len(capabilities.abilities)]
    for method in capabilities.cells:
        marks = [capabilities.mark(method, ability) for ability in capabilities.abilities]
        lines.append("| " + " | ".join([method, *marks]) + " |")
    return "\n".join(lines) + f"\n\n{tried_on(capabilities)[0].upper()}{tried_on(capabilities)[1:]}.\n"


def doctor_table(checks: Sequence[_Check]) -> Table:
    """One row a check."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        mark = {True: Text("✓", "green"), False: Text("✗", "red"), None: Text("·", "dim")}[check.ok]
        table.add_row(mark, check.name, check.found, Text(check.advice, "dim"))
    return table
