"""Where re-fits happen: the table of ``auto``, and Ray that is asked for and absent."""

import importlib.util

import pytest

from bdtrain.config import RunConfig
from bdtrain.errors import ConfigError, RefitError
from bdtrain.refit.backends import choose_measure, settle_placement, training_share
from bdtrain.refit.job import measure_here
from bdtrain.testing import tiny_model_config


def run_config(**refit):
    return RunConfig.model_validate(
        {
            "model": tiny_model_config(),
            "data": {"kind": "synthetic", "seq_len": 32},
            "train": {"steps": 1, "global_batch_size": 8},
            "refit": {"mode": "clip", **refit},
        }
    )


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def with_ray(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("settings", "on_gpus", "expected", "why"),
    [
        ({}, False, "process", "no cluster"),
        ({}, True, "inline", "GPUs are busy"),
        ({"ray_address": "auto"}, True, "ray", "refit.ray_address=auto"),
        ({"ray_address": "head:6379"}, False, "ray", "refit.ray_address=head:6379"),
        ({"gpu": 3}, True, "process", "refit.gpu=3 is free"),
        ({"gpu": 3, "ray_address": "auto"}, True, "ray", "refit.ray_address=auto"),
        ({"placement": "ray"}, True, "ray", "as refit.placement says"),
        ({"placement": "process"}, True, "process", "as refit.placement says"),
        ({"placement": "inline"}, False, "inline", "as refit.placement says"),
        ({"placement": "external"}, False, "external", "as refit.placement says"),
    ],
)
def test_auto_takes_a_named_cluster_else_named_gpus_else_the_ranks_on_gpus_else_a_process(
    with_ray, settings, on_gpus, expected, why
):
    chosen, reason = settle_placement(run_config(**settings), on_gpus=on_gpus)
    assert chosen == expected and why in reason


def test_ray_that_is_not_there_is_refused_before_the_run(without_ray):
    for settings in ({"placement": "ray"}, {"ray_address": "auto"}):
        with pytest.raises(RefitError, match=r"Ray is not installed; pip install 'bdtrain\[ray\]'"):
            settle_placement(run_config(**settings), on_gpus=False)
        with pytest.raises(RefitError, match="Ray is not installed"):
            choose_measure(run_config(**settings))
    assert settle_placement(run_config(), on_gpus=False)[0] == "process"


def test_only_ray_needs_more_than_this_process(with_ray):
    others = [{"placement": placement} for placement in ("process", "external", "inline")]
    for settings in ({}, {"gpu": 3}, *others):
        assert choose_measure(run_config(**settings)) is measure_here
    for settings in ({"placement": "ray"}, {"ray_address": "auto"}):
        assert choose_measure(run_config(**settings)) is not measure_here


@pytest.mark.parametrize(("settings", "on_gpus"), [({"placement": "process"}, True), ({}, False)])
def test_a_plan_that_would_always_be_late_is_refused(settings, on_gpus):
    with pytest.raises(ConfigError, match=r"lag_steps=0 .* always come too late"):
        settle_placement(run_config(lag_steps=0, **settings), on_gpus=on_gpus)
    assert settle_placement(run_config(lag_steps=0, wait=True, **settings), on_gpus=on_gpus)[0] == "process"
    assert settle_placement(run_config(lag_steps=0), on_gpus=True)[0] == "inline"


def test_a_run_without_re_fits_needs_no_ray(without_ray):
    settle_placement(run_config(mode="off", placement="ray"), on_gpus=False)


@pytest.mark.parametrize(
    ("settings", "on_gpus", "share"),
    [
        ({"placement": "inline"}, True, 8),
        ({"placement": "inline"}, False, 8),
        ({"placement": "process"}, False, 1),
        ({"placement": "process", "gpu": 7}, True, 1),
        # On CPUs beside a run on GPUs, or elsewhere: training says nothing of its speed.
        ({"placement": "process"}, True, None),
        ({"placement": "external"}, True, None),
        ({"placement": "ray", "workers": 3}, False, 3),
        ({"placement": "ray", "workers": 3, "worker_tp": 2, "worker_gpus": 1.0}, True, 6),
        ({"placement": "ray", "workers": 3}, True, None),
        ({"placement": "ray", "worker_gpus": 1.0}, False, None),
    ],
)
def test_the_expected_time_follows_from_training_where_the_devices_are_of_a_kind(settings, on_gpus, share):
    config = run_config(**settings)
    assert training_share(config, settings["placement"], on_gpus=on_gpus, ranks=8) == share
