"""Quality against cost, one mark a method: who gives the most for what it takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from leantune.report.plots import ROLES, Plot, canvas, settings, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FONT = 10.0  # points
_LETTER = 0.6  # of the font's size: a letter's mean width
_REACH = 7.0  # points from a mark to its label


@dataclass(frozen=True)
class Mark:
    """A method's place: cost across, quality up with its spread over seeds (None: one seed)."""

    label: str
    cost: float
    values: Sequence[float]
    role: str = "ink"

    @property
    def mean(self) -> float:
        """Of the quality."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation of the quality; 0 with one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


class _Box(NamedTuple):
    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: _Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0) * max(height, 0)


class _Spot(NamedTuple):
    """Where a label could stand."""

    box: _Box
    offset: tuple[float, float]
    side: str


def trade_off_plot(
    title: str,
    marks: Sequence[Mark],
    *,
    cost: str,
    show_cost: Callable[[float], str],
    show_quality: Callable[[float], str],
    lower_is_better: bool = False,
    base: float = 1000,
) -> Plot:
    """Marks with error bars, labels beside them, and a line through those that nothing beats on both.

    Args:
        title: Above the plot.
        marks: At least one.
        cost: What runs along the x axis; it starts at zero.
        show_cost: A cost as text.
        show_quality: A quality as text.
        base: Between a unit of the cost and the next, 1024 for bytes: ticks are round in the unit shown.
        lower_is_better: The y axis is turned over, so that up and to the left is best in any case.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    with settings():
        figure, axes = canvas("large")
        largest = max(mark.cost for mark in marks) or 1.0
        axes.set_xlim(0, 1.12 * largest)
        _quality_axis(axes, marks, lower_is_better)
        axes.set_xlabel(cost)
        axes.xaxis.set_major_locator(FixedLocator(round_ticks(largest, base)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show_cost(value)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show_quality(value)))
        best = frontier(marks, lower_is_better)
        line = [(mark.cost, mark.mean) for mark in best]
        axes.plot(*zip(*line, strict=True), color=ROLES["grid"], linewidth=1.4, zorder=1)
        for mark in marks:
            axes.errorbar(
                mark.cost, mark.mean, yerr=mark.spread or None, fmt="o", markersize=6,
                color=ROLES[mark.role], elinewidth=1.2, capsize=0, clip_on=False, zorder=3,
            )  # fmt: skip
        figure.draw_without_rendering()  # the layout is settled: labels know where marks are
        _label(axes, marks)
        svg = to_svg(figure, title, _describe(marks, show_cost, show_quality))
    return Plot(title, svg)


def frontier(marks: Sequence[Mark], lower_is_better: bool = False) -> list[Mark]:
    """Marks that no other beats in cost and quality both, by rising cost."""
    sign = -1 if lower_is_better else 1
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.cost, -sign * mark.mean)):
        if not found or sign * mark.mean > sign * found[-1].mean:
            found.append(mark)
    return found


def round_ticks(largest: float, base: float) -> list[float]:
    """Five ticks or so from 0 to `largest`, round numbers in the largest unit that is not above it."""
    from matplotlib.ticker import MaxNLocator

    unit = base ** math.floor(math.log(largest, base))
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 4, 5, 10]).tick_values(0, largest / unit)
    return [float(tick) * unit for tick in ticks]


def _quality_axis(axes: Axes, marks: Sequence[Mark], lower_is_better: bool) -> None:
    low = min(mark.mean - mark.spread for mark in marks)
    high = max(mark.mean + mark.spread for mark in marks)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 0.5
    ends = (low - margin, high + margin)
    axes.set_ylim(*(ends[::-1] if lower_is_better else ends))


def _label(axes: Axes, marks: Sequence[Mark]) -> None:
    """Each label where it covers least: beside its mark, above or below, away from marks and other labels."""
    scale = 72 / axes.figure.dpi
    places = [axes.transData.transform((mark.cost, mark.mean)) * scale for mark in marks]
    taken = [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for mark, (x, _) in zip(marks, places, strict=True):  # error bars
        ends = [
            axes.transData.transform((mark.cost, mark.mean + s * mark.spread))[1] * scale for s in (-1, 1)
        ]
        taken.append(_Box(x - 2, min(ends), x + 2, max(ends)))
    frame = axes.get_window_extent().transformed(axes.figure.transFigure.inverted())
    width, height = (72 * inches for inches in axes.figure.get_size_inches())  # type: ignore[union-attr]
    inside = _Box(frame.x0 * width, frame.y0 * height, width, frame.y1 * height + _FONT)
    for mark, (x, y) in zip(marks, places, strict=True):
        spot = min(_spots(mark.label, x, y), key=lambda spot: _badness(spot, taken, inside))
        taken.append(spot.box)
        axes.annotate(
            mark.label, (mark.cost, mark.mean), spot.offset, textcoords="offset points", fontsize=_FONT,
            color=ROLES[mark.role], ha=spot.side, va="center", annotation_clip=False,
        )  # fmt: skip


def _spots(label: str, x: float, y: float) -> list[_Spot]:
    """Boxes round (x, y) in points, with the offset and alignment that put the label there."""
    wide, tall, spots = _LETTER * _FONT * len(label), 1.2 * _FONT, []
    for dx, side in ((_REACH, "left"), (-_REACH, "right"), (0.0, "center")):
        for dy in (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0):
            if not dx and not dy:
                continue
            up = dy * _FONT
            left = x + dx - {"left": 0.0, "right": wide, "center": wide / 2}[side]
            box = _Box(left - 2, y + up - tall / 2, left + wide + 2, y + up + tall / 2)
            spots.append(_Spot(box, (dx, up), side))
    return spots


def _badness(spot: _Spot, taken: Sequence[_Box], inside: _Box) -> float:
    """Area covered, and how far away the label is."""
    box = spot.box
    area = (box.right - box.left) * (box.top - box.bottom)
    outside = area - box.overlap(inside)
    return sum(box.overlap(other) for other in taken) + 4 * outside + 2 * abs(spot.offset[1])


def _describe(
    marks: Sequence[Mark], show_cost: Callable[[float], str], show_quality: Callable[[float], str]
) -> str:
    """For who cannot see the plot."""
    parts = []
    for mark in sorted(marks, key=lambda mark: mark.cost):
        spread = f" ± {show_quality(mark.spread)}" if mark.spread else ""
        parts.append(f"{mark.label}: {show_quality(mark.mean)}{spread} at {show_cost(mark.cost)}.")
    return " ".join(parts)
