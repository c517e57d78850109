"""Which backend measures a re-fit, and how a run's ``auto`` is settled."""

from __future__ import annotations

import importlib.util
from typing import Any

from bdtrain.config import RunConfig
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import ConfigError, RefitError
from bdtrain.refit.job import Measure, join_shards, measure_here
from bdtrain.refit.request import RefitRequest


def settle_placement(config: RunConfig, *, on_gpus: bool) -> tuple[str, str]:
    """Where a run's re-fits happen, and why.

    Args:
        config: of the run.
        on_gpus: whether it trains on GPUs.

    Returns:
        ``inline``, ``process``, ``ray`` or ``external``, and the reason in words.

    Raises:
        RefitError: if Ray is asked for and not installed.
        ConfigError: if no plan could be there in time.
    """
    refit = config.refit
    if refit.mode == "off":
        return "inline", "nothing to do"
    if refit.placement == "auto":
        if refit.ray_address != "local":
            chosen, why = "ray", f"refit.ray_address={refit.ray_address} names a cluster"
        elif on_gpus:
            chosen, why = "inline", "the GPUs are busy with training, and one pass is short"
        else:
            chosen, why = "process", "one more process beside the trainer; no cluster is named"
    else:
        chosen, why = refit.placement, "as refit.placement says"
    if refit.lag_steps == 0 and not refit.wait and chosen != "inline":
        raise ConfigError(
            f"refit.lag_steps=0 with placement {chosen} ({why}): its plan would always come too late; set "
            "refit.wait=true, or give refit.lag_steps time for it"
        )
    if chosen == "ray" and importlib.util.find_spec("ray") is None:
        raise RefitError(
            "refit.placement=ray, and Ray is not installed; pip install 'bdtrain[ray]', or choose "
            "refit.placement=process or inline"
        )
    return chosen, why


def choose_measure(config: RunConfig) -> Measure:
    """What measures the blocks in a process of its own.

    Raises:
        RefitError: if Ray is asked for and not installed.
    """
    refit = config.refit
    wants_ray = refit.placement == "ray" or (refit.placement == "auto" and refit.ray_address != "local")
    if not wants_ray:
        return measure_here
    settle_placement(config, on_gpus=False)
    return lambda request: _measure_on_ray(request, config)


def _measure_on_ray(
    request: RefitRequest, config: RunConfig
) -> tuple[dict[int, BlockRecords], dict[str, Any]]:
    from bdtrain.refit.outcome import RaySettings
    from bdtrain.refit.ray_backend import measure_on_ray

    refit = config.refit
    settings = RaySettings(
        address=refit.ray_address,
        num_workers=refit.workers,
        cpus_per_worker=refit.worker_cpus,
        gpus_per_worker=refit.worker_gpus,
    )
    outcome = measure_on_ray(
        request,
        settings,
        deadline_s=refit.deadline_s,
        quorum=refit.quorum,
        log=lambda line: print(line, flush=True),
    )
    said = {
        "backend": "ray",
        "seconds": dict(outcome.seconds),
        "failures": {str(shard): reason for shard, reason in outcome.failures.items()},
        "complete_share": outcome.complete_share,
    }
    return join_shards(request, outcome.records), said
