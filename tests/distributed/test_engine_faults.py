"""A loss that is not finite on one rank only: the step is skipped on all, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bdtrain.testing import run_ranks

CASES: list[dict[str, Any]] = [
    {**layout, "precision": precision}
    for precision, layouts in (
        ("fp32", ({}, {"zero": 2}, {"zero": 3}, {"tp": 2, "micro": 4}, {"pp": 2})),
        ("bf16", ({}, {"zero": 2}, {"zero": 3}, {"tp": 2, "zero": 3, "micro": 4}, {"pp": 2, "zero": 2})),
    )
    for layout in layouts
]
APPLIED = [True, False, False, True]
"""Rank 1 spoils two steps in a row; under pp it is the last stage."""


@pytest.fixture(scope="module")
def found() -> list[Any]:
    """Of each rank."""
    worker = Path(__file__).with_name("engine_fault_ranks.py")
    return run_ranks(f"{worker}:spoil_one_rank", 2, CASES, timeout_s=400)


@pytest.fixture(params=range(len(CASES)), ids=[str(case) for case in CASES])
def ranks(request: pytest.FixtureRequest, found: list[Any]) -> list[dict[str, Any]]:
    """What the ranks told of one case."""
    return [rank[request.param] for rank in found]


def test_the_step_is_skipped_and_counted_on_all_ranks(ranks):
    for told in ranks:
        assert told["applied"] == APPLIED
        assert told["skipped"] == 2
        assert [norm == "inf" for norm in told["norms"]] == [not applied for applied in APPLIED]


def test_a_skipped_step_changes_no_bit_of_weights_and_state(ranks):
    for told in ranks:
        assert told["unchanged"] == [not applied for applied in APPLIED]


def test_the_steps_after_it_are_bit_for_bit_those_of_a_run_without_it(ranks):
    for told in ranks:
        assert told["same_as_control"]
        assert told["losses"] == told["control_losses"]
