"""What a run is: the schema, reading files and overrides, checking the whole, and writing it down.

Needs neither torch nor any other heavy package, so that a mistake is found in a fraction of a second.
"""

from __future__ import annotations

from bdtrain.config.checks import check_paths
from bdtrain.config.command_line import CommandLine, parse_command_line, positive_int
from bdtrain.config.estimate import (
    MemoryEstimate,
    ParameterCount,
    count_local_parameters,
    count_parameters,
    estimate_memory,
)
from bdtrain.config.explain import explain
from bdtrain.config.layout import Layout, resolve_layout, resolve_micro_batch_size
from bdtrain.config.loader import LoadedConfig, config_sha256, dump_resolved, load_config
from bdtrain.config.resume import changed_settings, fixed_changes, fixed_settings
from bdtrain.config.schema import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ParameterGroup,
    PlanConfig,
    RunConfig,
    RunSection,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
from bdtrain.config.sources import Origin
from bdtrain.config.summary import summarise, summarise_layout

__all__ = [
    "CheckpointConfig",
    "CommandLine",
    "DataConfig",
    "DiffusionConfig",
    "Layout",
    "LoadedConfig",
    "MemoryEstimate",
    "ModelConfig",
    "OptimConfig",
    "Origin",
    "ParallelConfig",
    "ParameterCount",
    "ParameterGroup",
    "PlanConfig",
    "RunConfig",
    "RunSection",
    "TrackingConfig",
    "TrainConfig",
    "ValidationConfig",
    "changed_settings",
    "check_paths",
    "config_sha256",
    "count_local_parameters",
    "count_parameters",
    "dump_resolved",
    "estimate_memory",
    "explain",
    "fixed_changes",
    "fixed_settings",
    "load_config",
    "parse_command_line",
    "positive_int",
    "resolve_layout",
    "resolve_micro_batch_size",
    "summarise",
    "summarise_layout",
]
