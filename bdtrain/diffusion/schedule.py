"""Noise schedules: how likely a token is masked at time t, and what the bound weighs it with.

``move_chance(t) = 1 - alpha_t`` rises from 0 at t = 0 to 1 at t = 1, and ``loss_weight(t) = -alpha_t' / (1 -
alpha_t)``, which is the derivative of ``log move_chance``. The full bound is the integral of f(p) / p over p
in (0, 1], so it does not depend on the schedule; its variance does.

The ``reference_*`` schedules are those of the published BD3-LM code, clamps included, for parity with its
numbers: their clip range is an interval of t, not of move_chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from bdtrain.errors import ConfigError

REFERENCE_EPSILON = 1e-3
"""The clamp of the reference schedules, and the smallest move_chance of its bound."""

MAX_TOTAL_NOISE = -math.log1p(-(1.0 - REFERENCE_EPSILON))
"""Largest total noise (sigma) that the reference's network is given: 6.9078."""


@dataclass(frozen=True)
class Schedule:
    """One noise schedule. All three functions are elementwise on tensors of floats and keep the dtype.

    Attributes:
        name: the config's name of the schedule.
        move_chance: t in [0, 1] -> probability that a token is masked.
        loss_weight: t in (0, 1] -> weight of the cross-entropy of a masked token, in nats per nat; positive.
        t_of: move_chance -> t, the inverse of ``move_chance`` (where a clamp flattens it, the largest such
            t).
        kinks: times inside (0, 1) where move_chance is not smooth; quadratures break there.
    """

    name: str
    move_chance: Callable[[Tensor], Tensor]
    loss_weight: Callable[[Tensor], Tensor]
    t_of: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = ()

    @property
    def is_reference(self) -> bool:
        """Whether this is the reference code's variant: clip ranges of any shape are then intervals of t."""
        return self.name.startswith("reference_")


def get_schedule(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def total_noise(move_chance: Tensor) -> Tensor:
    """The reference's sigma, -log(alpha_t), cut at ``MAX_TOTAL_NOISE``, as its network takes it."""
    return (-torch.log1p(-move_chance)).clamp(max=MAX_TOTAL_NOISE)


def _inverse(t: Tensor) -> Tensor:
    return 1.0 / t


def _same(t: Tensor) -> Tensor:
    return t.clone()


def _linear(name: str) -> Schedule:
    return Schedule(name, move_chance=_same, loss_weight=_inverse, t_of=_same)


def _power(name: str, exponent: float) -> Schedule:
    return Schedule(
        name,
        move_chance=lambda t: t**exponent,
        loss_weight=lambda t: exponent / t,
        t_of=lambda p: p ** (1.0 / exponent),
    )


def _clamped_power(name: str, exponent: float) -> Schedule:
    """The reference clamps the chance from below but not its derivative."""

    def move_chance(t: Tensor) -> Tensor:
        return (t**exponent).clamp(min=REFERENCE_EPSILON)

    return Schedule(
        name,
        move_chance=move_chance,
        loss_weight=lambda t: exponent * t ** (exponent - 1.0) / move_chance(t),
        t_of=lambda p: p.clamp(min=REFERENCE_EPSILON) ** (1.0 / exponent),
        kinks=(REFERENCE_EPSILON ** (1.0 / exponent),),
    )


def _logarithmic(name: str) -> Schedule:
    return Schedule(
        name,
        move_chance=lambda t: torch.log1p(t) / math.log(2.0),
        loss_weight=lambda t: 1.0 / (torch.log1p(t) * (1.0 + t)),
        t_of=lambda p: torch.expm1(p * math.log(2.0)),
    )


def _cosine() -> Schedule:
    half_pi = math.pi / 2.0

    def move_chance(t: Tensor) -> Tensor:
        # 1 - cos without the cancellation at small t.
        return 2.0 * torch.sin(half_pi / 2.0 * t) ** 2

    return Schedule(
        "cosine",
        move_chance=move_chance,
        loss_weight=lambda t: half_pi / torch.tan(half_pi / 2.0 * t),
        t_of=lambda p: 2.0 * torch.asin((p / 2.0).sqrt()) / half_pi,
    )


def _reference_cosine() -> Schedule:
    half_pi, scale = math.pi / 2.0, 1.0 - REFERENCE_EPSILON

    def move_chance(t: Tensor) -> Tensor:
        return 1.0 - scale * torch.cos(half_pi * t)

    return Schedule(
        "reference_cosine",
        move_chance=move_chance,
        # The reference adds its epsilon to the chance a second time.
        loss_weight=lambda t: scale * half_pi * torch.sin(half_pi * t) / (move_chance(t) + REFERENCE_EPSILON),
        t_of=lambda p: torch.acos(((1.0 - p) / scale).clamp(max=1.0)) / half_pi,
    )


def _reference_mdlm() -> Schedule:
    """The log-linear schedule of the older MDLM code: the chance stops at 1 - 1e-3."""
    scale = 1.0 - REFERENCE_EPSILON
    return Schedule(
        "reference_mdlm",
        move_chance=lambda t: scale * t,
        loss_weight=_inverse,
        t_of=lambda p: p / scale,
    )


def _all_schedules() -> tuple[Schedule, ...]:
    return (
        _linear("linear"),
        _cosine(),
        _power("square", 2.0),
        _power("square_root", 0.5),
        _logarithmic("logarithmic"),
        _linear("reference_linear"),
        _reference_cosine(),
        _clamped_power("reference_square", 2.0),
        _clamped_power("reference_square_root", 0.5),
        _logarithmic("reference_logarithmic"),
        _reference_mdlm(),
    )


SCHEDULES = MappingProxyType({schedule.name: schedule for schedule in _all_schedules()})
"""Every schedule by its config name (read only)."""
