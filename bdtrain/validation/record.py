"""What a run keeps of a likelihood: its metrics, and a line with all that must be known to repeat it.

``evaluations.jsonl`` in a run's folder has one line for each set and validation, ``{"step", "attempt", "set",
"result", "manifest"}``. It only grows: where a run was started again, a step may be there twice, and the line
of the greatest ``attempt`` counts.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from bdtrain.diffusion import keyed
from bdtrain.diffusion.build import reported_plan
from bdtrain.tracking.names import set_section
from bdtrain.validation.likelihood import Likelihood

if TYPE_CHECKING:
    from bdtrain.validation.evaluate import Evaluator

FORMAT = "bdtrain-evaluation/1"

_METRICS = ("nelbo", "nelbo_noise_error", "nelbo_text_error", "ppl", "bpb", "tokens", "seconds")


def set_metrics(name: str, likelihood: Likelihood) -> dict[str, float]:
    """What the metrics file takes of a held-out set's likelihood, by metric; what is not known is left out.

    Args:
        name: of the set.
        likelihood: the result.
    """
    values = {f"{set_section(name)}/{quantity}": getattr(likelihood, quantity) for quantity in _METRICS}
    return {metric: value for metric, value in values.items() if value is not None}


def evaluation_manifest(
    evaluator: Evaluator,
    likelihood: Likelihood,
    *,
    step: int | None,
    averaged: bool,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """What must be equal for two results to be comparable, as plain values for JSON.

    Args:
        evaluator: what measured.
        likelihood: the result.
        step: batches that the weights have seen.
        averaged: whether they are the averaged weights.
        checkpoint: folder of saved weights; None for those of a run at work.
    """
    config, held_out = evaluator.config, evaluator.held_out
    plan = reported_plan(config.diffusion)
    return {
        "format": FORMAT,
        "checkpoint": checkpoint,
        "step": step,
        "averaged_weights": averaged,
        # The text and how it was cut into rows.
        "text": held_out.text,
        "split": held_out.split,
        "split_sha256": held_out.split_sha256,
        "data_fingerprint": dict(held_out.source.fingerprint),
        "tokenizer_sha256": held_out.source.tokenizer_info.sha256,
        "seq_len": config.data.seq_len,
        "documents": config.data.documents,
        "eos_counted": True,
        "sequences": likelihood.sequences,
        "rows_sha256": evaluator.rows_sha256,
        # The noise.
        "algo": config.diffusion.algo,
        "block_size": config.diffusion.block_size,
        "mask_mode": None if plan is None else plan.kind,
        "noise_plan": None if plan is None else plan.to_dict(),
        "noise_algorithm": keyed.ALGORITHM,
        "seed": config.run.seed,
        "replicates": likelihood.replicates,
    }


def evaluation_line(
    evaluator: Evaluator, likelihood: Likelihood, *, step: int, attempt: int, averaged: bool
) -> str:
    """A line of ``evaluations.jsonl``, without its end.

    Args:
        evaluator: what measured.
        likelihood: the result.
        step: batches taken so far.
        attempt: number of this start of the run.
        averaged: whether the averaged weights were measured.
    """
    content = {
        "step": step,
        "attempt": attempt,
        "set": evaluator.held_out.name,
        "result": {name: _plain(value) for name, value in likelihood.to_dict().items()},
        "manifest": evaluation_manifest(evaluator, likelihood, step=step, averaged=averaged),
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """Text for what JSON has no word for, as in the metrics file."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
