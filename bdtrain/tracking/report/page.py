"""``RUN/report.html``: what a run did on one page, made from the run's folder alone.

The page needs no network, no server and no other file. Text that a model wrote is shown as text.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable
from pathlib import Path

from bdtrain.config.estimate import count_parameters
from bdtrain.config.schema import ModelConfig
from bdtrain.files import write_atomic
from bdtrain.tracking.console import format_count, format_seconds
from bdtrain.tracking.refits import read_refits
from bdtrain.tracking.report.curves import make_axes
from bdtrain.tracking.report.history import (
    list_curves,
    list_other_curves,
    plotted,
    show_curves,
    show_events,
    show_goodput,
    show_samples,
)
from bdtrain.tracking.report.read import Run, number, read_run, section, utc
from bdtrain.tracking.report.results import (
    compare_with_baselines,
    show_evaluations,
    show_key_numbers,
    show_sets,
)
from bdtrain.tracking.report.schedule import show_schedule
from bdtrain.tracking.report.style import POLICY, SCRIPT, STYLE, axis_rules, clean, escape
from bdtrain.tracking.run_files import CHECKPOINTS, METRICS_FILE, REPORT_FILE, WEIGHTS

MAX_CONFIG_CHARACTERS = 200_000


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, whole or not at all.

    The run may be finished, stopped, killed or at work; what a file of it does not hold is left out of the
    page. Nothing but the report is written.

    Args:
        run_folder: of the run.

    Returns:
        The report.

    Raises:
        ConfigError: if the folder holds no run.
        OSError: if the disk refuses; an earlier report stays as it was.
    """
    path = run_folder / REPORT_FILE
    write_atomic(path, make_page(read_run(run_folder)).encode("utf-8", errors="replace"))
    return path


def make_page(run: Run) -> str:
    """The whole page.

    Args:
        run: what the folder holds.
    """
    name = _run_name(run)
    parts = [
        _header(run, name),
        show_key_numbers(run),
        compare_with_baselines(run),
        show_sets(run),
        show_evaluations(run),
        show_curves(run),
        show_schedule(run, read_refits(run.folder, run.metrics.events)),
        show_goodput(run),
        show_samples(run),
        show_events(run),
        _next(run),
        _config(run),
    ]
    axes = [axis.name for axis in make_axes(run.metrics)]
    curves = [*list_curves(run), *list_other_curves(run)]
    points = json.dumps({clean(curve.name): plotted(curve) for curve in curves}).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(name)}: {escape(run.state)}</title>\n<style>{STYLE}{axis_rules(axes)}</style>\n"
        "</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in parts if part)}\n</main>\n"
        f'<script type="application/json" id="points">{points}</script>\n<script>{SCRIPT}</script>\n'
        "</body>\n</html>\n"
    )


# -- What the run was ---------------------------------------------------------------------------------------


def _run_name(run: Run) -> str:
    return str(section(run.config, "run").get("name") or run.folder.resolve().name)


def _header(run: Run, name: str) -> str:
    rows = [("state", f'<span class="state {run.state}">{escape(run.sentence)}</span>')]
    rows += [(key, escape(value)) for key, value in _describe(run) if value]
    body = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows)
    return f"<header><h1>{escape(name)}</h1><dl>{body}</dl></header>"


