"""Which backend measures a re-fit, and how a run's ``auto`` is settled."""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING

from bdtrain.config import RunConfig
from bdtrain.config.refit_rules import known_placement
from bdtrain.errors import ConfigError, RefitError
from bdtrain.refit.job import Measure, measure_here

if TYPE_CHECKING:
    from bdtrain.refit.ray_backend import SharedSession


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
    chosen = known_placement(refit)
    if chosen == "auto":
        chosen = "inline" if on_gpus else "process"
        why = (
            "the GPUs are busy with training, and one pass is short"
            if on_gpus
            else "one more process beside the trainer; no cluster is named"
        )
    elif refit.placement == "auto":
        why = (
            f"refit.ray_address={refit.ray_address} names a cluster"
            if chosen == "ray"
            else f"refit.gpu={refit.gpu} is free for it"
        )
    else:
        why = "as refit.placement says"
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


def training_share(config: RunConfig, placement: str, *, on_gpus: bool, ranks: int) -> int | None:
    """How many ranks of training a re-fit is about as fast as, for its expected time.

    Args:
        config: of the run.
        placement: as settled.
        on_gpus: whether it trains on GPUs.
        ranks: of training.

    Returns:
        None where it measures on another kind of device, or elsewhere, and nothing is known of its speed.
    """
    refit = config.refit
    if placement == "inline":
        return ranks
    if placement == "ray":
        return refit.workers * refit.worker_tp if (refit.worker_gpus > 0) == on_gpus else None
    if placement == "process":
        return 1 if (refit.gpu is not None) == on_gpus else None
    return None


def choose_measure(config: RunConfig, shared: SharedSession | None = None) -> Measure:
    """What measures the blocks in a process of its own, for a re-fit that begins now.

    Args:
        config: of the run.
        shared: session of Ray for several measurements; None starts one for each.

    Raises:
        RefitError: if Ray is asked for and not installed.
    """
    if known_placement(config.refit) != "ray":
        return measure_here
    settle_placement(config, on_gpus=False)
    from bdtrain.refit.ray_backend import measure_refit

    began = time.monotonic()
    return lambda request: measure_refit(request, config, shared, began)
