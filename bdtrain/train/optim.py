"""AdamW with a moving average of the weights, parameter groups, and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

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
        # Fused: one pass over ZeRO's flat tensors, where torch's default makes eight.
        super().__init__(params, fused=True, **adamw)
        self._ema_decay = ema_decay

    @torch.no_grad()
    def create_state(self, parameters: Iterable[Tensor]) -> None:
        """Make the state of some parameters now rather than at their first update.

        A checkpoint is read into it before any update. (DeepSpeed's own way is an update with gradients of
        zero, which decays weights and counts as a step.)

        Args:
            parameters: what the optimizer is going to update, ZeRO's flat tensors.
        """
        for parameter in parameters:
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
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if self._ema_decay is not None:
            state[AVERAGE_KEY] = parameter.detach().clone()


class GroupRule(Protocol):
    """What ``optim.groups`` says of some parameters.

    Attributes:
        match: regular expression, searched in the global name.
        lr_scale: factor of the learning rate.
        weight_decay: in place of the run's; None leaves that.
    """

    @property
    def match(self) -> str: ...  # noqa: D102
    @property
    def lr_scale(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float | None: ...  # noqa: D102


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, rules: Sequence[GroupRule] = ()
) -> list[dict[str, Any]]:
    """Groups by learning rate and weight decay: matrices decay, vectors (norms and biases) do not.

    Args:
        named: parameters by their global names.
        weight_decay: of matrices that no rule speaks of.
        rules: the first one that matches a name decides; its weight decay holds for vectors too.

    Returns:
        Groups for an optimizer, in the order in which the model first shows them.

    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        rule = next((rule for rule in rules if re.search(rule.match, name)), None)
        decay = weight_decay if parameter.dim() > 1 else 0.0
        if rule is not None and rule.weight_decay is not None:
            decay = rule.weight_decay
        groups.setdefault((1.0 if rule is None else rule.lr_scale, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]


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
