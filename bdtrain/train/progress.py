"""What a run has done so far: the counters that a checkpoint keeps, and the steps since the last report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bdtrain.train.step import StepResult


@dataclass
class Window:
    """The steps since the last progress line. Means are over the applied ones: a skipped step has no loss.

    It is part of a checkpoint, so that the first line after a restart has the bits it would have had.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    flops: float = 0.0
    applied: int = 0
    loss_sum: float = 0.0
    masked_share_sum: float = 0.0
    grad_norm_sum: float = 0.0

    def add(self, result: StepResult, *, seconds: float, data_seconds: float, flops: float) -> None:
        """Take a step.

        Args:
            result: of the step.
            seconds: wall time, the wait for data included.
            data_seconds: of it the wait for data.
            flops: operations the model needed, on all ranks together.
        """
        self.steps += 1
        self.tokens += result.counted_tokens
        self.seconds += seconds
        self.data_seconds += data_seconds
        self.flops += flops
        if result.applied:
            self.applied += 1
            self.loss_sum += result.loss
            self.masked_share_sum += result.masked_share
            self.grad_norm_sum += result.grad_norm

    @property
    def loss(self) -> float:
        """Mean loss; nan without an applied step."""
        return self._mean(self.loss_sum)

    @property
    def masked_share(self) -> float:
        """Mean share of masked rows."""
        return self._mean(self.masked_share_sum)

    @property
    def grad_norm(self) -> float:
        """Mean gradient norm."""
        return self._mean(self.grad_norm_sum)

    def _mean(self, total: float) -> float:
        return total / self.applied if self.applied else math.nan


@dataclass
class Progress:
    """Counters of a run.

    Attributes:
        step: batches taken, skipped ones included; keys the noise.
        applied: updates.
        skipped: steps that were not finite.
        skipped_in_a_row: of them the last ones without an applied step in between.
        samples: rows taken; the one integer from which the order of the data follows.
        tokens: counted tokens taken.
        checkpoints_failed: saves that could not be completed.
        checkpoints_failed_in_a_row: since the last good one.
        validated: step of the last validation.
        train_seconds: wall time of steps, skipped ones included, over all attempts that led here.
        window: steps since the last progress line.
    """

    step: int = 0
    applied: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    samples: int = 0
    tokens: int = 0
    checkpoints_failed: int = 0
    checkpoints_failed_in_a_row: int = 0
    validated: int = 0
    train_seconds: float = 0.0
    window: Window = field(default_factory=Window)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; floats read back to the same bits."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """Back from ``to_dict``."""
        return cls(**{**values, "window": Window(**values["window"])})

    def take(self, result: StepResult, rows: int) -> None:
        """Count a step.

        Args:
            result: of the step.
            rows: of its global batch.
        """
        self.step += 1
        self.samples += rows
        self.tokens += result.counted_tokens
        self.applied += result.applied
        self.skipped += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
