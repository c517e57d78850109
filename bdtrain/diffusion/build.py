"""From the sections of a run's configuration to its noise plans and its objective."""

from __future__ import annotations

from typing import Protocol

from bdtrain.diffusion.objectives.base import Objective
from bdtrain.diffusion.objectives.build import make_objective
from bdtrain.diffusion.plan import NoisePlan, evaluation_plan


class PlanSettings(Protocol):
    """What this room reads of ``bdtrain.config``'s PlanConfig; see there for meanings and defaults."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def clip_range(self) -> tuple[float, float] | None: ...  # noqa: D102
    @property
    def weighting(self) -> str: ...  # noqa: D102
    @property
    def resample(self) -> bool: ...  # noqa: D102
    @property
    def strata(self) -> str: ...  # noqa: D102


class DiffusionSettings(Protocol):
    """What it reads of DiffusionConfig; ``block_size`` is resolved."""

    @property
    def algo(self) -> str: ...  # noqa: D102
    @property
    def block_size(self) -> int: ...  # noqa: D102
    @property
    def schedule(self) -> str: ...  # noqa: D102
    @property
    def plan(self) -> PlanSettings: ...  # noqa: D102


class RowSettings(Protocol):
    """What it reads of DataConfig."""

    @property
    def seq_len(self) -> int: ...  # noqa: D102
    @property
    def documents(self) -> str: ...  # noqa: D102


class Vocabulary(Protocol):
    """What it needs to know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def mask_id(self) -> int: ...  # noqa: D102


def training_plan(settings: DiffusionSettings) -> NoisePlan | None:
    """The noise plan of training; None for AR, which has no noise."""
    if settings.algo == "ar":
        return None
    plan = settings.plan
    return NoisePlan(
        settings.block_size,
        kind=plan.kind,
        schedule=settings.schedule,
        clip_range=plan.clip_range,
        weighting=plan.weighting,
        resample=plan.resample,
        strata=plan.strata,
    )


def reported_plan(settings: DiffusionSettings) -> NoisePlan | None:
    """The plan of the reported bound: the full range of noise, whatever training draws; None for AR."""
    return None if settings.algo == "ar" else evaluation_plan(settings.block_size)


def build_objective(
    settings: DiffusionSettings, rows: RowSettings, vocabulary: Vocabulary, plan: NoisePlan | None
) -> Objective:
    """The objective of a run under some noise plan."""
    return make_objective(
        settings.algo,
        plan=plan,
        mask_id=vocabulary.mask_id,
        vocab_size=vocabulary.vocab_size,
        seq_len=rows.seq_len,
        isolate_documents=rows.documents == "isolate",
    )
