"""What a run pruned, layer by layer, read from its `pruning/plan.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from leantune.report.formats import format_share


class Block(NamedTuple):
    """One attention or FFN block.

    Attributes:
        name: In the model.
        kind: `heads` or `neurons`.
        note: Kept of all, in words.
        cells: For heads, one by one whether it stays; empty for neurons.
        percent: Share that stays, 0 to 100.
    """

    name: str
    kind: str
    note: str
    cells: list[bool]
    percent: float


def read_pruning(run_folder: Path) -> dict[str, Any]:
    """Blocks and the adapter's modules of a pruned run; empty for other runs, or an unreadable plan."""
    try:
        plan = json.loads((run_folder / "pruning" / "plan.json").read_text(encoding="utf-8"))
        blocks = [_block(name, units) for name, units in plan["groups"].items()]
        modules = [_module(name, module) for name, module in plan["modules"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {"blocks": blocks, "modules": modules, "summary": _summary(blocks, plan)}


def _block(name: str, units: dict[str, Any]) -> Block:
    kept, count, kind = set(units["kept"]), int(units["count"]), str(units["kind"])
    cells = [unit in kept for unit in range(count)] if kind == "heads" and count <= 64 else []
    return Block(name, kind, f"{len(kept)} of {count}", cells, 100 * len(kept) / count)


def _module(name: str, module: dict[str, Any]) -> dict[str, Any]:
    importance = module.get("importance")
    return {
        "name": name,
        "kept": len(module["kept"]),
        "rank": int(module["rank"]),
        "importance": "" if importance is None else f"{importance:.3g}",
    }


def _summary(blocks: list[Block], plan: dict[str, Any]) -> str:
    """One sentence on the whole."""
    parts = []
    for kind in ("heads", "neurons"):
        rows = [units for units in plan["groups"].values() if units["kind"] == kind]
        if rows:
            kept, count = sum(len(r["kept"]) for r in rows), sum(r["count"] for r in rows)
            parts.append(f"{format_share(kept / count)} of {kind}")
    modules = plan["modules"].values()
    if modules:
        staying = sum(bool(m["kept"]) for m in modules)
        ranks = sum(len(m["kept"]) for m in modules), sum(m["rank"] for m in modules)
        parts.append(f"{staying} of {len(modules)} adapter modules with {ranks[0]} of {ranks[1]} ranks")
    return "Kept: " + ", ".join(parts) + "."
