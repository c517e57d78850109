"""``RunConfig``: all sections of a run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from bdtrain.config.schema.data import DataConfig
from bdtrain.config.schema.diffusion import DiffusionConfig
from bdtrain.config.schema.fields import Section
from bdtrain.config.schema.model import ModelConfig
from bdtrain.config.schema.optim import OptimConfig, TrainConfig
from bdtrain.config.schema.parallel import ParallelConfig
from bdtrain.config.schema.profile import ProfileConfig
from bdtrain.config.schema.refit import RefitConfig
from bdtrain.config.schema.run import RunSection
from bdtrain.config.schema.tracking import TrackingConfig
from bdtrain.config.schema.validation import CheckpointConfig, ValidationConfig


class RunConfig(Section):
    """What a run is. Each section owns its defaults.

    Rules that join settings live in ``bdtrain.config.checks``; ``load_config`` applies them, this class alone
    does not.
    """

    run: RunSection = Field(default_factory=RunSection, description="Name, folder, seed and going on.")
    model: ModelConfig = Field(description="Shape of the network.")
    data: DataConfig = Field(
        default_factory=DataConfig, description="Which tokens are read and in which order."
    )
    diffusion: DiffusionConfig = Field(
        default_factory=DiffusionConfig, description="The objective and its noise."
    )
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimizer and learning rate.")
    train: TrainConfig = Field(description="Length of the run and the cut of its batches.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="How the run is cut over its ranks."
    )
    validation: ValidationConfig = Field(
        default_factory=ValidationConfig, description="Likelihood on held-out rows and samples."
    )
    refit: RefitConfig = Field(
        default_factory=RefitConfig, description="The noise plan fitted again while the model learns."
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="What is kept.")
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description="Where metrics go besides the run's own files."
    )
    profile: ProfileConfig = Field(
        default_factory=ProfileConfig, description="A trace and a memory snapshot of a few steps."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_block_per_row_for_mdlm(cls, values: Any) -> Any:
        """The block of ``mdlm`` is the row: its length is known here, not in the diffusion section."""
        if not isinstance(values, dict) or not isinstance(values.get("diffusion"), dict):
            return values
        diffusion = values["diffusion"]
        if diffusion.get("algo") != "mdlm" or diffusion.get("block_size") is not None:
            return values
        data = values.get("data")
        default = DataConfig.model_fields["seq_len"].default
        seq_len = (
            data.get("seq_len", default) if isinstance(data, dict) else getattr(data, "seq_len", default)
        )
        return {**values, "diffusion": {**diffusion, "block_size": seq_len}}

    @property
    def tokens_per_step(self) -> int:
        """Clean tokens of one optimizer step, over all ranks."""
        return self.train.global_batch_size * self.data.seq_len
