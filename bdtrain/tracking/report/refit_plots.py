"""The pictures of a re-fit: variance against the range, or the fitted counts, and what depends on the count.

What a report does not hold is not drawn; nothing here raises for what it does hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bdtrain.tracking.json_files import number, section
from bdtrain.tracking.refits import (
    LOG_RATIO,
    Plot,
    Refit,
    Series,
    Spot,
    drawable,
    objects,
    plot_variance,
)
from bdtrain.tracking.report.curves import format_error, format_value
from bdtrain.tracking.report.plots import short_name

MASKED = "masked tokens of the block"
MIN_PLANS = 3
RANGES = "clip ranges are other objectives, drawn for the correlation alone"
EVEN = 1e-3
"""Counts drawn with relative frequencies this close to 1 are uniform."""


def list_plots(refit: Refit, *, limit: int = 4) -> Iterator[Plot]:
    """The pictures of a re-fit, for each block size.

    Args:
        refit: with its results.
        limit: of block sizes.
    """
    for size, result in list(refit.results.items())[:limit]:
        gradients = refit.gradients.get(size, {})
        for plot in (
            plot_counts(result, size) if _fits_counts(result) else plot_variance(result, size),
            plot_losses(result, size),
            plot_loss_variance(result, size),
            plot_gradient_variance(gradients, size),
            plot_correlation(result, gradients, size),
        ):
            if plot is not None:
                yield plot


def _fits_counts(result: Mapping[str, Any]) -> bool:
    return section(result, "settings").get("mode") == "counts"


# -- Plans over the number of masked tokens ------------------------------------------------------------------


def plot_counts(result: Mapping[str, Any], block_size: int) -> Plot | None:
    """How often each number of masked tokens is drawn, over how often it is when all are drawn alike.

    One series for the plan in use, for the fitted one and, where it is another one, for the schedule's own;
    a plan that draws all counts alike is the level 1.

    Args:
        result: of a search of mode ``counts``.
        block_size: that it was made for, 1 or more.

    Returns:
        None where the result holds nothing to draw.
    """
    cells = _cells(result, "losses")
    series, even, notes = [], ["uniform"], []
    for candidate in objects(result, "candidates"):
        name = _title_of(result, candidate)
        found = _relative(candidate.get("drawn"), cells, block_size)
        if not found:
            continue
        variance = drawable(candidate, "variance")
        if variance is not None:
            notes.append(f"{name}: {_with_error(variance, drawable(candidate, 'variance_error'))}")
        if all(abs(value - 1.0) <= EVEN for value in found):
            even.append(name)
            continue
        points = tuple(
            ((low + high) / 2, value, None) for (low, high), value in zip(cells, found, strict=True)
        )
        edges = tuple([low - 0.5 for low, _ in cells] + [cells[-1][1] + 0.5])
        series.append(Series(name, points, edges=edges))
    if not series and len(even) == 1:
        return None
    return Plot(
        title=f"How often mask counts are drawn, block size {block_size}",
        x_title=MASKED,
        y_title="times as often as uniform",
        series=tuple(series),
        levels=((" = ".join(even), 1.0, None),),
        whole=True,
        notes=(f"variance in nats²/token²: {'; '.join(notes)}",) if notes else (),
    )


def _title_of(result: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    if candidate.get("is_current") is True:
        return "in use before"
    if isinstance(candidate.get("density"), list):
        # What the search says: the run may have come too late for it, and a sweep adopts nothing.
        better = result.get("adopt") is True and candidate.get("name") == result.get("winner")
        return "fitted (better)" if better else "fitted (no better)"
    return str(candidate.get("name", "?"))


def _cells(values: Mapping[str, Any], name: str) -> list[tuple[int, int]]:
    """Lowest and highest count of each cell; none where they are not in order."""
    found: list[tuple[int, int]] = []
    for entry in objects(values, name):
        low, high = drawable(entry, "masked_low"), drawable(entry, "masked_high")
        if low is None or high is None or not (found[-1][1] if found else 0) < low <= high:
            return []
        found.append((int(low), int(high)))
    return found


def _relative(shares: Any, cells: list[tuple[int, int]], block_size: int) -> list[float]:
    """Frequencies of the cells over those of uniform counts; none where they are no frequencies."""
    if not isinstance(shares, list) or len(shares) != len(cells):
        return []
    values = [number({"share": share}, "share") for share in shares]
    if not all(value is not None and 0.0 <= value <= 1.0 for value in values):
        return []
    return [
        float(value or 0.0) * block_size / (high - low + 1)
        for value, (low, high) in zip(values, cells, strict=True)
    ]


# -- Loss and gradient over the number of masked tokens ------------------------------------------------------


def plot_losses(result: Mapping[str, Any], block_size: int) -> Plot | None:
    """Loss per masked token against the number of masked tokens.

    Args:
        result: of a search.
        block_size: that it was made for.

    Returns:
        None where the result holds nothing to draw.
    """
    return _plot_by_count(
        result, "losses", "nll", f"Loss by mask count, block size {block_size}", "nats/masked token"
    )


def plot_loss_variance(result: Mapping[str, Any], block_size: int) -> Plot | None:
    """Variance of a block's summed loss, given how many of its tokens are masked.

    Args:
        result: of a search.
        block_size: that it was made for.

    Returns:
        None where the result holds nothing to draw.
    """
    return _plot_by_count(
        result,
        "losses",
        "block_variance",
        f"Loss variance by mask count, block size {block_size}",
        "nats²",
    )


def plot_gradient_variance(gradients: Mapping[str, Any], block_size: int) -> Plot | None:
    """Variance of the last layer's gradient of a block's summed loss, given how many tokens are masked.

    Args:
        gradients: of a re-fit's report.
        block_size: that they were measured for.

    Returns:
        None where there is nothing to draw.
    """
    return _plot_by_count(
        gradients,
        "counts",
        "variance",
        f"Gradient variance by mask count, block size {block_size}",
        "last layer, nats²",
    )


def _plot_by_count(
    values: Mapping[str, Any], name: str, quantity: str, title: str, y_title: str
) -> Plot | None:
    points, widest = [], 1
    for entry in objects(values, name):
        low, high, value = (drawable(entry, key) for key in ("masked_low", "masked_high", quantity))
        if low is not None and high is not None and value is not None:
            points.append(((low + high) / 2, value, drawable(entry, f"{quantity}_error")))
            widest = max(widest, int(high - low) + 1)
    if not points:
        return None
    heights = [value for _, value, _ in points]
    return Plot(
        title=title,
        x_title=MASKED,
        y_title=y_title,
        series=(Series("measured", tuple(sorted(points))),),
        log=min(heights) > 0 and max(heights) > LOG_RATIO * min(heights),
        whole=True,
        notes=(f"each point stands for up to {widest} counts",) if widest > 1 else (),
    )


def plot_correlation(result: Mapping[str, Any], gradients: Mapping[str, Any], block_size: int) -> Plot | None:
    """Both variances of every plan of a search: whether the loss stands for the gradient.

    Args:
        result: of the search.
        gradients: of the re-fit's report.
        block_size: that they were measured for.

    Returns:
        None where fewer than ``MIN_PLANS`` can be drawn.
    """
    rows = objects(result, "candidates")
    current = {str(entry.get("name")) for entry in rows if entry.get("is_current") is True}
    points, names, spots = [], [], []
    for plan in objects(gradients, "plans"):
        loss, gradient = drawable(plan, "nelbo"), drawable(plan, "gradient")
        if loss is None or gradient is None or plan.get("finite") is False:
            continue
        points.append((loss, gradient, drawable(plan, "gradient_error")))
        name = str(plan.get("name", "?"))
        names.append(name)
        spots += [Spot("current", name, loss, gradient)] if name in current else []
        spots += [Spot("winner", name, loss, gradient)] if name == result.get("winner") else []
    if len(points) < MIN_PLANS:
        return None
    order = sorted(range(len(points)), key=lambda position: points[position][:2])
    return Plot(
        title=f"Gradient variance by loss variance, block size {block_size}",
        x_title="loss, nats²/token²",
        y_title="last layer's gradient, nats²/token²",
        series=(
            Series(
                "plans",
                tuple(points[position] for position in order),
                joined=False,
                names=tuple(short_name(names[position]) for position in order),
            ),
        ),
        spots=tuple(spots),
        notes=(*describe_correlation(gradients), *([RANGES] if _fits_counts(result) else [])),
    )


def describe_correlation(gradients: Mapping[str, Any]) -> list[str]:
    """How well the variance of the loss stands for that of the gradient, in sentences; none if not known.

    Args:
        gradients: of a re-fit's report.
    """
    pearson, spearman = (show_correlation(gradients, kind) for kind in ("pearson", "spearman"))
    count = sum(plan.get("finite") is not False for plan in objects(gradients, "plans"))
    words = []
    if pearson:
        ranks = f", of ranks {spearman}" if spearman else ""
        words.append(f"correlation {pearson}{ranks}, over {count} plans")
    excess, least = number(gradients, "excess"), gradients.get("least_gradient")
    if not isinstance(least, str):
        return words
    least = short_name(least)
    if gradients["least_gradient"] == gradients.get("least_nelbo"):
        words.append(f"{least} has the least of both")
    elif excess is not None:
        words.append(
            f"{least} has the least gradient variance, and the plan of least loss variance {excess:.1%} more"
        )
    return words


def show_correlation(gradients: Mapping[str, Any], kind: str) -> str:
    """A correlation with its error; nothing where there is none.

    Args:
        gradients: of a re-fit's report.
        kind: ``pearson`` or ``spearman``.
    """
    value, error = number(gradients, kind), number(gradients, f"{kind}_error")
    if value is None or abs(value) > 1.001:
        return ""
    if not error:
        return f"{value:.3f}"
    words = format_error(error)
    return f"{value:.{max(3, len(words.partition('.')[2]))}f} ± {words}"


def _with_error(value: float, error: float | None) -> str:
    return format_value(value) + (f" ± {format_error(error)}" if error else "")
