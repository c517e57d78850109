"""Which plans a re-fit looks at, and by which rules it judges them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import ConfigError

MODES = ("clip", "counts")
CRITERIA = ("raw", "relative")
MIN_DRAWS = 20
"""Fewer bootstrap draws say nothing about an interval."""


@dataclass(frozen=True)
class SearchSettings:
    """Rules of a search.

    Attributes:
        mode: ``clip``: clip ranges of the current plan; ``counts``: a density over mask counts, fitted.
        widths: ``clip``: widths of the ranges, in (0, 1).
        start_step: ``clip``: distance between the starts of the ranges, in (0, 1].
        criterion: ``raw``: variance per token at the comparison scale; ``relative``: over the mean squared.
        min_gain: adopt only if the current plan's criterion is larger than the winner's by this share.
        adopt: whether the winner may be adopted at all; if not, it is only reported.
        confidence: of the bootstrap interval that must exclude 0, in (0, 1).
        bootstrap_draws: resamples of the sequences.
        uniform_share: ``counts``: share of the uniform density in a fitted one, in (0, 1].
        seed: of the bootstrap, at least 0.

    Raises:
        ConfigError: at construction, listing everything that is wrong, one problem a line.
    """

    mode: str = "clip"
    widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    start_step: float = 0.05
    criterion: str = "raw"
    min_gain: float = 0.02
    adopt: bool = True
    confidence: float = 0.95
    bootstrap_draws: int = 500
    uniform_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be searched with."""
        problems = []
        if self.mode not in MODES:
            problems.append(f"mode={self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.criterion not in CRITERIA:
            problems.append(f"criterion={self.criterion!r} is unknown; choose one of {', '.join(CRITERIA)}")
        if not all(0.0 < width < 1.0 for width in self.widths):
            problems.append(f"widths={list(self.widths)}; each must lie between 0 and 1")
        if not 0.0 < self.start_step <= 1.0:
            problems.append(f"start_step={self.start_step}; allowed is 0 < start_step <= 1")
        if not 0.0 <= self.min_gain < float("inf"):
            problems.append(f"min_gain={self.min_gain}; it must be at least 0")
        if not 0.0 < self.confidence < 1.0:
            problems.append(f"confidence={self.confidence}; it must lie between 0 and 1")
        if self.bootstrap_draws < MIN_DRAWS:
            problems.append(f"bootstrap_draws={self.bootstrap_draws}; it must be at least {MIN_DRAWS}")
        if not 0.0 < self.uniform_share <= 1.0:
            problems.append(f"uniform_share={self.uniform_share}; allowed is 0 < uniform_share <= 1")
        if self.seed < 0:
            problems.append(f"seed={self.seed}; it must be at least 0")
        if problems:
            raise ConfigError("\n".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "widths": list(self.widths)}


@dataclass(frozen=True)
class Candidate:
    """One plan of a search.

    Attributes:
        name: what people call it, such as ``clip 0.3-0.8``.
        plan: the plan.
        edges: at which edges of the grid it lies: ``lowest start``, ``highest start``, ``narrowest``,
            ``widest``.
        is_current: whether it is the plan in use.
    """

    name: str
    plan: NoisePlan
    edges: tuple[str, ...] = ()
    is_current: bool = False


@dataclass(frozen=True)
class CandidateSet:
    """What a search looks at.

    Attributes:
        candidates: the current plan first, so that it wins ties.
        left_out: (name, reason) of plans of the grid that cannot be drawn.
    """

    candidates: tuple[Candidate, ...]
    left_out: tuple[tuple[str, str], ...]


def clip_candidates(current: NoisePlan, settings: SearchSettings) -> CandidateSet:
    """The current plan under every clip range of the grid; count densities are dropped.

    The grid is the full range, each width at starts 0, ``start_step``, ... inside [0, 1], and at block size 1
    full masking.

    Args:
        current: the plan in use.
        settings: widths and steps.
    """
    wanted: list[tuple[tuple[float, float] | None, tuple[str, ...]]] = [(None, ("widest",))]
    for width in settings.widths:
        starts = int((1.0 - width) / settings.start_step + 1e-9) + 1
        for index in range(starts):
            # Rounded: plans are read by people, and 3 * 0.05 is not 0.15.
            start = round(index * settings.start_step, 10)
            edges = (
                *(("narrowest",) if width == min(settings.widths) else ()),
                *(("lowest start",) if index == 0 else ()),
                *(("highest start",) if index == starts - 1 else ()),
            )
            wanted.append(((start, min(round(start + width, 10), 1.0)), edges))
    if current.block_size == 1:
        wanted.append(((1.0, 1.0), ()))
    found = [Candidate(f"current ({describe_plan(current)})", current, is_current=True)]
    left_out = []
    for clip_range, edges in wanted:
        name = _range_name(clip_range)
        try:
            plan = replace(current, clip_range=clip_range, density=None)
        except ConfigError as error:
            left_out.append((name, str(error)))
            continue
        if plan == current:
            found[0] = replace(found[0], edges=edges)
        else:
            found.append(Candidate(name, plan, edges))
    return CandidateSet(tuple(found), tuple(left_out))


def count_candidates(current: NoisePlan, density: tuple[float, ...]) -> CandidateSet:
    """The current plan with its counts drawn as ``density`` has it, and as the schedule has it.

    Args:
        current: the plan in use; its objective stays.
        density: fitted heights for ``NoisePlan.density``.
    """
    found = [Candidate(f"current ({describe_plan(current)})", current, is_current=True)]
    left_out = []
    for name, heights in (("fitted counts", density), ("plain counts", None)):
        try:
            plan = replace(current, density=heights)
        except ConfigError as error:
            left_out.append((name, str(error)))
            continue
        if plan != current:
            found.append(Candidate(name, plan))
    return CandidateSet(tuple(found), tuple(left_out))


def describe_plan(plan: NoisePlan) -> str:
    """Range and density of a plan in a few words."""
    return _range_name(plan.clip_range) + (", fitted counts" if plan.density is not None else "")


def _range_name(clip_range: tuple[float, float] | None) -> str:
    if clip_range is None:
        return "full range"
    return "full masking" if clip_range == (1.0, 1.0) else f"clip {clip_range[0]:g}-{clip_range[1]:g}"
