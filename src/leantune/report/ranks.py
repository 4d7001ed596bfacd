"""LaMDA++: which layer got which rank for which score, read from the adapter's config, as a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from leantune.report.plots import ROLES, Plot, canvas, settings, to_svg

_TITLE = "Ranks by layer"


class RankedLayer(NamedTuple):
    """One adapted layer.

    Attributes:
        name: In the model.
        score: Share of the weight's energy in its leading directions, 0 to 1.
        rank: Its own.
        block: Number of the block that it is in; None outside of the blocks.
        kind: Its name within a block.
    """

    name: str
    score: float
    rank: int
    block: int | None
    kind: str


def read_ranks(run_folder: Path) -> dict[str, Any]:
    """Picture, sentence and rows of a run with spectral ranks; empty for others, or an unreadable file."""
    try:
        config = json.loads((run_folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        layers = _layers(config.get("spectral_scores") or {}, config.get("rank_pattern") or {})
        choices = config["spectral_ranks"]
        given = f"Ranks given to {len(layers)} layers under a budget of {choices['budget']} a layer"
        what = {"spread": "least", "concentrated": "most"}[choices["more_rank_to"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if not layers:
        return {}
    summary = f"{given}, more to those whose weights have the {what} of their energy in few directions."
    return {"plot": _plot(layers), "layers": layers, "summary": summary}


def _layers(scores: dict[str, float], pattern: dict[str, int]) -> list[RankedLayer]:
    """In the order of the model: by block, then by name. Layers that were pruned away have no rank now."""
    ranks = {key.removeprefix("^").replace("\\", ""): int(rank) for key, rank in pattern.items()}
    parts = {name: re.match(r"(.*?)\.(\d+)\.(.*)", name) for name in scores}
    homes: dict[str, set[str]] = {}
    for match in parts.values():
        if match:
            homes.setdefault(match[3], set()).add(match[1])
    layers = []
    for name, score in scores.items():
        match = parts[name]
        kind = name if match is None else match[3]
        if match and len(homes[kind]) > 1:  # the same in an encoder and a decoder
            kind = f"{match[1].split('.')[0]} {kind}"
        if name in ranks:
            layers.append(
                RankedLayer(name, float(score), ranks[name], int(match[2]) if match else None, kind)
            )
    return sorted(layers, key=lambda layer: (layer.block is None, layer.block or 0, layer.name))


def _plot(layers: list[RankedLayer]) -> Plot:
    """A square a layer: its side is the rank, so its area the trained parameters; its darkness the score."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    blocks = [layer.block for layer in layers if layer.block is not None]
    outside = max(blocks, default=-1) + 1  # a column for what is in no block
    largest = max(layer.rank for layer in layers)
    low, high = min(layer.score for layer in layers), max(layer.score for layer in layers)
    with settings():
        figure, axes = canvas("large")
        axes.grid(visible=False)
        for layer in layers:
            x = outside if layer.block is None else layer.block
            side = 0.92 * layer.rank / largest
            shade = 0.2 + 0.8 * (layer.score - low) / (high - low or 1)
            corner = (x - side / 2, kinds.index(layer.kind) - side / 2)
            axes.add_patch(Rectangle(corner, side, side, color=ROLES["first"], alpha=shade, linewidth=0))
        last = outside if len(blocks) < len(layers) else outside - 1
        axes.set_xlim(-0.6, last + 0.6)
        axes.set_ylim(len(kinds) - 0.4, -0.6)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=11 if len(kinds) <= 8 else 7)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if 0 <= x < outside else ""))
        axes.set_xlabel("block")
        svg = to_svg(figure, _TITLE, _describe(layers))
    return Plot(f"Side: rank, up to {largest}. Darkness: energy score, {low:.2f} to {high:.2f}", svg)


def _describe(layers: list[RankedLayer]) -> str:
    return " ".join(f"{layer.name}: score {layer.score:.3f}, rank {layer.rank}." for layer in layers)
