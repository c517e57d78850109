"""Curves as SVG, each drawn once for every horizontal axis; the page shows one of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bdtrain.tracking.report.columns import Column, Metrics, interpolate
from bdtrain.tracking.report.style import escape

MAX_POINTS = 1000
MAX_MARKS = 100
WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 42


@dataclass(frozen=True)
class Axis:
    """A horizontal axis.

    Attributes:
        name: for the page's own use.
        title: shown on the switch.
        unit: under the curves.
        place: where a step lies that was reported at a time.
    """

    name: str
    title: str
    unit: str
    place: Callable[[float, float], float]


@dataclass(frozen=True)
class Mark:
    """Something that happened.

    Attributes:
        step: when.
        time: when, seconds since 1970.
        kind: ``attempt`` or ``fault``.
        text: what.
    """

    step: int
    time: float
    kind: str
    text: str


@dataclass
class Curve:
    """What one picture shows.

    Attributes:
        name: of the metric.
        title: above the picture.
        unit: of the values.
        column: the values.
        errors: half the length of a bar by step, thick ones first; empty where nothing is known.
        levels: horizontal lines to compare with, by name.
        dots: whether each value gets a dot.
        limit: draw at most so many values.
    """

    name: str
    title: str
    unit: str
    column: Column
    errors: Sequence[dict[int, float]] = ()
    levels: dict[str, float] = field(default_factory=dict)
    dots: bool = False
    limit: int = MAX_POINTS


def make_axes(metrics: Metrics) -> list[Axis]:
    """The horizontal axes for which the metrics file holds what is needed."""
    axes = [Axis("steps", "steps", "steps", lambda step, _: step)]
    tokens = metrics.columns["train/tokens"]
    if tokens.steps:
        # A report at step 0 has no line of its own that counts tokens.
        steps, values = [0.0, *tokens.steps], [0.0, *tokens.values]
        axes.append(Axis("tokens", "tokens", "tokens", lambda step, _: interpolate(steps, values, step) or 0))
    cpu = metrics.columns["perf/cpu_seconds"]
    if cpu.steps:
        # As above: step 0 has no line that counts.
        knots = [0.0, *cpu.steps]
        whole = [0.0] + [
            value + metrics.cpu_before.get(attempt, 0.0)
            for value, attempt in zip(cpu.values, cpu.attempts, strict=True)
        ]
        axes.append(
            Axis(
                "cpu",
                "CPU time",
                "CPU seconds of rank 0, all attempts",
                lambda step, _: interpolate(knots, whole, step) or 0,
            )
        )
    if metrics.first_time is not None:
        first = metrics.first_time
        axes.append(Axis("wall", "wall time", "seconds since the first start", lambda _, time: time - first))
    return axes


def thin(values: Sequence[float], limit: int = MAX_POINTS) -> list[int]:
    """Which of many values to draw: the first, the last, and the least and the greatest of each bin.

    Args:
        values: finite ones are drawn.
        limit: at most so many, 4 or more.

    Returns:
        Positions, ascending.
    """
    finite = [position for position, value in enumerate(values) if math.isfinite(value)]
    if len(finite) <= limit:
        return finite
    bins = (limit - 2) // 2
    chosen = {finite[0], finite[-1]}
    for number in range(bins):
        part = finite[len(finite) * number // bins : len(finite) * (number + 1) // bins]
        chosen.add(min(part, key=values.__getitem__))
        chosen.add(max(part, key=values.__getitem__))
    return sorted(chosen)


def draw_curve(
    curve: Curve, axes: Sequence[Axis], marks: Sequence[Mark], until: tuple[int, float] = (0, 0.0)
) -> str:
    """One figure.

    Args:
        curve: what to draw.
        axes: every horizontal axis.
        marks: what happened meanwhile.
        until: step and time to which every picture of the page reaches, so that they can be compared.

    Returns:
        HTML; an empty text where there is nothing finite to draw.
    """
    chosen = thin(curve.column.values, curve.limit)
    if not chosen:
        return ""
    points = [(curve.column.steps[i], curve.column.times[i], curve.column.values[i]) for i in chosen]
    low, high, ticks = _vertical_range(curve, points)
    pictures = [
        _draw_on_axis(curve, axis, points, marks, until, low, high, ticks, label=_label(curve, points))
        for axis in axes
    ]
    lost = len(curve.column.values) - sum(map(math.isfinite, curve.column.values))
    notes = [f"{name} {format_value(level)}" for name, level in curve.levels.items()]
    notes += [f"{lost} values that are not finite are left out"] if lost else []
    note = f'<p class="note">{escape("; ".join(notes))}</p>' if notes else ""
    return (
        f'<figure data-metric="{escape(curve.name)}"><figcaption>{escape(curve.title)} '
        f"<span>{escape(curve.unit)}</span><output></output></figcaption>{''.join(pictures)}{note}"
        "</figure>"
    )


def _label(curve: Curve, points: Sequence[tuple[int, float, float]]) -> str:
    (first, _, before), (last, _, after) = points[0], points[-1]
    return (
        f"{curve.title}: {format_value(before)} at step {first}, {format_value(after)} at step {last} "
        f"({curve.unit})"
    )


def _vertical_range(
    curve: Curve, points: Sequence[tuple[int, float, float]]
) -> tuple[float, float, list[float]]:
    """Lowest and highest value to show, and where the lines are."""
    values = [value for _, _, value in points]
    for errors in curve.errors:
        for step, _, value in points:
            bar = errors.get(step, 0.0)
            values += [value - bar, value + bar]
    values += curve.levels.values()
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    if 0 <= low < 0.35 * high:
        return 0.0, high + margin, make_ticks(0.0, high + margin)
    low, high = low - margin, high + margin
    return low, high, make_ticks(low, high)


def make_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About so many round numbers between two."""
    width = (high - low) / count
    if not math.isfinite(width) or width <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(width))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= width * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _draw_on_axis(
    curve: Curve,
    axis: Axis,
    points: Sequence[tuple[int, float, float]],
    marks: Sequence[Mark],
    until: tuple[int, float],
    low: float,
    high: float,
    ticks: Sequence[float],
    *,
    label: str,
) -> str:
    places = [axis.place(step, time) for step, time, _ in points]
    begin, end = min(0.0, *places), max(axis.place(*until), *places)
    end = end if end > begin else begin + 1.0

    def across(place: float) -> float:
        return LEFT + (place - begin) / (end - begin) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [draw_grid(across, down, ticks, make_ticks(begin, end, 5), axis.unit)]
    parts += [_level(name, down(level), number) for number, (name, level) in enumerate(curve.levels.items())]
    for mark in marks[:MAX_MARKS]:
        place = axis.place(mark.step, mark.time)
        if begin <= place <= end:
            parts.append(_mark(mark, across(place)))
    for kind, errors in enumerate(curve.errors):
        for place, (step, _, value) in zip(places, points, strict=True):
            if step in errors:
                x, bar = across(place), errors[step]
                parts.append(
                    f'<path class="bar{kind}" d="M{x:.1f} {down(value - bar):.1f}V{down(value + bar):.1f}"/>'
                )
    pixels = [
        f"{across(place):.1f},{down(value):.2f}" for place, (_, _, value) in zip(places, points, strict=True)
    ]
    parts.append(f'<polyline class="curve" points="{" ".join(pixels)}"/>')
    if curve.dots or len(points) == 1:
        dots = "".join(
            f'<circle cx="{pixel.split(",")[0]}" cy="{pixel.split(",")[1]}" r="3"/>' for pixel in pixels
        )
        parts.append(f'<g class="dots">{dots}</g>')
    parts.append('<circle class="cursor" r="4"/>')
    return (
        f'<svg class="on-{axis.name}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def draw_grid(
    across: Callable[[float], float],
    down: Callable[[float], float],
    rows: Sequence[float],
    columns: Sequence[float],
    unit: str,
) -> str:
    """Lines, ticks and their labels.

    Args:
        across: pixel of a horizontal place.
        down: pixel of a value.
        rows: values with a line.
        columns: places with a tick.
        unit: of the places.
    """
    parts = []
    for row in rows:
        y = down(row)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{format_tick(row, rows)}</text>')
    for column in columns:
        x = across(column)
        label = format_tick(column, columns)
        parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{label}</text>')
        parts.append(f'<path class="tick" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>')
    parts.append(f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}">{escape(unit)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _level(name: str, y: float, number: int) -> str:
    # Names side by side: levels may lie close together.
    x = WIDTH - RIGHT - 62 * number
    return (
        f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="level" x="{x}" y="{y - 3:.1f}">{escape(name)}</text>'
    )


