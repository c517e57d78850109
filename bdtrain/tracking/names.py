"""Every metric: its name, unit and meaning. A writer refuses a name that is not here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        unit: unit of the value.
        meaning: one sentence.
    """

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "train/loss": Metric(
        "nats/token", "weighted loss over counted tokens, the quantity minimised; mean since the last line"
    ),
    "train/masked_share": Metric("1", "rows that reached the head over copies x counted tokens"),
    "train/grad_norm": Metric("1", "global gradient norm before clipping"),
    "train/lr": Metric("1", "learning rate of the update"),
    "train/skipped_steps": Metric("steps", "steps so far that were skipped because they were not finite"),
    "train/counted_tokens": Metric("tokens", "tokens of the global batch that count"),
    "train/samples": Metric("rows", "rows taken so far"),
    "train/tokens": Metric("tokens", "counted tokens trained on so far"),
    "train/epoch": Metric("epochs", "passes over the training data so far"),
    "train/tokens_per_second": Metric(
        "tokens/s", "counted tokens per second of wall time since the last line"
    ),
    "train/step_seconds": Metric("s", "wall time per step since the last line"),
    "train/cpu_seconds": Metric("s", "CPU time of this process so far"),
    "valid/nelbo": Metric(
        "nats/token", "upper bound on the negative log-likelihood; exact for AR and block size 1"
    ),
    "valid/nelbo_noise_error": Metric("nats/token", "standard error from the draw of the masks"),
    "valid/nelbo_text_error": Metric("nats/token", "standard error from the choice of documents"),
    "valid/ppl": Metric("1", "exp of valid/nelbo"),
    "valid/bpb": Metric("bits/byte", "valid/nelbo in bits over the UTF-8 bytes of the same text"),
    "valid/tokens": Metric("tokens", "counted tokens of the evaluation"),
    "valid/seconds": Metric("s", "wall time of the evaluation"),
}
