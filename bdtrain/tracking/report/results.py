"""What came out of a run: its likelihoods beside the baselines, as pieces of the report's page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bdtrain.tracking.names import find_metric, set_section
from bdtrain.tracking.report.curves import format_error, format_value
from bdtrain.tracking.report.read import Run, number, section
from bdtrain.tracking.report.style import escape

BASELINES = ("unigram", "bigram", "gzip")

_VAL = ("nelbo", "nelbo_noise_error", "nelbo_text_error", "ppl", "bpb", "tokens")


def _likelihoods(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last evaluation, with errors; empty ones where there is none."""
    before, after = section(run.summary, "before"), section(run.summary, "after")
    steps = run.metrics.columns["val/nelbo"].steps
    if not steps:
        return before, after
    first = _likelihood_at(run, "val", steps[0]) if steps[0] == 0 else {}
    last = _likelihood_at(run, "val", steps[-1]) if steps[-1] != 0 else {}
    if not after:
        return first, last
    return {**first, **before}, {**last, **after}


def _likelihood_at(run: Run, where: str, step: int) -> dict[str, Any]:
    """What the metrics say of an evaluation, with errors.

    Args:
        run: the run.
        where: section of the metrics, ``val`` or ``val_NAME``.
        step: that has a NELBO.
    """
    columns = run.metrics.columns
    found = {name: columns[f"{where}/{name}"].by_step() for name in _VAL if f"{where}/{name}" in columns}
    values = {name: column[step] for name, column in found.items() if step in column}
    values["step"] = step
    # The errors of PPL and of bits per byte follow from that of the NELBO.
    error, nelbo = _error(values), values["nelbo"]
    if error is not None and nelbo:
        if "ppl" in values:
            values["ppl_error"] = values["ppl"] * error
        if "bpb" in values:
            values["bpb_error"] = values["bpb"] * error / nelbo
    return values


def _error(values: Mapping[str, Any]) -> float | None:
    """Standard error of a NELBO from both of its parts."""
    parts = [number(values, key) for key in ("nelbo_noise_error", "nelbo_text_error")]
    known = [part for part in parts if part is not None]
    return math.hypot(*known) if known else None


def is_exact(run: Run) -> bool:
    """Whether the reported numbers are likelihoods and not bounds."""
    diffusion = section(run.config, "diffusion")
    return diffusion.get("algo") == "ar" or diffusion.get("block_size") == 1


