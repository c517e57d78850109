"""Schedules against the golden vectors of the reference and against their own derivative."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bdtrain.diffusion.schedule import MAX_TOTAL_NOISE, SCHEDULES, get_schedule, total_noise
from bdtrain.errors import ConfigError

OURS = ("linear", "cosine", "square", "square_root", "logarithmic")
GOLDEN_NAMES = {
    "reference_linear": "loglinear",
    "reference_square": "square",
    "reference_square_root": "square_root",
    "reference_logarithmic": "log",
    "reference_cosine": "cosine",
}


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_reference_schedules_repeat_the_golden_vectors(name, golden):
    data = np.load(golden / "schedules.npz")
    t = torch.from_numpy(data["t"]).double()
    schedule = get_schedule(name)
    np.testing.assert_allclose(
        schedule.move_chance(t).numpy(), data[f"{GOLDEN_NAMES[name]}_move_chance"], rtol=1e-5, atol=2e-7
    )
    # The golden scale multiplies log p and is negative; ours weighs the cross-entropy.
    np.testing.assert_allclose(
        schedule.loss_weight(t).numpy(), -data[f"{GOLDEN_NAMES[name]}_loss_scale"], rtol=2e-5
    )


def test_the_older_log_linear_schedule_repeats_the_golden_vectors(golden):
    data = np.load(golden / "schedules.npz")
    t = torch.from_numpy(data["t"]).double()
    schedule = get_schedule("reference_mdlm")
    np.testing.assert_allclose(
        total_noise(schedule.move_chance(t)).numpy(), data["loglinear_total_noise"], rtol=1e-5
    )
    # Its weight is the rate of the noise over expm1 of the noise.
    rate, noise = data["loglinear_rate_noise"].astype(float), data["loglinear_total_noise"].astype(float)
    np.testing.assert_allclose(schedule.loss_weight(t).numpy(), rate / np.expm1(noise), rtol=1e-4)
    assert data["loglinear_sigma_max"] == pytest.approx(MAX_TOTAL_NOISE, rel=1e-5)


@pytest.mark.parametrize("name", [*OURS, "reference_linear", "reference_logarithmic", "reference_mdlm"])
def test_the_weight_is_the_derivative_of_the_log_of_the_chance(name):
    schedule = get_schedule(name)
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.move_chance(t).log().sum(), t)
    torch.testing.assert_close(schedule.loss_weight(t.detach()), slope, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_chance_rises_with_t_and_is_inverted(name):
    schedule = get_schedule(name)
    t = torch.linspace(0.05, 1.0, 40, dtype=torch.float64)
    chance = schedule.move_chance(t)
    assert (chance.diff() > 0).all()
    torch.testing.assert_close(schedule.t_of(chance), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OURS)
def test_no_token_is_masked_at_0_and_every_one_at_1(name):
    chance = get_schedule(name).move_chance(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(chance, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0.0, atol=1e-15)


def test_formulas_of_the_schedules():
    t = torch.tensor([0.3], dtype=torch.float64)
    expected = {
        "linear": 0.3,
        "cosine": 1 - math.cos(math.pi * 0.15),
        "square": 0.09,
        "square_root": math.sqrt(0.3),
        "logarithmic": math.log2(1.3),
    }
    for name, value in expected.items():
        assert get_schedule(name).move_chance(t).item() == pytest.approx(value, rel=1e-14)


def test_an_unknown_schedule_is_refused_with_the_known_names():
    with pytest.raises(ConfigError, match="square_root"):
        get_schedule("sqrt")