def _describe(run: Run) -> Iterable[tuple[str, str]]:
    """What was trained, on what, where and when."""
    model, data = section(run.config, "model"), section(run.config, "data")
    diffusion, train = section(run.config, "diffusion"), section(run.config, "train")
    block = diffusion.get("block_size")
    algo = str(diffusion.get("algo", ""))
    clip_range = section(diffusion, "plan").get("clip_range")
    words = (
        algo,
        f"block size {block}" if block else "",
        f"clip range {clip_range} of the training loss" if clip_range else "",
        _parameters(run),
    )
    yield "trained", ", ".join(word for word in words if word)
    if model:
        sizes = ", ".join(
            f"{value} {word}"
            for key, word in (
                ("num_layers", "layers"),
                ("hidden_size", "hidden"),
                ("num_heads", "heads"),
                ("vocab_size", "tokens in the vocabulary"),
            )
            if (value := model.get(key)) is not None
        )
        yield "model", f"{model.get('shape', '')}: {sizes}"
    tokens = run.metrics.columns["train/tokens"].values
    steps, wanted = run.metrics.last_step, train.get("steps")
    done = f"{steps:,} of {wanted:,} steps" if isinstance(wanted, int) else f"{steps:,} steps"
    yield "done", done + (f", {format_count(tokens[-1])} tokens" if tokens else "")
    where = data.get("path") or data.get("kind")
    if where:
        batch, length = train.get("global_batch_size"), data.get("seq_len")
        yield "data", f"{where}; {batch} rows of {length} tokens a step"
    yield "layout", _layout(run)
    starts = run.metrics.starts()
    if starts:
        began = time.strftime("%Y-%m-%d %H:%M UTC", utc(starts[0]["time"]))
        took = (run.metrics.last_time or starts[0]["time"]) - starts[0]["time"]
        attempts = len(starts)
        yield (
            "time",
            (
                f"began {began}, {format_seconds(took)} to the last line, "
                f"{attempts} attempt{'s' * (attempts > 1)}"
            ),
        )
        last = starts[-1]
        facts = [f"{key} {last[key]}" for key in ("bdtrain", "torch", "python") if key in last]
        yield "software", ", ".join([*facts, f"on {last.get('host', '?')} ({last.get('device', '?')})"])


def _parameters(run: Run) -> str:
    """Parameters by the arithmetic of the model's shape."""
    vocab = number(run.config.get("model"), "vocab_size") or number(
        section(run.facts, "tokenizer"), "vocab_size"
    )
    try:
        model = ModelConfig(**section(run.config, "model"))
        return f"{format_count(count_parameters(model, int(vocab or 1)).total)} parameters" if vocab else ""
    except (ValueError, TypeError):
        return ""  # a configuration of another version


def _layout(run: Run) -> str:
    parallel, starts = section(run.config, "parallel"), run.metrics.starts()
    world = number(starts[-1], "world_size") if starts else None
    if world is None:
        return ""
    tp, pp = (max(1, int(number(parallel, key) or 1)) for key in ("tp", "pp"))
    words = [f"{int(world)} rank{'s' * (world > 1)}: tp {tp} x pp {pp} x dp {int(world) // (tp * pp)}"]
    if "zero_stage" in parallel:
        words.append(f"ZeRO {parallel['zero_stage']}")
    if "precision" in section(run.config, "train"):
        words.append(str(section(run.config, "train")["precision"]))
    return ", ".join(words)


# -- What else there is --------------------------------------------------------------------------------------


def _next(run: Run) -> str:
    """What else there is, and how to see it."""
    place = shlex.quote(str(run.folder))
    uri = section(run.config, "tracking").get("mlflow_uri")
    rows = []
    if section(run.config, "tracking").get("mlflow") is not False:
        rows.append(("MLflow's page", f"at {uri}" if uri else f"make dashboard RUN={place}", bool(uri)))
    weights = run.folder / WEIGHTS
    if not weights.is_dir() and run.checkpoints:
        weights = run.folder / CHECKPOINTS / run.checkpoints[-1]
    if weights.is_dir():
        where = shlex.quote(str(weights))
        rows.append(("weights", str(weights), True))
        rows.append(("sample", f".venv/bin/python launchers/sample_text.py --checkpoint {where}", False))
    rows.append(("all numbers", str(run.folder / METRICS_FILE), True))
    rows.append(("this page anew", f".venv/bin/python tools/write_report.py {place}", False))
    body = "".join(
        f"<dt>{name}</dt><dd>{escape(what) if plain else f'<code>{escape(what)}</code>'}</dd>"
        for name, what, plain in rows
    )
    return f"<section><h2>More</h2><dl>{body}</dl></section>"


def _config(run: Run) -> str:
    if not run.config_text:
        return ""
    words = escape(run.config_text[:MAX_CONFIG_CHARACTERS])
    return (
        "<section><h2>Configuration</h2><details><summary>all settings, resolved</summary>"
        f"<pre>{words}</pre></details></section>"
    )
