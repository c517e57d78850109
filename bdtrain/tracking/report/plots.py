"""Plots with error bars as SVG: one picture, no switch of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bdtrain.tracking.refits import Plot, Series
from bdtrain.tracking.report.curves import format_error, format_tick, format_value, make_ticks
from bdtrain.tracking.report.style import PICTURE_STYLE, escape

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 26, 44
MAX_SERIES_POINTS = 400
SPOT_NAMES = {"current": "plan in use", "winner": "least"}
COLOURS = 6
"""As many as the page's style has; further series begin again with the first."""


class _Scale:
    """From values to pixels.

    Args:
        plot: what is drawn.
    """

    def __init__(self, plot: Plot) -> None:
        across = [x for series in plot.series for x, _, _ in series.points] + [spot.x for spot in plot.spots]
        across += [edge for series in plot.series for edge in series.edges]
        self.begin, self.end = min(0.0, *across, 0.0), max([*across, 0.0])
        if plot.series and not any(series.joined for series in plot.series):
            self.begin, self.end = _span(across)
        if self.end <= self.begin:
            self.end = self.begin + 1.0
        self.log = plot.log
        self.low, self.high = self._range(plot)

    def _range(self, plot: Plot) -> tuple[float, float]:
        found = []
        for _, y, error in _all_points(plot):
            found.append(y)
            low, high = y - (error or 0.0), y + (error or 0.0)
            # An error as large as the value has no lower end on a logarithmic axis.
            found += [high] if self.log and low <= 0.1 * y else [low, high]
        low, high = min(found), max(found)
        if self.log:
            return low / 1.15, high * 1.15
        return _span(found)

    def across(self, x: float) -> float:
        """Pixel of a horizontal place."""
        return LEFT + 6 + (x - self.begin) / (self.end - self.begin) * (WIDTH - LEFT - RIGHT - 12)

    def down(self, y: float) -> float:
        """Pixel of a value; what lies below the picture is put on its edge."""
        if self.log:
            y = max(y, self.low)
            share = math.log(self.high / y) / math.log(self.high / self.low)
        else:
            share = (self.high - y) / (self.high - self.low)
        return TOP + share * (HEIGHT - TOP - BOTTOM)

    def rows(self) -> list[float]:
        """Where the horizontal lines are."""
        if not self.log:
            return make_ticks(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if last - first <= 3 else (1,)
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """From the least to the largest with some room, or from 0 where that is near."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.35 * high else low - margin), high + margin


def draw_plot(plot: Plot) -> str:
    """One figure of HTML.

    Args:
        plot: with at least one point.
    """
    scale = _Scale(plot)
    parts = [_grid(plot, scale)]
    for number, (name, value, error) in enumerate(plot.levels):
        parts.append(_level(scale, "" if _binned(plot) else name, value, error, number))
    for position, series in enumerate(plot.series):
        parts.append(_series(scale, series, position))
    for spot in plot.spots:
        x, y = scale.across(spot.x), scale.down(spot.y)
        title = f"<title>{SPOT_NAMES.get(spot.kind, spot.kind)}: {escape(spot.name)}</title>"
        parts.append(f'<circle class="spot-{spot.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{_radius(spot.kind)}">'
                     f"{title}</circle>")  # fmt: skip
    legend = _legend(plot)
    notes = f'<p class="note">{escape("; ".join(plot.notes))}</p>' if plot.notes else ""
    return (
        f"<figure><figcaption>{escape(plot.title)} <span>{escape(plot.y_title)}</span></figcaption>"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_label(plot))}">'
        f"{''.join(parts)}</svg>{legend}{notes}</figure>"
    )


def standalone(plot: Plot) -> str:
    """The same picture as a file of its own, on white paper.

    Args:
        plot: with at least one point.
    """
    inside, _, _ = draw_plot(plot).partition("<svg ")[2].partition("</svg>")
    names = [series.name for series in plot.series] if len(plot.series) > 1 or plot.levels else []
    legend = "".join(
        f'<g class="s{number % COLOURS}"><rect x="{LEFT + 100 * (number % 4)}" '
        f'y="{HEIGHT + 6 + 18 * (number // 4)}" width="10" height="10" style="fill:var(--own)"/>'
        f'<text x="{LEFT + 14 + 100 * (number % 4)}" y="{HEIGHT + 15 + 18 * (number // 4)}">{escape(name)}'
        "</text></g>"
        for number, name in enumerate(names)
    )
    rows = [
        *(f"dashed: {name}" for name, _, _ in plot.levels if _binned(plot)),
        *(f"{SPOT_NAMES.get(spot.kind, spot.kind)}: {short_name(spot.name)}" for spot in plot.spots),
        *plot.notes,
    ]
    top = HEIGHT + 18 * math.ceil(len(names) / 4)
    words = "".join(
        f'<text x="{LEFT}" y="{top + 16 + 16 * number}">{escape(row)}</text>'
        for number, row in enumerate(rows)
    )
    height = top + 16 * len(rows) + 12
    body = inside.partition(">")[2]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{2 * WIDTH}" '
        f'height="{2 * height}" font-family="sans-serif"><style>{PICTURE_STYLE}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
        f'<text x="{LEFT}" y="15" font-weight="600">{escape(f"{plot.title}, {plot.y_title}")}</text>'
        f"{body}{legend}{words}</svg>\n"
    )


def _all_points(plot: Plot) -> list[tuple[float, float, float | None]]:
    return [
        *(point for series in plot.series for point in series.points),
        *((0.0, value, error) for _, value, error in plot.levels),
    ]


def _radius(kind: str) -> float:
    return 7.5 if kind == "current" else 5.0


def _grid(plot: Plot, scale: _Scale) -> str:
    parts, rows = [], scale.rows()
    for row in rows:
        y = scale.down(row)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{format_tick(row, rows)}</text>')
    columns = make_ticks(scale.begin, scale.end, 6)
    columns = [column for column in columns if not plot.whole or column == round(column)]
    for column in columns:
        x = scale.across(column)
        parts.append(
            f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{format_tick(column, columns)}</text>'
        )
        parts.append(f'<path class="tick" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>')
    parts.append(f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 7}">{escape(plot.x_title)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _level(scale: _Scale, name: str, value: float, error: float | None, number: int) -> str:
    y = scale.down(value)
    band = ""
    if error:
        top, bottom = scale.down(value + error), scale.down(value - error)
        band = (
            f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" '
            f'height="{max(bottom - top, 0.5):.1f}"/>'
        )
    # Names side by side: levels may lie close together.
    x = WIDTH - RIGHT - 120 * (number % 3)
    title = f"<title>{escape(name)}: {_with_error(value, error)}</title>"
    return (
        f'<g>{title}{band}<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="level" x="{x}" y="{y - 4:.1f}">{escape(name)}</text></g>'
    )


def _series(scale: _Scale, series: Series, position: int) -> str:
    points = series.points[:MAX_SERIES_POINTS]
    if series.edges:
        return _steps(scale, series, position)
    places = [(scale.across(x), scale.down(y)) for x, y, _ in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    bars = "".join(
        f'<path d="M{x:.1f} {scale.down(value + error):.1f}V{scale.down(value - error):.1f}"/>'
        for (x, _), (_, value, error) in zip(places, points, strict=True)
        if error
    )
    names = series.names or (series.name,) * len(points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{escape(name)}, {begin:.4g}: '
        f"{_with_error(value, error)}</title></circle>"
        for name, (x, y), (begin, value, error) in zip(names, places, points, strict=False)
    )
    line = f'<polyline points="{line}"/>' if series.joined else ""
    return f'<g class="series s{position % COLOURS}">{line}{bars}{dots}</g>'


def _steps(scale: _Scale, series: Series, position: int) -> str:
    """A level over each bin; what it says lies on a wider line that is not seen."""
    line, bins = [], []
    for (_, value, error), low, high in zip(series.points, series.edges, series.edges[1:], strict=False):
        left, right, y = scale.across(low), scale.across(high), scale.down(value)
        line += [f"{left:.1f},{y:.1f}", f"{right:.1f},{y:.1f}"]
        counts = f"{math.ceil(low)} to {math.floor(high)}" if high - low > 1 else f"{(low + high) / 2:g}"
        bins.append(
            f'<path class="bin" d="M{left:.1f} {y:.1f}H{right:.1f}"><title>{escape(series.name)}, {counts}: '
            f"{_with_error(value, error)}</title></path>"
        )
    return f'<g class="series s{position % COLOURS}"><polyline points="{" ".join(line)}"/>{"".join(bins)}</g>'


def _binned(plot: Plot) -> bool:
    """Whether levels are named below the picture: over bins there is no room for words."""
    return any(series.edges for series in plot.series)


def _legend(plot: Plot) -> str:
    entries = []
    if len(plot.series) > 1 or plot.levels:
        entries = [
            f'<span><i class="s{position % COLOURS}"></i>{escape(series.name)}</span>'
            for position, series in enumerate(plot.series)
        ]
    named: dict[str, Sequence[str]] = {}
    for spot in plot.spots:
        named[spot.kind] = [spot.name]
    if _binned(plot):
        entries += [f'<span><i class="dashes"></i>{escape(name)}</span>' for name, _, _ in plot.levels]
    for kind, names in named.items():
        words = f"{SPOT_NAMES.get(kind, kind)}: {escape(short_name(names[0]))}"
        entries.append(f'<span><i class="ring-{escape(kind)}"></i>{words}</span>')
    return f'<div class="legend">{"".join(entries)}</div>' if entries else ""


def short_name(name: str) -> str:
    """A plan's name as what it is: ``current (clip 0.5-1)`` without the word around it."""
    return name.removeprefix("current (").removesuffix(")") if name.startswith("current (") else name


def _with_error(value: float, error: float | None) -> str:
    return format_value(value) + (f" ± {format_error(error)}" if error else "")


def _label(plot: Plot) -> str:
    least = min(_all_points(plot), key=lambda point: point[1])
    return f"{plot.title}: {plot.y_title} against {plot.x_title}, least {format_value(least[1])}"
