"""Every metric and every event: its name, unit and meaning. A writer refuses a name that is not here.

The part before the slash is the section under which MLflow's page shows the metric:

* ``train/``: what was learned. Every one is a function of the run alone, the same bits after a restart.
* ``val/``: likelihood of held-out text; ``val_NAME/`` has the same of the set NAME of ``validation.sets``.
* ``perf/``: speed.
* ``fault/``: what went wrong and was survived.
* ``ckpt/``: checkpoints.
* ``sched/``: the noise plan and its re-fits. Functions of the run alone while no re-fit is late or fails,
  but for those of gradients.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        "fault/refits_failed": Metric(
            "re-fits", "re-fits so far that came to nothing, or whose schedule could not be used", False
        ),
        "fault/refits_late": Metric("re-fits", "re-fits so far that were not done when due", False),
        "fault/refits_skipped": Metric("re-fits", "re-fits so far that met a pending one", True),
        "sched/version": Metric("1", "results of re-fits so far; 0 is the plan of the configuration", True),
        "sched/beta": Metric("move_chance", "lower bound of the clip range in force", True),
        "sched/omega": Metric("move_chance", "upper bound of the clip range in force", True),
        "sched/variance": Metric(
            "nats^2/token^2", "variance of a block's loss per token under the plan before the re-fit", True
        ),
        "sched/variance_error": Metric("nats^2/token^2", "standard error of sched/variance", True),
        "sched/variance_best": Metric("nats^2/token^2", "the same under the best plan of the search", True),
        "sched/gain": Metric("1", "share by which the former is larger, by the re-fit's criterion", True),
        "sched/p_best": Metric("1", "share of bootstrap draws in which the best plan was the best", True),
        "sched/at_edge": Metric("1", "1 where the best plan lies at an edge of the grid", True),
        "sched/nelbo": Metric("nats/token", "full bound on the rows of the re-fit", True),
        "sched/nelbo_error": Metric("nats/token", "standard error of sched/nelbo", True),
        # Added to a report after its schedule: a re-fit that is due before has none of them.
        "sched/gradient_variance": Metric(
            "nats^2/token^2",
            "variance of the last layer's gradient of a block's loss per token, the plan before the re-fit",
            False,
        ),
        "sched/gradient_variance_error": Metric(
            "nats^2/token^2", "standard error of sched/gradient_variance", False
        ),
        "sched/gradient_variance_best": Metric(
            "nats^2/token^2", "the same under the best plan of the search, which goes by the loss", False
        ),
        "sched/gradient_excess": Metric(
            "1", "share by which the plan of least loss variance exceeds the least gradient variance", False
        ),
        "sched/gradient_correlation": Metric(
            "1",
            "correlation of loss variance and gradient variance over clip ranges and the plans of the search",
            False,
        ),
        "sched/gradient_correlation_error": Metric(
            "1", "standard error of sched/gradient_correlation", False
        ),
        "sched/gradient_rank_correlation": Metric("1", "the same of the ranks of the two variances", False),
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
        "refit_begun": "a re-fit of the noise plan was begun; its plan is due at adopt_step",
        "refit": "a re-fit was settled: its plan is used from this step on, or the plan stays",
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


_OF_A_SET = re.compile(r"val_(?!valid/)([a-z0-9_]{1,40})/([a-z_]+)")


def set_section(name: str) -> str:
    """The part before the slash in the metrics of a held-out set; the run's own rows are named ``valid``."""
    return "val" if name == "valid" else f"val_{name}"


def find_metric(name: str) -> Metric | None:
    """A metric by its name, those of named held-out sets among them; None if there is no such metric."""
    found = _OF_A_SET.fullmatch(name)
    if found is None:
        return METRICS.get(name)
    own = METRICS.get(f"val/{found[2]}")
    if own is None:
        return None
    meaning = own.meaning.replace("val/", f"val_{found[1]}/")
    return replace(own, meaning=f"{meaning}; of the held-out set {found[1]}")


def is_deterministic(name: str) -> bool:
    """Whether a metric's value must be the same bits after a restart.

    Args:
        name: of a metric; one that is not in the list is not deterministic.
    """
    metric = find_metric(name)
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
