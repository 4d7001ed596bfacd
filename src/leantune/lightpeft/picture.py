"""A plan as a picture for a terminal: layers × what stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAME = 36  # characters of a block's name
_WIDTH = 48  # cells of a bar


def picture(groups: Mapping[str, Any], modules: Mapping[str, Any]) -> str:
    """One line a block, full cells for what stays; then what stays of the adapter.

    Args:
        groups: Block → kind, count and kept units.
        modules: Module of the adapter → rank and kept ranks.
    """
    lines = [
        f"{_short(name):<{_NAME}}  {_bar(units):<{_WIDTH}}  {len(units.kept)}/{units.count} {units.kind}"
        for name, units in groups.items()
    ]
    if modules:
        ranks = sum(module.rank for module in modules.values())
        left = sum(len(module.kept) for module in modules.values())
        staying = sum(bool(module.kept) for module in modules.values())
        lines.append(f"adapter: {staying}/{len(modules)} modules, {left}/{ranks} ranks")
    return "\n".join(lines)


def _bar(units: Any) -> str:
    """Heads one by one; of neurons, hundreds to a cell, only how many."""
    if units.kind == "heads" and units.count <= _WIDTH:
        kept = set(units.kept)
        return "".join("█" if unit in kept else "░" for unit in range(units.count))
    full = round(_WIDTH * len(units.kept) / units.count)
    return "█" * full + "░" * (_WIDTH - full)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]
