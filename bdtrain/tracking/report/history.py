"""How a run went: curves, time, samples and events, as pieces of the report's page."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bdtrain.tracking.console import format_count, format_seconds
from bdtrain.tracking.goodput import ACTIVITIES
from bdtrain.tracking.names import find_metric
from bdtrain.tracking.refits import NO_RESULT
from bdtrain.tracking.report.columns import Column
from bdtrain.tracking.report.curves import Curve, Mark, draw_curve, make_axes, thin
from bdtrain.tracking.report.read import Run, number, utc
from bdtrain.tracking.report.results import is_exact, list_sets, read_baselines
from bdtrain.tracking.report.schedule import RANGE, draw_clip_range
from bdtrain.tracking.report.style import escape
from bdtrain.tracking.run_files import CHECKPOINTS, METRICS_FILE

MAX_EVENT_ROWS = 200
MAX_SAMPLE_CHARACTERS = 20_000
MAX_SET_CURVES = 8
MAX_OTHER_CURVES, MAX_OTHER_POINTS = 40, 200
ERROR_BARS = ("/nelbo_noise_error", "/nelbo_text_error")
FAULTS = ("skipped", "failed", "checkpoint_failed", "rejected_checkpoint", "profile_failed")


def is_fault(event: Mapping[str, Any]) -> bool:
    """Whether an event tells of something that went wrong, a re-fit without a result among them."""
    return event["event"] in FAULTS or (event["event"] == "refit" and event.get("outcome") in NO_RESULT)


def list_curves(run: Run) -> list[Curve]:
    """What there is to draw, in the order of the page."""
    columns = run.metrics.columns

    def curve(name: str, title: str, **more: Any) -> Curve:
        metric = find_metric(name)
        unit = metric.unit.replace("1", "") if metric is not None else ""
        return Curve(name, title, unit, columns.get(name) or Column(), **more)

    bound = "NLL" if is_exact(run) else "NELBO"
    in_nats, in_bits = _error_bars(run, "val")
    found = [
        curve("train/loss", "Training loss"),
        curve("val/bpb", "Held-out bits per byte", errors=in_bits, dots=True, levels=read_baselines(run)),
        curve("val/nelbo", f"Held-out {bound}", errors=in_nats, dots=True),
        *(
            curve(f"val_{name}/bpb", f"Bits per byte of {name}", errors=_error_bars(run, f"val_{name}")[1],
                  dots=True)
            for name in list_sets(run)[:MAX_SET_CURVES]
        ),
        curve("train/grad_norm", "Gradient norm before clipping"),
        curve("train/lr", "Learning rate"),
        curve("perf/tokens_per_second", "Speed"),
    ]  # fmt: skip
    return [curve for curve in found if any(map(math.isfinite, curve.column.values))]


def _error_bars(run: Run, where: str) -> tuple[tuple[dict[int, float], ...], tuple[dict[int, float], ...]]:
    """Errors of a held-out set by step, from the noise and from both parts.

    Args:
        run: the run.
        where: section of the metrics, ``val`` or ``val_NAME``.

    Returns:
        Of the NELBO, and of the bits per byte.
    """
    found = run.metrics.columns

    def by_step(name: str) -> dict[int, float]:
        return found[f"{where}/{name}"].by_step() if f"{where}/{name}" in found else {}

    noise, sample = by_step("nelbo_noise_error"), by_step("nelbo_text_error")
    both = {step: math.hypot(noise.get(step, 0.0), sample.get(step, 0.0)) for step in {**noise, **sample}}
    nelbo, bpb = by_step("nelbo"), by_step("bpb")
    scale = {step: bpb[step] / nelbo[step] for step in bpb if nelbo.get(step)}
    in_bits = [
        {step: error * scale[step] for step, error in errors.items() if step in scale}
        for errors in (noise, both)
    ]
    return (noise, both), tuple(in_bits)


def list_other_curves(run: Run) -> list[Curve]:
    """Every other metric of the metrics file by name, in fewer points; what nobody listed here as well."""
    drawn = {*RANGE, *(curve.name for curve in list_curves(run))}
    found = []
    for name, column in sorted(run.metrics.columns.items()):
        if name not in drawn and not name.endswith(ERROR_BARS) and any(map(math.isfinite, column.values)):
            metric = find_metric(name)
            unit = metric.unit.replace("1", "") if metric is not None else ""
            found.append(Curve(name, name, unit, column, limit=MAX_OTHER_POINTS))
    return found[:MAX_OTHER_CURVES]


def plotted(curve: Curve) -> dict[str, list[Any]]:
    """The drawn values of a curve, one for each corner of its line."""
    chosen = thin(curve.column.values, curve.limit)
    return {
        "steps": [curve.column.steps[position] for position in chosen],
        "values": [curve.column.values[position] for position in chosen],
    }


def show_curves(run: Run) -> str:
    """Every curve, with the switch between the horizontal axes."""
    axes, marks = make_axes(run.metrics), list_marks(run)
    curves, others = list_curves(run), list_other_curves(run)
    until = max(
        ((curve.column.steps[-1], curve.column.times[-1]) for curve in (*curves, *others)), default=(0, 0.0)
    )
    figures = "".join(draw_curve(curve, axes, marks, until) for curve in curves) + draw_clip_range(run, until)
    # Without marks, which would be most of the page.
    folded = "".join(draw_curve(curve, axes, (), until) for curve in others)
    if not figures and not folded:
        return '<section><h2>Curves</h2><p class="soft">No step was reported yet.</p></section>'
    picks = "".join(
        f'<input class="pick" type="radio" name="axis" id="pick-{axis.name}"{" checked" * (axis is axes[0])}>'
        for axis in axes
    )
    labels = "".join(f'<label for="pick-{axis.name}">{axis.title}</label>' for axis in axes)
    notes = []
    if run.metrics.columns["val/nelbo_text_error"].steps:
        notes.append(
            "Thick bars: one standard error from the draws of the noise. Thin bars: with the choice of the "
            "text, which is the same at every step."
        )
    if any(mark.kind == "attempt" for mark in marks):
        notes.append("Dotted lines: another attempt goes on from there.")
    if any(mark.kind == "fault" for mark in marks):
        notes.append("Triangles: faults.")
    more = ""
    if folded:
        more = f'<details><summary>other metrics</summary><div class="curves">{folded}</div></details>'
    return (
        f'<section><h2>Curves</h2>{picks}<div class="axes">{labels}</div><div class="curves">{figures}</div>'
        f'<p class="note">{" ".join(notes)}</p>{more}</section>'
    )


def list_marks(run: Run) -> list[Mark]:
    """Attempts after the first one, and faults; attempts first."""
    marks = [
        Mark(start["step"], start["time"], "attempt", f"attempt {start['attempt']} from step {start['step']}")
        for start in run.metrics.starts()[1:]
    ]
    for event in run.metrics.events:
        if is_fault(event):
            marks.append(Mark(event["step"], event["time"], "fault", f"step {event['step']}: {_tell(event)}"))
    return marks


def show_goodput(run: Run) -> str:
    """Where the time went."""
    seconds, what = run.goodput
    spent = {name: seconds[name] for name in ACTIVITIES if seconds.get(name, 0.0) > 0}
    whole = sum(spent.values())
    if whole <= 0:
        return ""
    words = {
        "setup": "set-up",
        "data_wait": "waiting for data",
        "checkpoint": "checkpoints",
        "refit": "re-fits",
        "lost": "lost to faults and skipped steps",
        "down": "down between attempts",
    }
    bars = "".join(
        f'<span class="a-{name}" style="width:{100 * value / whole:.3f}%"></span>'
        for name, value in spent.items()
    )
    legend = "".join(
        f'<span><i class="a-{name}"></i>{words.get(name, name)} {_duration(value)}, '
        f"{value / whole:.1%}</span>"
        for name, value in sorted(spent.items(), key=lambda item: -item[1])
    )
    wall = whole - spent.get("down", 0.0)
    good = (
        f"Goodput {spent.get('training', 0.0) / wall:.1%}: training over the time of all attempts"
        if wall
        else ""
    )
    return (
        f'<section><h2>Where the time went <span class="soft">{escape(what)}</span></h2>'
        f'<div class="time">{bars}</div><div class="legend">{legend}</div>'
        f'<p class="note">{good}.</p></section>'
    )


def _duration(seconds: float) -> str:
    return format_seconds(seconds) if seconds >= 10 else f"{seconds:.1f}s"


def show_samples(run: Run) -> str:
    """The last sample; earlier ones folded."""
    if not run.samples:
        return ""

    def show(sample: Mapping[str, Any]) -> str:
        words = str(sample["text"])[:MAX_SAMPLE_CHARACTERS]
        prompt = sample.get("prompt")
        before = f"<p class='note'>after the prompt</p><pre>{escape(prompt)}</pre>" if prompt else ""
        return f"{before}<pre>{escape(words)}</pre>"

    *earlier, last = run.samples
    folded = "".join(
        f"<details><summary>step {escape(sample.get('step', '?'))}</summary>{show(sample)}</details>"
        for sample in reversed(earlier)
    )
    return f"<section><h2>Sample at step {escape(last.get('step', '?'))}</h2>{show(last)}{folded}</section>"


def show_events(run: Run) -> str:
    """Attempts, faults and checkpoints in order."""
    events = run.metrics.events
    if not events:
        return ""
    skipped = run.metrics.columns["fault/skipped_steps"].values
    counts = [
        f"{len(run.metrics.starts())} attempt{'s' * (len(run.metrics.starts()) != 1)}",
        f"{int(skipped[-1]) if skipped else 0} steps skipped",
        f"{sum(event['event'] == 'checkpoint' for event in events)} checkpoints",
    ]
    lost = {event.get("snapshot_step") for event in events if event["event"] == "refit" and is_fault(event)}
    counts += [f"{len(lost)} re-fits without a result"] if lost else []
    shown: Sequence[dict[str, Any]] = events
    left = ""
    if len(events) > MAX_EVENT_ROWS:
        half = MAX_EVENT_ROWS // 2
        shown = [*events[:half], *events[-half:]]
        left = f'<p class="note">{len(events) - len(shown):,} more in the middle, see {METRICS_FILE}.</p>'
    rows = "".join(
        f'<tr class="{"fault" if is_fault(event) else ""}">'
        f'<td class="n">{event["step"]:,}</td><td class="n">{event["attempt"]}</td>'
        f"<td>{time.strftime('%m-%d %H:%M:%S', utc(event['time']))}</td>"
        f"<td>{escape(_tell(event, run))}</td></tr>"
        for event in shown
    )
    table = (
        '<div class="scroll"><table><tr><th class="n">step</th><th class="n">attempt</th><th>time (UTC)</th>'
        f"<th>what</th></tr>{rows}</table></div>{left}"
    )
    if len(shown) > 30:
        table = f"<details><summary>{len(events):,} events</summary>{table}</details>"
    return f'<section><h2>Events <span class="soft">{", ".join(counts)}</span></h2>{table}</section>'


def _tell(event: Mapping[str, Any], run: Run | None = None) -> str:
    """An event in words."""
    name = event["event"]
    if name == "start":
        origin = f" from {event['checkpoint']}" if event.get("checkpoint") else ""
        changed = event.get("changed") if isinstance(event.get("changed"), list) else []
        ranks = event.get("world_size", "?")
        size = f"{ranks} rank" if ranks == 1 else f"{ranks} ranks"
        return f"attempt {event['attempt']} began{origin}, {size}" + "".join(
            f"; {change[0]}: {change[1]} -> {change[2]}"
            for change in changed or ()
            if isinstance(change, list) and len(change) == 3
        )
    if name == "checkpoint":
        folder, count = str(event.get("folder", "?")), number(event, "bytes")
        gone = "" if run is None or folder in run.checkpoints else " (deleted since)"
        place = f"{CHECKPOINTS}/{folder}"
        return f"checkpoint {place}{'' if count is None else f', {format_count(count)}B'}{gone}"
    if name == "refit_begun":
        return (
            f"re-fit of step {event.get('snapshot_step', '?')} begun, due at {event.get('adopt_step', '?')}"
        )
    if name == "refit":
        again = " (as before the restart)" if event.get("replayed") is True else ""
        return (
            f"re-fit of step {event.get('snapshot_step', '?')} {event.get('outcome', '?')}{again}: "
            f"{event.get('reason', '?')}"
        )
    if name == "profile_failed":
        return f"profile could not be written: {event.get('reason', '?')}"
    if name == "kernel":
        return f"{event.get('kernel', '?')} runs as {event.get('backend', '?')} ({event.get('reason', '?')})"
    if name == "skipped":
        return f"step skipped, not finite: loss {event.get('loss', '?')}, rows {event.get('rows', '?')}"
    if name == "rejected_checkpoint":
        return f"checkpoint {event.get('folder', '?')} passed over: {event.get('reason', '?')}"
    if name == "checkpoint_failed":
        return f"checkpoint could not be written: {event.get('reason', '?')}"
    if name == "failed":
        return f"ended by an error: {event.get('error') or event.get('reason', '?')}"
    if name == "stop":
        return f"stopped by {event.get('reason', '?')}, saved"
    return "finished" if name == "end" else str(name)
