"""NoisePlan: which noise levels training (or an evaluation) draws and how it weighs them.

A plan is plain data: it goes into the config and the checkpoint as a dictionary.
``bdtrain/diffusion/tables.py`` compiles it into tables on the host, in float64;
``bdtrain/diffusion/levels.py`` draws from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bdtrain.diffusion import keyed
from bdtrain.diffusion.schedule import REFERENCE_EPSILON, SCHEDULES, Schedule, get_schedule
from bdtrain.errors import ConfigError

PLAN_VERSION = 1
KINDS = ("count", "bernoulli")
WEIGHTINGS = ("elbo", "reference", "flat")
STRATA = ("permuted", "reference_grid", "independent")

FEASIBILITY_TOLERANCE = 1e-9
"""Slack of k/n against the clip range: bounds are decimal fractions, k/n is a binary one."""


@dataclass(frozen=True)
class NoisePlan:
    """One noise plan for one block size.

    Attributes:
        block_size: L', at least 1.
        kind: ``count`` draws how many tokens of a block are masked (t integrated out), ``bernoulli`` draws t
            and masks each token by itself.
        schedule: a name of ``SCHEDULES``.
        clip_range: (beta, omega), the interval of move_chance that is drawn; ``None`` is the full range.
            (1, 1) is full masking, with weight 1. Under a ``reference_*`` schedule it is an interval of t, as
            in the reference.
        weighting: ``elbo``: the (clipped) integral of the bound, (omega - beta) * loss_weight; ``reference``:
            loss_weight alone, and BOS stays in the training denominator; ``flat``: every masked token weighs
            1.
        resample: condition the share of masked tokens of a block on the clip range (the paper's option). The
            weight is not corrected for it, as in the paper.
        density: count plans only: how often each share k/n is drawn, as positive heights over equal bins of
            (0, 1]; the weights are divided by it, so the objective stays the same. ``None``: as (schedule,
            clip_range) has it.
        strata: ``permuted``: one stratum per block of the global batch, in keyed random order;
            ``reference_grid``: strata in row-major order, as the reference has them; ``independent``: no
            strata.
        algo: name of the generator; a plan of another one is refused.
        version: of this record.

    Raises:
        ConfigError: at construction, listing everything that is wrong, one problem a line.
    """

    block_size: int
    kind: str = "count"
    schedule: str = "linear"
    clip_range: tuple[float, float] | None = None
    weighting: str = "elbo"
    resample: bool = False
    density: tuple[float, ...] | None = None
    strata: str = "permuted"
    algo: str = keyed.ALGORITHM
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn or would be ignored, all problems at once."""
        problems = _choice_problems(self) + _range_problems(self) + _density_problems(self)
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def full_masking(self) -> bool:
        """Whether every maskable token is always masked (beta = omega = 1)."""
        return self.clip_range is not None and self.clip_range == (1.0, 1.0)

    @property
    def interval(self) -> tuple[float, float]:
        """The clip range, (0, 1) where there is none."""
        return (0.0, 1.0) if self.clip_range is None else self.clip_range

    @property
    def noise_schedule(self) -> Schedule:
        """The schedule's functions."""
        return get_schedule(self.schedule)

    def feasible_counts(self, n: int) -> range:
        """The counts k in 0..n with k / n inside the clip range."""
        beta, omega = self.interval
        low = math.ceil((beta - FEASIBILITY_TOLERANCE) * n)
        high = math.floor((omega + FEASIBILITY_TOLERANCE) * n)
        return range(max(low, 0), min(high, n) + 1)

    def can_resample(self, n: int) -> bool:
        """Whether a block of n maskable tokens can hold a positive count inside the clip range."""
        counts = self.feasible_counts(n)
        return len(counts) > 0 and counts[-1] >= 1

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON and YAML."""
        record = asdict(self)
        for name in ("clip_range", "density"):
            if record[name] is not None:
                record[name] = list(record[name])
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> NoisePlan:
        """Read what ``to_dict`` wrote.

        Raises:
            ConfigError: on an unknown or missing key, another version or generator, or a plan that is wrong
            in itself.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown:
            raise ConfigError(
                f"noise plan: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        missing = sorted({"block_size", "version", "algo"} - set(record))
        if missing:
            raise ConfigError(f"noise plan: missing keys {', '.join(missing)}; write NoisePlan.to_dict")
        values = dict(record)
        for name in ("clip_range", "density"):
            if values.get(name) is not None:
                values[name] = tuple(float(value) for value in values[name])
        return cls(**values)

    def with_block_size(self, block_size: int) -> NoisePlan:
        """The same plan for another block size."""
        return replace(self, block_size=block_size)


def evaluation_plan(block_size: int, *, kind: str = "count") -> NoisePlan:
    """The plan of a reported bound.

    ``count``: k uniform on 1..n with weight n / k, the whole bound without truncation; at block_size 1 every
    token is masked with weight 1, which is the exact NLL. ``bernoulli``: move_chance uniform on [1e-3, 1]
    with weight (1 - 1e-3) / move_chance, the reference's truncation.

    Args:
        block_size: L'; seq_len for MDLM.
        kind: ``count`` or ``bernoulli``.
    """
    if kind == "bernoulli":
        return NoisePlan(block_size, kind=kind, clip_range=(REFERENCE_EPSILON, 1.0))
    return NoisePlan(block_size, kind=kind)


def full_masking_plan(block_size: int) -> NoisePlan:
    """Every maskable token masked, weight 1: at block_size 1 the exact NLL."""
    return NoisePlan(block_size, clip_range=(1.0, 1.0))


def _choice_problems(plan: NoisePlan) -> list[str]:
    """Names and numbers that have a list of allowed values."""
    problems = []
    if plan.block_size < 1:
        problems.append(f"block_size={plan.block_size}; it must be at least 1")
    for name, allowed in (
        ("kind", KINDS),
        ("schedule", tuple(SCHEDULES)),
        ("weighting", WEIGHTINGS),
        ("strata", STRATA),
    ):
        value = getattr(plan, name)
        if value not in allowed:
            problems.append(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
    if plan.version != PLAN_VERSION:
        problems.append(f"noise plan version {plan.version}; this code reads version {PLAN_VERSION}")
    if plan.algo != keyed.ALGORITHM:
        problems.append(f"noise plan algo={plan.algo!r}; this code draws with {keyed.ALGORITHM!r} only")
    return problems


def _range_problems(plan: NoisePlan) -> list[str]:
    """What is wrong with the clip range and what it is combined with."""
    if plan.clip_range is None:
        if plan.resample:
            return ["resample=true without a clip_range has no effect; set clip_range or resample=false"]
        return []
    if len(plan.clip_range) != 2:
        return [f"clip_range={list(plan.clip_range)}; it must be two numbers [beta, omega]"]
    beta, omega = plan.clip_range
    if not (0.0 <= beta < omega <= 1.0 or beta == omega == 1.0):
        return [
            f"clip_range=[{beta}, {omega}]; allowed is 0 <= beta < omega <= 1, or [1, 1] for full masking; "
            "for the full range set clip_range to null"
        ]
    problems = []
    schedule = SCHEDULES.get(plan.schedule)
    if schedule is not None and schedule.name != "linear":
        if not schedule.is_reference:
            problems.append(
                f"clip_range=[{beta}, {omega}] with schedule={plan.schedule!r}; a clip range needs "
                "schedule='linear' (or a reference_* schedule, where it is an interval of t)"
            )
        elif plan.resample and schedule.name != "reference_linear":
            problems.append(
                f"resample=true with schedule={plan.schedule!r}; the range of masked shares is defined "
                "for 'linear' and 'reference_linear' only"
            )
    if plan.resample and plan.full_masking:
        problems.append(
            "resample=true with clip_range=[1, 1]; every token is masked anyway, set resample=false"
        )
    elif plan.resample and plan.block_size >= 1 and not plan.can_resample(plan.block_size):
        problems.append(
            f"resample=true with clip_range=[{beta}, {omega}] and block_size={plan.block_size}: no k has "
            f"k/{plan.block_size} in that range; widen the range, or set resample=false"
        )
    return problems


def _density_problems(plan: NoisePlan) -> list[str]:
    """What is wrong with a fitted count density."""
    if plan.density is None:
        return []
    problems = []
    if not plan.density or not all(math.isfinite(height) and height > 0.0 for height in plan.density):
        problems.append(
            "density must hold positive finite numbers only: a count never drawn biases the objective"
        )
    if plan.kind != "count":
        problems.append(f"density with kind={plan.kind!r}; a density over counts needs kind='count'")
    if plan.resample or plan.full_masking:
        problems.append("density with resample=true or full masking; drop one of the two")
    return problems
