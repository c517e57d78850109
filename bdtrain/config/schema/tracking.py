"""Section ``tracking``: where metrics go besides the run's own files."""

from __future__ import annotations

from bdtrain.config.schema.fields import NO_UNIT, Section, setting


class TrackingConfig(Section):
    """Shipping of metrics; ``metrics.jsonl`` in the run's folder is written in any case."""

    mlflow: bool = setting(True, unit=NO_UNIT, description="Ship metrics to MLflow.")
    mlflow_uri: str | None = setting(
        None,
        unit="URI",
        description="Tracking server of MLflow. null means a sqlite file in the run's folder.",
        min_length=1,
    )
    tensorboard: bool = setting(
        False,
        unit=NO_UNIT,
        description="Write metrics for TensorBoard too, into the folder tensorboard of the run. Needs no "
        "package; to look at them: tensorboard --logdir.",
    )
    wandb: bool = setting(
        False,
        unit=NO_UNIT,
        description="Write metrics for Weights & Biases too, offline, into the folder wandb of the run; "
        "wandb sync uploads it. Needs the package wandb.",
    )
    experiment: str = setting(
        "bdtrain", unit=NO_UNIT, description="Experiment that the run belongs to.", min_length=1
    )
    drain_timeout_s: float = setting(
        30.0,
        unit="seconds",
        description="How long the end of a run waits for metrics that are not shipped yet; what is left "
        "stays in metrics.jsonl.",
        ge=0,
    )