def _mark(mark: Mark, x: float) -> str:
    title = f"<title>{escape(mark.text)}</title>"
    if mark.kind == "attempt":
        return f'<g class="attempt">{title}<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/></g>'
    y = HEIGHT - BOTTOM
    return f'<g class="fault">{title}<path d="M{x - 4:.1f} {y}l4 -8l4 8z"/></g>'


def format_value(value: float) -> str:
    """A number with four digits: 0.004, 2.083, 1,228."""
    if not math.isfinite(value):
        return str(value)
    # The form is that of what is shown: 999.97 is 1,000.
    size = abs(float(f"{value:.4g}"))
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.3g}"
    return f"{value:#.4g}" if size >= 1 else f"{value:.4g}"


def format_error(error: float) -> str:
    """A standard error with two digits; whole from 100 on."""
    size = float(f"{error:.2g}")
    return f"{error:,.0f}" if 100 <= size < 1e7 else f"{error:.2g}"


def format_tick(value: float, ticks: Sequence[float]) -> str:
    """A round number on an axis, with a suffix where all of them are large."""
    largest = max(abs(tick) for tick in ticks)
    for limit, unit, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if largest >= limit:
            return f"{value / unit:.4g}{suffix}" if value else "0"
    # What is left of a sum that should be zero.
    return f"{value:.4g}" if abs(value) > 1e-9 * largest else "0"
