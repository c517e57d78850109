"""From a validated configuration to a finished run with its summary on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bdtrain.config import RunConfig, check_paths, validate_layout
from bdtrain.parallel.groups import destroy_groups, read_launch
from bdtrain.tracking.console import Console, format_count, format_seconds
from bdtrain.train.loop import RunSummary, run_training


def train_from_config(config: RunConfig, environment: Mapping[str, str], *, console: Console) -> RunSummary:
    """Train, then write ``summary.json`` into the run's folder.

    Args:
        config: a validated configuration.
        environment: of this process; says its rank.
        console: where progress goes.

    Raises:
        BdtrainError: whatever stops the run, before any work is lost where that is possible.
    """
    launch = read_launch(environment)
    validate_layout(config, launch.world_size)
    check_paths(config)
    try:
        summary = run_training(config, launch, console=console)
    finally:
        destroy_groups()
    if launch.rank == 0:
        write_summary(Path(config.run.folder) / "summary.json", summary)
    console.line(
        f"done: {format_count(summary.tokens)} tokens in {format_seconds(summary.train_seconds)} of training "
        f"({format_count(summary.tokens_per_second)} tokens/s), {format_seconds(summary.wall_seconds)} in all"
        + (f"; weights in {summary.checkpoint}" if summary.checkpoint else "")
    )
    return summary


def write_summary(path: Path, summary: RunSummary) -> None:
    """The summary as JSON."""
    values = {
        "steps": summary.steps,
        "tokens": summary.tokens,
        "before": summary.before.to_dict() if summary.before else None,
        "after": summary.after.to_dict(),
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "wall_seconds": summary.wall_seconds,
        "checkpoint": str(summary.checkpoint) if summary.checkpoint else None,
    }
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
