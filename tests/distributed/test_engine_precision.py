"""bfloat16: gradients add up in float32 under every layout, and training follows float32's curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdtrain.testing import run_ranks

COUNTS, STEPS, WINDOW = (1, 8, 64), 50, 10
WORKER = Path(__file__).with_name("engine_precision_ranks.py")
CASES: list[dict[str, Any]] = [
    {**layout, "precision": "bf16"} for layout in ({}, {"zero": 2}, {"zero": 3}, {"tp": 2}, {"pp": 2})
]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Two ranks."""
    return run_ranks(f"{WORKER}:measure", 2, CASES, COUNTS, STEPS, timeout_s=400)[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """Loss curves of one process."""
    return run_ranks(f"{WORKER}:curves_alone", 1, STEPS, timeout_s=240)[0]


@pytest.mark.parametrize("layout", ["dp2 zero1", "dp2 zero2", "dp2 zero3", "pp2 zero1"])
def test_error_of_the_gradient_does_not_grow_with_the_number_of_micro_batches(found, layout):
    """Beside the float64 sum of the same bf16 gradients; bf16 rounds by up to 4e-3, float32 by 6e-8."""
    by_count = found["errors"][layout]
    ours = [by_count[str(count)]["ours"] for count in COUNTS]
    in_bf16 = [by_count[str(count)]["bf16 sum"] for count in COUNTS]
    message = f"{layout}: {COUNTS} micro-batches: {ours}; summed in bf16 it would be {in_bf16}"
    assert max(ours) < 1e-6, message
    # The same measure sees a sum in bf16 grow.
    assert in_bf16[0] < in_bf16[1] < in_bf16[2] and in_bf16[2] > 5e-3, message


def distance(one: list[float], other: list[float]) -> float:
    """Mean absolute difference of the curves, each a mean over ten steps."""
    kernel = np.full(WINDOW, 1 / WINDOW)
    smooth = [np.convolve(curve, kernel, "valid") for curve in (one, other)]
    return float(np.abs(smooth[0] - smooth[1]).mean())


def test_bf16_follows_the_float32_curve_far_closer_than_other_noise_does(alone):
    assert np.mean(alone["fp32"][-WINDOW:]) < np.mean(alone["fp32"][:WINDOW]) - 0.3  # something was learnt
    spread = distance(alone["bf16"], alone["other noise"])
    assert distance(alone["bf16"], alone["fp32"]) < spread / 4


@pytest.mark.parametrize("layout", ["dp2 zero1", "tp2 zero1", "pp2 zero1"])
def test_bf16_curves_of_two_ranks_agree_with_one_process(alone, found, layout):
    spread = distance(alone["bf16"], alone["other noise"])
    assert distance(found["curves"][layout], alone["bf16"]) < spread / 4
