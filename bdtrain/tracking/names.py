"""Every metric and every event: its name, unit and meaning. A writer refuses a name that is not here.

The part before the slash is the section under which MLflow's page shows the metric:

* ``train/``: what was learned. Every one is a function of the run alone, the same bits after a restart.
* ``val/``: likelihood of held-out text.
* ``perf/``: speed.
* ``fault/``: what went wrong and was survived.
* ``ckpt/``: checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from bdtrain.tracking.console import format_count

if TYPE_CHECKING:
    from bdtrain.config import RunConfig


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        unit: unit of the value.
        meaning: one sentence.
        deterministic: whether it is a function of the run alone, so that a restarted run repeats its bits.
    """

    unit: str
    meaning: str
    deterministic: bool


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "train/loss": Metric(
            "nats/token",
            "weighted loss over counted tokens, the quantity minimised; mean since the last line",
            True,
        ),
        "train/grad_norm": Metric(
            "1", "global gradient norm before clipping; mean since the last line", True
        ),
        "train/lr": Metric("1", "learning rate of the update", True),
        "train/masked_share": Metric("1", "rows that reached the head over copies x counted tokens", True),
        "train/counted_tokens": Metric("tokens", "tokens of the global batch that count", True),
        "train/samples": Metric("rows", "rows taken so far", True),
        "train/tokens": Metric(
            "tokens", "counted tokens taken so far, those of skipped steps included", True
        ),
        "train/epoch": Metric("epochs", "passes over the training data so far", True),
        "val/nelbo": Metric(
            "nats/token", "upper bound on the negative log-likelihood; exact for AR and block size 1", True
        ),
        "val/nelbo_noise_error": Metric("nats/token", "standard error from the draw of the masks", True),
        "val/nelbo_text_error": Metric("nats/token", "standard error from the choice of documents", True),
        "val/ppl": Metric("1", "exp of val/nelbo", True),
        "val/bpb": Metric("bits/byte", "val/nelbo in bits over the UTF-8 bytes of the same text", True),
        "val/tokens": Metric("tokens", "counted tokens of the evaluation", True),
        "val/seconds": Metric("s", "wall time of the evaluation", False),
        "perf/tokens_per_second": Metric(
            "tokens/s", "counted tokens of the whole job per second of wall time since the last line", False
        ),
        "perf/step_seconds": Metric("s", "wall time per step since the last line", False),
        "perf/model_tflops_per_second": Metric(
            "TFLOP/s",
            "floating-point operations the model needs, of the whole job divided by its ranks",
            False,
        ),
        "perf/mfu": Metric("1", "perf/model_tflops_per_second over the peak of one device", False),
        "perf/data_wait_seconds": Metric("s", "wall time per step spent waiting for a batch", False),
        "perf/cpu_seconds": Metric("s", "CPU time of this process so far", False),
        "perf/checkpoint_seconds": Metric(
            "s", "wall time of training given to checkpoints since the last line", False
        ),
        "fault/skipped_steps": Metric(
            "steps", "steps so far that were skipped because they were not finite", True
        ),
        "fault/checkpoints_failed": Metric(
            "checkpoints", "checkpoints so far that could not be written", False
        ),
        "fault/profiles_failed": Metric(
            "profiles", "profiles of this attempt that could not be written (with profile.steps)", False
        ),
        "fault/restarts": Metric("restarts", "times the run was started again", False),
        "ckpt/bytes": Metric("bytes", "size of the checkpoint", False),
        "ckpt/seconds": Metric("s", "wall time from the start of a save to its commit", False),
    }
)
"""Metrics by name."""

EVENTS: Mapping[str, str] = MappingProxyType(
    {
        "start": "an attempt begins; step is the one it resumes from, 0 for a new run",
        "kernel": "a kernel chose the form that runs, and why",
        "checkpoint": "a checkpoint was committed",
        "checkpoint_failed": "a checkpoint could not be written; training went on",
        "profile_failed": "a profile could not be written; training went on",
        "rejected_checkpoint": "a checkpoint was found damaged when the run resumed, and passed over",
        "skipped": "a step was not finite and changed nothing",
        "stop": "an attempt ended on request and can be resumed",
        "failed": "an attempt ended by an error",
        "end": "the run is complete",
    }
)
"""Events by name."""

LAST_EVENTS = frozenset({"stop", "failed", "end"})
"""Events after which an attempt writes nothing more."""


def is_deterministic(name: str) -> bool:
    """Whether a metric's value must be the same bits after a restart.

    Args:
        name: of a metric; one that is not in the list is not deterministic.
    """
    metric = METRICS.get(name)
    return metric is not None and metric.deterministic


def run_name(config: RunConfig) -> str:
    """Name of a run on MLflow's page, whose table shows nothing else at first.

    Args:
        config: with the vocabulary of the data.
    """
    # Here, so that the shipping process does without the schema.
    from bdtrain.config.estimate import count_parameters

    size = format_count(count_parameters(config.model, config.model.vocab_size or 1).total)
    return (
        f"{config.run.name}-{config.diffusion.algo}-L{config.diffusion.block_size}-{size}-s{config.run.seed}"
    )
