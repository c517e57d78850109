"""The schema of a run: one frozen pydantic model per section, and ``RunConfig`` that holds them."""

from __future__ import annotations

from bdtrain.config.schema.data import DataConfig
from bdtrain.config.schema.diffusion import DiffusionConfig, PlanConfig
from bdtrain.config.schema.fields import NO_UNIT, Section
from bdtrain.config.schema.model import ModelConfig
from bdtrain.config.schema.optim import OptimConfig, ParameterGroup, TrainConfig
from bdtrain.config.schema.parallel import ParallelConfig
from bdtrain.config.schema.profile import ProfileConfig
from bdtrain.config.schema.refit import RefitConfig
from bdtrain.config.schema.root import RunConfig
from bdtrain.config.schema.run import RunSection
from bdtrain.config.schema.tracking import TrackingConfig
from bdtrain.config.schema.validation import CheckpointConfig, ValidationConfig

__all__ = [
    "NO_UNIT",
    "CheckpointConfig",
    "DataConfig",
    "DiffusionConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ParameterGroup",
    "PlanConfig",
    "ProfileConfig",
    "RefitConfig",
    "RunConfig",
    "RunSection",
    "Section",
    "TrackingConfig",
    "TrainConfig",
    "ValidationConfig",
]