def show_key_numbers(run: Run) -> str:
    """The numbers that a reader wants first."""
    before, after = _likelihoods(run)
    shown = after or before
    cards = []
    exact = is_exact(run)
    for key, title, unit in (
        ("bpb", "bits per byte", ""),
        ("nelbo", "NLL" if exact else "NELBO", "nats/token"),
        ("ppl", "PPL" if exact else "PPL, at most", ""),
    ):
        value = number(shown, key)
        if value is None:
            continue
        error = _error(shown) if key == "nelbo" else number(shown, f"{key}_error")
        first = number(before, key) if after else None
        details = [f"&plusmn; {format_error(error)}"] if error is not None else []
        details += [f"{format_value(first)} before training"] if first is not None else []
        cards.append(_card(title, f"{format_value(value)} <small>{unit}</small>", "; ".join(details)))
    speed = number(run.summary, "tokens_per_second")
    speeds = [value for value in run.metrics.columns["perf/tokens_per_second"].values if math.isfinite(value)]
    if speed is None and speeds:
        speed = sorted(speeds)[len(speeds) // 2]
    if speed is not None:
        what = "of training" if run.summary else "median of the lines"
        cards.append(_card("tokens/s", format_value(speed), what))
    losses = run.metrics.columns["train/loss"]
    if not shown and losses.values:
        cards.append(_card("training loss", format_value(losses.values[-1]), f"step {losses.steps[-1]:,}"))
    if not cards:
        return ""
    when = "" if after else "Before training. "
    if after and (step := number(after, "step")) is not None:
        when = f"Held-out text at step {int(step):,}. "
    note = f"{when}{_evaluated_on(shown)}" if shown else "Nothing was evaluated on held-out text."
    return (
        f'<section><h2>Key numbers</h2><div class="numbers">{"".join(cards)}</div>'
        f'<p class="note">{note}</p></section>'
    )


def _card(title: str, value: str, details: str) -> str:
    return f"<div>{title}<b>{value}</b><small>{details}</small></div>"


def _evaluated_on(values: Mapping[str, Any]) -> str:
    """On how much text, and what the errors are made of."""
    words = []
    tokens, units = number(values, "tokens"), number(values, "text_units")
    if tokens is not None:
        of = f" of {int(units):,} {escape(values.get('text_unit', 'document'))}s" if units is not None else ""
        words.append(f"{int(tokens):,} tokens{of}")
    replicates = number(values, "replicates")
    if replicates is not None:
        words.append(f"{int(replicates)} draws of the noise")
    noise, sample = number(values, "nelbo_noise_error"), number(values, "nelbo_text_error")
    if noise is not None:
        words.append(f"standard error of the NELBO from the draws {format_error(noise)}")
    if sample is not None:
        words.append(f"from the choice of the text {format_error(sample)}")
    return f"{', '.join(words)}." if words else ""


def read_baselines(run: Run) -> dict[str, float]:
    """Bits per byte of the baselines, where they were evaluated on the text of the run's own validation."""
    _, after = _likelihoods(run)
    for evaluation in run.evaluations.values():
        values = {name: number(section(evaluation, "baselines"), f"{name}_bpb") for name in BASELINES}
        known = {name: value for name, value in values.items() if value is not None}
        tokens = number(after, "tokens")
        if known and (tokens is None or number(evaluation, "tokens") == tokens):
            return known
    return {}


def compare_with_baselines(run: Run) -> str:
    """Bits per byte beside the baselines."""
    baselines = read_baselines(run)
    before, after = _likelihoods(run)
    own = number(after, "bpb")
    if not baselines or own is None:
        return ""
    rows = [("this model, before training", number(before, "bpb"), "early")]
    names = {
        "unigram": "unigram over the same tokens",
        "bigram": "bigram over the same tokens",
        "gzip": "gzip -9",
    }
    rows += [(names[name], value, "") for name, value in baselines.items()]
    rows.append(("this model, after training", own, "own"))
    largest = max(value for _, value, _ in rows if value is not None)
    body = "".join(
        f'<span>{name}</span><i class="{kind}" style="width:{100 * value / largest:.1f}%"></i>'
        f"<output>{value:.3f}</output>"
        for name, value, kind in rows
        if value is not None
    )
    return (
        '<section><h2>Bits per byte of held-out text <span class="soft">lower is better</span></h2>'
        f'<div class="compare">{body}</div></section>'
    )


def list_sets(run: Run) -> list[str]:
    """Names of the held-out sets that have a likelihood, in the order of the metrics file."""
    return [
        name.removeprefix("val_").removesuffix("/nelbo")
        for name, column in run.metrics.columns.items()
        if name.startswith("val_") and name.endswith("/nelbo") and find_metric(name) and column.steps
    ]


def show_sets(run: Run) -> str:
    """The last likelihood of every held-out set, the run's own rows first; nothing for these alone."""
    names = list_sets(run)
    if not names:
        return ""
    listed = section(run.config, "validation").get("sets")
    texts = {
        str(entry.get("name")): str(entry.get("path"))
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict)
    }
    texts["valid"] = f"{section(run.config, 'data').get('path') or ''}, valid"
    rows = []
    for name in ["valid", *names]:
        where = set_section(name)
        steps = run.metrics.columns[f"{where}/nelbo"].steps
        if not steps:
            continue
        values = _likelihood_at(run, where, steps[-1])
        tokens = number(values, "tokens")
        numbers = [
            f"{steps[-1]:,}",
            _with_error(number(values, "nelbo"), _error(values)),
            _with_error(number(values, "ppl"), number(values, "ppl_error")),
            _with_error(number(values, "bpb"), number(values, "bpb_error")),
            "" if tokens is None else f"{int(tokens):,}",
        ]
        cells = "".join(f'<td class="n">{cell}</td>' for cell in numbers)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}<td>{escape(texts.get(name, ''))}</td></tr>")
    bound = "NLL" if is_exact(run) else "NELBO"
    head = "".join(f'<th class="n">{word}</th>' for word in ("step", bound, "PPL", "bits/byte", "tokens"))
    return (
        '<section><h2>Held-out sets</h2><div class="scroll"><table>'
        f"<tr><th>set</th>{head}<th>text</th></tr>{''.join(rows)}</table></div>"
        f'<p class="note">{bound} in nats/token. Texts of another kind than the training text have other '
        "numbers of bytes per token: compare sets by bits per byte.</p></section>"
    )


def show_evaluations(run: Run) -> str:
    """Every evaluation of saved weights."""
    if not run.evaluations:
        return ""
    rows = []
    for name, values in run.evaluations.items():
        manifest, baselines = section(values, "manifest"), section(values, "baselines")
        numbers = [
            _with_error(number(values, "nelbo"), _error(values)),
            _with_error(number(values, "ppl"), number(values, "ppl_error")),
            _with_error(number(values, "bpb"), number(values, "bpb_error")),
            *(_with_error(number(baselines, f"{key}_bpb"), None) for key in BASELINES),
        ]
        split = f", {manifest['split']}" if manifest.get("split") else ""
        cells = "".join(f'<td class="n">{cell}</td>' for cell in numbers)
        step = number(manifest, "step")
        rows.append(
            f"<tr><td>{escape(manifest.get('text', '?'))}{escape(split)}</td>"
            f'<td class="n">{"" if step is None else f"{int(step):,}"}</td>{cells}'
            f"<td>{escape(name)}</td></tr>"
        )
    heads = ("step", "NELBO", "PPL", "bits/byte", "unigram", "bigram", "gzip -9")
    head = "".join(f'<th class="n">{word}</th>' for word in heads)
    return (
        '<section><h2>Evaluations of saved weights</h2><div class="scroll"><table>'
        f"<tr><th>text</th>{head}<th>file</th></tr>{''.join(rows)}</table></div>"
        '<p class="note">NELBO in nats/token; the baselines in bits per byte of the same text.</p></section>'
    )


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return format_value(value) + (f" &plusmn; {format_error(error)}" if error is not None else "")
