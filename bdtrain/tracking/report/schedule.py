"""The noise plan of a run and its re-fits, as pieces of the report's page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bdtrain.tracking.names import find_metric
from bdtrain.tracking.refits import NO_RESULT, Plot, Refit, describe_plan
from bdtrain.tracking.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    draw_grid,
    format_error,
    format_value,
    make_axes,
    make_ticks,
)
from bdtrain.tracking.report.plots import draw_plot
from bdtrain.tracking.report.read import Run, number, section
from bdtrain.tracking.report.refit_plots import list_plots, show_correlation
from bdtrain.tracking.report.style import escape

DRAWN_REFITS = 3
DRAWN_PLANS = 500
OPEN_REFITS = 8
"""As many as the table shows at first."""

RANGE = ("sched/beta", "sched/omega")
"""Metrics that the picture of the clip range stands for."""


def show_schedule(run: Run, refits: Sequence[Refit]) -> str:
    """The section of the re-fits; nothing for a run without any.

    Args:
        run: the run.
        refits: of it.
    """
    if not refits:
        return ""
    newest = list(reversed(refits))
    heads = (
        *(("step", "n"), ("used from", "n"), ("outcome", ""), ("plan before", ""), ("plan after", "")),
        *(("version", "n"), ("variance before", "n"), ("best", "n"), ("gain", "n"), ("P(best)", "n")),
        ("at edge", ""),
    )
    head = "".join(f'<th class="{kind}">{name}</th>' if kind else f"<th>{name}</th>" for name, kind in heads)
    earlier = ""
    if newest[OPEN_REFITS:]:
        words = f"{len(newest) - OPEN_REFITS} earlier re-fits"
        table = _table(head, newest[OPEN_REFITS:])
        earlier = f"<details><summary>{words}</summary>{table}</details>"
    metric = find_metric("sched/variance")
    notes = [f"Variances in {metric.unit}: {metric.meaning}." if metric else "", *_meanings(refits)]
    return (
        f'<section><h2>Noise schedule <span class="soft">{escape(summarise(run, refits))}</span></h2>'
        f"{_table(head, newest[:OPEN_REFITS])}{earlier}"
        f'<p class="note">{" ".join(notes)}</p>{_pictures(refits)}</section>'
    )


def _table(head: str, refits: Sequence[Refit]) -> str:
    rows = "".join(map(_row, refits))
    return f'<div class="scroll"><table class="refits"><tr>{head}</tr>{rows}</table></div>'


def summarise(run: Run, refits: Sequence[Refit]) -> str:
    """How often the plan was re-fitted, and which one is in force."""
    settled = [refit for refit in refits if refit.outcome != "pending"]
    counts = [f"{len(settled)} re-fit{'s' * (len(settled) != 1)}"]
    for outcome in ("adopted", "kept", *NO_RESULT):
        count = sum(refit.outcome == outcome for refit in settled)
        counts += [f"{count} {outcome}"] if count else []
    now = next((refit.after for refit in reversed(settled) if refit.after), "")
    now = now or describe_plan(section(section(run.config, "diffusion"), "plan"))
    return f"{', '.join(counts)}; in force: {now}"


def _row(refit: Refit) -> str:
    metrics = refit.metrics
    best, best_error = _best(refit)
    gain, share = number(metrics, "sched/gain"), number(metrics, "sched/p_best")
    cells = [
        ("n", f"{refit.step:,}"),
        ("n", "" if refit.adopt_step is None else f"{refit.adopt_step:,}"),
        ("", escape(refit.outcome)),
        ("w", escape(refit.before)),
        ("w", "" if refit.outcome == "pending" else escape(refit.after)),
        ("n", "" if refit.version is None else str(refit.version)),
        ("n", _with_error(number(metrics, "sched/variance"), number(metrics, "sched/variance_error"))),
        ("n", _with_error(best, best_error)),
        ("n", "" if gain is None else f"{gain:,.1%}"),
        ("n", "" if share is None else f"{share:.2f}"),
        ("", escape(_edges(refit))),
    ]
    body = "".join(f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>" for kind, text in cells)
    kind = "fault" if refit.outcome in NO_RESULT else ""
    why = refit.reason
    if refit.outcome == "pending":
        why = "not settled: the run has not reached the step at which its plan is due"
    if correlation := _correlation(refit):
        why = f"{why} Variances of loss and gradient: correlation {correlation}."
    return (
        f'<tr class="{kind} first">{body}</tr>'
        f'<tr class="{kind}"><td class="why" colspan="{len(cells)}">'
        f"<div>{escape(why)}</div></td></tr>"
    )


def _best(refit: Refit) -> tuple[float | None, float | None]:
    """Variance of the best plan, with its error where the report has it."""
    value = number(refit.metrics, "sched/variance_best")
    for result in refit.results.values():
        candidates = result.get("candidates")
        for candidate in candidates if isinstance(candidates, list) else []:
            if isinstance(candidate, dict) and candidate.get("name") == result.get("winner"):
                found = number(candidate, "variance")
                if value is None or found == value:
                    return found, number(candidate, "variance_error")
    return value, None


def _edges(refit: Refit) -> str:
    for result in refit.results.values():
        edges = result.get("at_edge")
        if isinstance(edges, list) and edges:
            return ", ".join(map(str, edges))
    return "yes" if number(refit.metrics, "sched/at_edge") else ""


def _correlation(refit: Refit) -> str:
    found = (show_correlation(gradients, "pearson") for gradients in refit.gradients.values())
    return next((words for words in found if words), "")


def _meanings(refits: Sequence[Refit]) -> list[str]:
    words = ["After &plusmn;: one standard error. P(best): share of bootstrap draws."]
    if any(_edges(refit) for refit in refits):
        words.append("A best plan at an edge of the grid: a better one may lie outside.")
    if any(_correlation(refit) for refit in refits):
        words.append("Correlation: over the plans of the search; the gradient is the last layer's.")
    return words


def _pictures(refits: Sequence[Refit]) -> str:
    """Plots of the latest re-fits that have a report; the newest is open."""
    shown: list[str] = []
    for refit in reversed(refits):
        plots: list[Plot] = list(list_plots(refit))
        if not plots:
            continue
        figures = "".join(draw_plot(plot) for plot in plots)
        problems = "".join(
            f'<p class="note">Gradients, block size {size}: {escape(gradients["error"])}</p>'
            for size, gradients in refit.gradients.items()
            if gradients.get("error")
        )
        opened = " open" * (not shown)
        shown.append(
            f"<details{opened}><summary>re-fit of step {refit.step:,} ({escape(refit.outcome)})</summary>"
            f'<div class="curves">{figures}</div>{problems}</details>'
        )
        if len(shown) == DRAWN_REFITS:
            break
    if not shown:
        return ""
    bars = '<p class="note">Bars and bands: one standard error, by resampling whole rows of text.</p>'
    return "".join(shown) + bars


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return format_value(value) + (f" &plusmn; {format_error(error)}" if error is not None else "")


# -- The clip range over the run -----------------------------------------------------------------------------


def draw_clip_range(run: Run, until: tuple[int, float]) -> str:
    """The clip range in force, one picture for each horizontal axis of the page.

    Args:
        run: the run.
        until: step and time to which the page's pictures reach.

    Returns:
        HTML; nothing for a run whose plan was never re-fitted.
    """
    knots = _list_ranges(run)
    if not knots:
        return ""
    axes = make_axes(run.metrics)
    pictures = "".join(_draw_range(knots, axis, until) for axis in axes)
    (_, _, beta, omega) = knots[-1]
    return (
        "<figure><figcaption>Clip range in force <span>move_chance</span>"
        f"<output>{beta:g} to {omega:g}</output></figcaption>{pictures}</figure>"
    )


def _list_ranges(run: Run) -> list[tuple[int, float, float, float]]:
    """(step, time, beta, omega) of each change and of the beginning, by step."""
    columns = run.metrics.columns
    if any(name not in columns or not columns[name].steps for name in RANGE):
        return []
    begin, end = (columns[name] for name in RANGE)
    upper = end.by_step()
    times = dict(zip(begin.steps, begin.times, strict=True))
    first = _configured(run.config)
    knots = [(0, run.metrics.first_time or 0.0, *first)] if first is not None else []
    for step, beta in begin.by_step().items():
        omega = upper.get(step, math.nan)
        if not (0.0 <= beta <= omega <= 1.0):
            continue
        if not knots or knots[-1][2:] != (beta, omega):
            knots.append((step, times[step], beta, omega))
    if len(knots) > DRAWN_PLANS:
        knots = [*knots[:1], *knots[-DRAWN_PLANS:]]
    return knots


def _configured(config: Mapping[str, Any]) -> tuple[float, float] | None:
    """The range of the configuration's plan."""
    plan = section(section(config, "diffusion"), "plan")
    if not plan:
        return None
    clip_range = plan.get("clip_range")
    if not isinstance(clip_range, (list, tuple)):
        return (0.0, 1.0)
    ends = [number({"end": end}, "end") for end in clip_range]
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def _draw_range(
    knots: Sequence[tuple[int, float, float, float]], axis: Axis, until: tuple[int, float]
) -> str:
    places = [axis.place(step, time) for step, time, _, _ in knots]
    begin, end = min(0.0, *places), max(axis.place(*until), *places)
    end = end if end > begin else begin + 1.0

    def across(place: float) -> float:
        return LEFT + (place - begin) / (end - begin) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return TOP + (1.0 - value) * (HEIGHT - TOP - BOTTOM)

    parts = [draw_grid(across, down, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], make_ticks(begin, end, 5), axis.unit)]
    right = across(end)
    corners: tuple[list[str], list[str]] = ([], [])
    for position, (place, (step, _, beta, omega)) in enumerate(zip(places, knots, strict=True)):
        left = across(place)
        stop = across(places[position + 1]) if position + 1 < len(places) else right
        parts.append(
            f'<rect class="range" x="{left:.1f}" y="{down(omega):.1f}" width="{max(stop - left, 0.0):.1f}" '
            f'height="{down(beta) - down(omega):.1f}"><title>from step {step}: {beta:g} to {omega:g}</title>'
            "</rect>"
        )
        for line, value in zip(corners, (beta, omega), strict=True):
            line += [f"{left:.1f},{down(value):.1f}", f"{stop:.1f},{down(value):.1f}"]
    for name, line, value in zip(("beta", "omega"), corners, knots[-1][2:], strict=True):
        parts.append(f'<polyline class="{name}" points="{" ".join(line)}"/>')
        y = down(value) + (-5 if name == "beta" else 14)
        parts.append(f'<text class="{name}" x="{right - 4:.1f}" y="{y:.1f}">{name}</text>')
    last = knots[-1]
    label = f"Clip range in force: {last[2]:g} to {last[3]:g} from step {last[0]} on"
    return (
        f'<svg class="on-{axis.name}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
