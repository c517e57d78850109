"""AdamW with a moving average of the weights, parameter groups, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bdtrain.parallel.engine import AVERAGE_KEY


class AveragedAdamW(torch.optim.AdamW):
    """AdamW that keeps an exponential moving average of the weights beside its moments.

    The average lives in the optimizer's state, so ZeRO partitions it with the moments. After the k-th applied
    step

        e <- d e + (1 - d) w,   d = min(decay, (1 + k) / (10 + k))

    starting from the initial weights. A skipped step leaves it alone.

    Args:
        params: parameters or groups.
        ema_decay: ``decay`` above; None keeps no average.
        **adamw: what ``torch.optim.AdamW`` takes.
    """

    def __init__(self, params: Iterable[Any], *, ema_decay: float | None, **adamw: Any) -> None:
        super().__init__(params, **adamw)
        self._ema_decay = ema_decay

    @torch.no_grad()
    def create_state(self) -> None:
        """Make the state of every parameter now rather than at its first update.

        DeepSpeed links parameters to their optimizer state once, after the first group's first update; the
        state of later groups would be missing from the link.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                self._create(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient, then of its average."""
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in updated:
            self._create(parameter)
        result = super().step(closure)
        if self._ema_decay is not None:
            for parameter in updated:
                state = self.state[parameter]
                applied = float(state["step"])
                decay = min(self._ema_decay, (1 + applied) / (10 + applied))
                state[AVERAGE_KEY].lerp_(parameter.detach(), 1 - decay)
        return result

    def _create(self, parameter: Tensor) -> None:
        """The state that AdamW itself would make, and the average, which starts at the initial weights."""
        state = self.state[parameter]
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if self._ema_decay is not None:
            state[AVERAGE_KEY] = parameter.detach().clone()


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms and biases) do not.

    Returns:
        Groups for an optimizer, empty ones left out; order follows the model's.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: str,
    warmup_steps: int,
    decay_steps: int,
    total_steps: int,
    min_ratio: float,
) -> float:
    """Learning rate of an update.

    Linear warm-up from peak / warmup_steps, then ``constant``; ``cosine`` down to ``min_ratio`` of the peak
    at the last update; or ``wsd``: constant until the last ``decay_steps`` updates, which go down linearly to
    ``min_ratio``.

    Args:
        step: updates applied before this one.
        peak: highest rate.
        schedule: constant, cosine or wsd.
        warmup_steps: updates of warm-up.
        decay_steps: updates of the decay; ``wsd`` only.
        total_steps: updates of the run.
        min_ratio: share of the peak at the end.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        span = max(total_steps - warmup_steps - 1, 1)
        done = min((step - warmup_steps) / span, 1.0)
        return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule == "wsd":
        left = total_steps - step
        if left > decay_steps:
            return peak
        done = 1 - max(left - 1, 0) / max(decay_steps, 1)
        return peak * (1 - (1 - min_ratio) * done)
    raise ValueError(f"unknown learning-rate schedule {schedule!r}")
