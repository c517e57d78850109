"""What a run is: the schema, reading files and overrides, checking the whole, and writing it down.

Needs neither torch nor any other heavy package, so that a mistake is found in a fraction of a second.
"""

from __future__ import annotations

from bdtrain.config.checks import check_paths, validate_layout
from bdtrain.config.command_line import CommandLine, parse_command_line, positive_int, summarise
from bdtrain.config.estimate import ParameterCount, count_parameters
from bdtrain.config.explain import explain
from bdtrain.config.loader import LoadedConfig, config_sha256, dump_resolved, load_config
from bdtrain.config.schema import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    RunConfig,
    RunSection,
    TrainConfig,
    ValidationConfig,
)
from bdtrain.config.sources import Origin

__all__ = [
    "CheckpointConfig",
    "CommandLine",
    "DataConfig",
    "DiffusionConfig",
    "LoadedConfig",
    "ModelConfig",
    "OptimConfig",
    "Origin",
    "ParameterCount",
    "PlanConfig",
    "RunConfig",
    "RunSection",
    "TrainConfig",
    "ValidationConfig",
    "check_paths",
    "config_sha256",
    "count_parameters",
    "dump_resolved",
    "explain",
    "load_config",
    "parse_command_line",
    "positive_int",
    "summarise",
    "validate_layout",
]
