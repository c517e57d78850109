"""Pictures of a re-fit as files: PNG where matplotlib is installed, else the report's SVG.

Made in the shipping process, so that matplotlib's import costs the trainer nothing.
"""

from __future__ import annotations

import math
import textwrap
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bdtrain.tracking.refits import Plot, Refit, Series
from bdtrain.tracking.report.plots import SPOT_NAMES, short_name, standalone
from bdtrain.tracking.report.refit_plots import list_plots

COLOURS = ("#6a3d9a", "#1f6fb2", "#17868a", "#4f8f2f", "#b0820f", "#b3302b")
SPOTS = MappingProxyType(
    {
        "current": {"s": 130, "facecolors": "none", "edgecolors": "#1d2126", "linewidths": 1.6},
        "winner": {"s": 60, "facecolors": "none", "edgecolors": "#1b7a48", "linewidths": 2.6},
    }
)
DPI = 130
TITLE_CHARACTERS, NOTE_CHARACTERS = 64, 86
"""As many as fit above and below a plot."""


def has_matplotlib() -> bool:
    """Whether matplotlib is installed; it is not imported."""
    return find_spec("matplotlib") is not None


def draw_refit(refit: Refit | None, base: Path) -> list[Path]:
    """Draw a re-fit: variance against range or fitted counts, and what was measured by mask count.

    Args:
        refit: None, or one without a report, has no pictures.
        base: path of the picture without its suffix.

    Returns:
        The files: one PNG, or one SVG for each plot.
    """
    plots = list(list_plots(refit)) if refit is not None else []
    if not plots:
        return []
    if has_matplotlib():
        path = base.with_name(f"{base.name}.png")
        title = f"re-fit of step {refit.step}: {refit.outcome}" if refit is not None else ""
        _save_png(plots, path, title)
        return [path]
    found = []
    for number, plot in enumerate(plots):
        path = base.with_name(f"{base.name}{f'-{number + 1}' if number else ''}.svg")
        path.write_text(standalone(plot), encoding="utf-8")
        found.append(path)
    return found


def _save_png(plots: list[Plot], path: Path, title: str) -> None:
    # Not pyplot, which keeps every figure and may look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(plots) / 2)
    figure = Figure(figsize=(12.0, 0.5 + 4.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for number, plot in enumerate(plots):
        _draw(figure.add_subplot(rows, min(2, len(plots)), number + 1), plot)
    # No date inside: the same re-fit is the same file.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _draw(axes: Any, plot: Plot) -> None:
    for name, value, error in plot.levels:
        axes.axhline(value, color="#a9620b", linestyle="--", linewidth=1.2, label=name)
        if error:
            axes.axhspan(value - error, value + error, color="#a9620b", alpha=0.13, linewidth=0)
    for number, series in enumerate(plot.series):
        label = series.name if len(plot.series) > 1 or plot.levels else None
        _draw_series(axes, series, label, COLOURS[number % len(COLOURS)])
    for spot in plot.spots:
        label = f"{SPOT_NAMES.get(spot.kind, spot.kind)}: {short_name(spot.name)}"
        axes.scatter([spot.x], [spot.y], label=label, zorder=5, **SPOTS.get(spot.kind, SPOTS["current"]))
    if plot.log:
        axes.set_yscale("log")
    axes.set_title(textwrap.fill(plot.title, TITLE_CHARACTERS), fontsize=10.5, loc="left")
    axes.locator_params(axis="x", nbins=8, integer=plot.whole)
    axes.set_xlabel(plot.x_title)
    axes.set_ylabel(plot.y_title)
    axes.grid(color="#e1e3e1", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8.5, frameon=False)
    if plot.notes:
        words = textwrap.fill("; ".join(plot.notes), NOTE_CHARACTERS)
        place = {"transform": axes.transAxes, "verticalalignment": "top"}
        axes.text(0.0, -0.17, words, fontsize=8.5, color="#5c6570", **place)


def _draw_series(axes: Any, series: Series, label: str | None, colour: str) -> None:
    xs, ys, errors = zip(*series.points, strict=True)
    if series.edges:
        axes.stairs(ys, series.edges, baseline=None, label=label, color=colour, linewidth=1.4)
        return
    axes.errorbar(
        xs,
        ys,
        yerr=[error or 0.0 for error in errors],
        label=label,
        color=colour,
        linewidth=1.3,
        linestyle="-" if series.joined else "",
        elinewidth=1.0,
        marker="o",
        markersize=3.2,
    )
