"""Plots as inline SVG whose text and colours belong to the page around them.

matplotlib draws with stand-in colours; in the SVG they become CSS variables of `page.css`. So one drawing is
right in dark and light and on paper, without a script. Keys of the lines stand in HTML above a plot, where a
phone can read them.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup, escape

from leantune.report.runlog import Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = Literal["line", "faint", "dots", "steps"]
Size = Literal["large", "small"]

# role → stand-in colour; `page.css` defines --plot-ROLE. The values only have to be unlike each other.
ROLES = {
    "ink": "#000101",
    "grid": "#000102",
    "first": "#000103",
    "second": "#000104",
    "third": "#000105",
    "fourth": "#000106",
}
SERIES_ROLES = ("first", "second", "third", "fourth")
_INCHES = {"large": (5.0, 2.8), "small": (4.2, 2.35)}  # at 72 points an inch: 360 and 302 CSS pixels wide
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "leantune",  # the same run gives the same page, byte for byte
    "font.family": "sans-serif",
    "font.size": 11.0,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # texts come from data: a "$" is a dollar
    "axes.linewidth": 0.8,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Series:
    """One line of a plot: what it is called, its points, its colour's role and how it is drawn.

    `within`, where given, are the values that the plot must show of it; beyond them it may leave the frame.
    """

    label: str
    points: Points
    role: str = "first"
    style: Style = "line"
    within: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plot:
    """A finished plot: the SVG, and what the page says around it."""

    title: str
    svg: Markup
    keys: Sequence[Series] = ()
    size: Size = "large"


def line_plot(
    title: str,
    series: Sequence[Series],
    *,
    size: Size = "large",
    percent: bool = False,
    log: bool = False,
    from_zero: bool = False,
    last: float = 0,
    x_label: str = "step",
) -> Plot:
    """Lines over steps.

    Args:
        title: What is shown; stands above the plot and names the SVG for screen readers.
        series: The lines, drawn in this order. "faint" ones get no key of their own.
        size: "large" for the two first plots of a page, "small" for the rest.
        percent: Values are fractions, shown in percent.
        log: Logarithmic y axis (see `frame`; its lower end must be positive).
        from_zero: The y axis starts at zero (not with `log`).
        last: The x axis goes from zero at least to here, so that all plots of a run line up.
        x_label: What runs along the x axis.
    """
    with settings():
        figure, axes = canvas(size)
        for each in series:
            _draw(axes, each, size)
        axes.set_xlabel(x_label)
        axes.set_xlim(0, max([last, *(x for each in series for x in each.points.x)]))
        _y_axis(axes, frame(series), log=log, from_zero=from_zero)
        _ticks(axes, percent=percent, log=log)
        svg = to_svg(figure, title, _describe(series, percent))
    keys = [each for each in series if each.style != "faint"]
    return Plot(title, svg, keys if len(keys) > 1 else (), size)


def frame(series: Sequence[Series]) -> tuple[float, float]:
    """Lowest and highest value that a plot of `series` must show."""
    limits = [each.within or (min(each.points.y), max(each.points.y)) for each in series]
    return min(low for low, _ in limits), max(high for _, high in limits)


def _y_axis(axes: Axes, limits: tuple[float, float], *, log: bool, from_zero: bool) -> None:
    low, high = limits
    if log:
        margin = (high / low) ** 0.06
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
    elif high > low:
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)
    if from_zero:
        axes.set_ylim(bottom=0)


def settings() -> Any:
    """matplotlib as every plot of a page wants it, while a `with` block lasts."""
    import matplotlib

    return matplotlib.rc_context(_SETTINGS)


def canvas(size: Size) -> tuple[Figure, Axes]:
    """An empty figure in the page's style. No pyplot: nothing is kept or shared between plots."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02)
    figure = Figure(figsize=_INCHES[size], layout=layout, facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.grid(axis="y", color=ROLES["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ROLES["grid"])
    axes.tick_params(which="both", length=0, labelcolor=ROLES["ink"], pad=5)
    axes.xaxis.label.set_color(ROLES["ink"])
    axes.yaxis.label.set_color(ROLES["ink"])
    return figure, axes


def _draw(axes: Axes, series: Series, size: Size) -> None:
    colour, x, y = ROLES[series.role], series.points.x, series.points.y
    if series.style == "faint":
        axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.3, solid_joinstyle="round")
    elif series.style == "dots" or len(series.points) == 1:
        axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=5, clip_on=False)
    else:
        where = "steps-post" if series.style == "steps" else "default"
        axes.plot(x, y, color=colour, linewidth=2.0, drawstyle=where, solid_capstyle="round")  # type: ignore[arg-type]


def _ticks(axes: Axes, *, percent: bool, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from leantune.report.formats import format_rate

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands if axes.get_xlim()[1] >= 10_000 else _whole))
    if not log:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    elif axes.get_ylim()[1] / axes.get_ylim()[0] < 10_000:
        # within few decades the minor ticks' labels would crowd the major ones
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g} %"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_rate(value)))


def _whole(value: float, _position: object = None) -> str:
    return f"{value:,g}"


def _thousands(value: float, _position: object = None) -> str:
    return f"{value / 1000:g}k" if value else "0"


def _describe(series: Sequence[Series], percent: bool) -> str:
    """For who cannot see the plot: where each line starts, ends, and its range."""

    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3g}"

    parts = []
    for each in series:
        if each.style == "faint" or not each.points:
            continue
        y = each.points.y
        parts.append(
            f"{each.label}: {show(y[0])} at step {each.points.x[0]:g}, {show(y[-1])} at step "
            f"{each.points.x[-1]:g}; lowest {show(min(y))}, highest {show(max(y))}."
        )
    return " ".join(parts)


def to_svg(figure: Figure, title: str, description: str) -> Markup:
    """`figure` as an SVG element for the page: themed, titled, with ids that no other plot has."""
    prefix = "p" + hashlib.sha256(f"{title}\0{description}".encode()).hexdigest()[:8]
    buffer = io.StringIO()
    with warnings.catch_warnings(), settings():
        # a script that matplotlib's own font lacks is the reader's browser's business
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    # matplotlib's <style> says `*`: inside a page that is every element; page.css says it for plots alone
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = svg[svg.index("<svg") :]
    inner = svg[svg.index(">") + 1 :]
    width, height = (72 * inches for inches in figure.get_size_inches())
    for role, colour in ROLES.items():
        inner = inner.replace(colour, f"var(--plot-{role})")
    inner = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", inner)
    inner = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', inner)
    inner = inner.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    return Markup(  # noqa: S704 matplotlib escapes the texts that it draws, ours are escaped here
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{prefix}-t {prefix}-d">'
        f'<title id="{prefix}-t">{escape(title)}</title><desc id="{prefix}-d">{escape(description)}</desc>'
        f"{inner}"
    )
