"""The training step under every layout of two ranks equals one process with plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bdtrain.testing import run_ranks

CLOSE = 1e-5
"""Relative, in float32: some hundred roundings of 6e-8."""

GRIDS: tuple[dict[str, Any], ...] = (
    {},
    {"tp": 2, "micro": 4},
    {"tp": 2, "sp": True, "micro": 4},
    {"pp": 2},
)
"""Micro-batches per rank: 2, 2, 2 and 4."""
COPIES = [
    {**grid, "zero": zero, "copies": 2}
    for grid in GRIDS
    for zero in (1, 2, 3)
    if zero < 3 or "pp" not in grid
]
RULES = [
    {**grid, "zero": zero, "shape": "bd3lm", "rules": True}
    for grid, stages in zip(GRIDS, ((1, 3), (2,), (1, 3), (1, 2)), strict=True)
    for zero in stages
]
RECOMPUTED = [
    {**grid, "zero": zero, "copies": 2, "recompute": recompute}
    for grid, zero in zip((*GRIDS[:1], *GRIDS[:1], *GRIDS[2:]), (2, 3, 3, 1), strict=True)
    for recompute in ("full", "core_attn")
]
PERSISTENT = [{"zero": 3, "persistent": True, "copies": 2}]
CASES = COPIES + RULES + RECOMPUTED + PERSISTENT


def name_of(case: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """Of each rank."""
    worker = Path(__file__).with_name("engine_layout_ranks.py")
    return run_ranks(f"{worker}:compare_with_plain_torch", 2, CASES, timeout_s=400)


@pytest.fixture(params=range(len(CASES)), ids=[name_of(case) for case in CASES])
def case(request: pytest.FixtureRequest, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One case: what was asked, and what each rank told."""
    return {**CASES[request.param], "ranks": [rank["cases"][request.param] for rank in found]}


def test_every_gradient_and_all_state_equal_plain_torch(case):
    """Gradients of the first step; weights, moments and average after five, where that many were taken."""
    told = case["ranks"][0]
    worst = max(told["errors"].items(), key=lambda item: item[1])
    assert worst[1] < CLOSE, worst
    kinds = 1 if "recompute" in case else 5
    assert len(told["errors"]) == kinds * told["tensors"]


def test_losses_and_gradient_norms_equal_plain_torch_on_every_rank(case):
    for told in case["ranks"]:
        assert told["losses"] == pytest.approx(told["plain_losses"], rel=CLOSE)
        assert told["norms"] == pytest.approx(told["plain_norms"], rel=CLOSE)
        assert min(told["norms"]) > 2 * 0.5  # so clipping was at work
    first, second = case["ranks"]
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]


def test_noise_and_data_have_the_serial_bits_on_every_rank(case):
    for told in case["ranks"]:
        assert told["same_rows"]
    first, second = (told["rows"] for told in case["ranks"])
    everything = case["ranks"][0]["all_rows"]
    if "tp" in case or "pp" in case:
        assert first == second == everything
    else:
        assert sorted(first + second) == everything


def test_every_element_belongs_to_one_rank(case):
    assert all(told["owned_once"] for told in case["ranks"])


def test_stage_3_was_tried_with_parameters_that_must_be_gathered(case):
    gathered = case["zero"] == 3 and "persistent" not in case
    for told in case["ranks"]:
        assert told["gathered"] == (told["tensors"] if gathered else 0)


def test_rows_have_documents_padding_and_tokens_that_do_not_count(found):
    rows = found[0]["rows"]
    assert rows["most documents in a row"] > 2 and rows["padding"] > 0 and rows["given"] > 0


def test_leaving_out_the_sum_of_partial_gradients_is_seen(found):
    for told in found[0]["incomplete"]:
        wrong = {name for name, error in told["errors"].items() if error > 1e-3}
        assert "gradient decoder.layers.0.self_attention.q_layernorm.weight" in wrong
        assert told["norms"] != pytest.approx(told["plain_norms"], rel=1e-4)
    # Under sequence parallelism the other norms see some rows only.
    assert "gradient decoder.layers.1.input_layernorm.weight" in wrong


def test_a_missing_mark_is_seen_in_the_gradient_norm(found):
    for right, wrong in found[0]["unmarked"]:
        assert abs(wrong / right - 1) > 1e-3, (right, wrong)
