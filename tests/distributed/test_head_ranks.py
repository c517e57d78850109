"""Two ranks share the vocabulary: the loss of the head and its gradients equal those of one process.

One launch of two gloo ranks computes everything; the tests read what it found.
"""

from pathlib import Path

import pytest

from bdtrain.testing import run_ranks

BOUND = {"float64": 1e-12, "float32": 1e-6}
"""Largest difference, relative to the largest number."""
BFLOAT16 = 1.5e-2
"""Relative to float64; one rounding of the logits and one of their gradients are 4e-3 each."""


@pytest.fixture(scope="module")
def found():
    """Of each rank."""
    worker = Path(__file__).with_name("head_ranks.py")
    return run_ranks(f"{worker}:compare_heads", 2, timeout_s=180, environment={"TRITON_INTERPRET": "1"})


def test_losses_and_gradients_equal_those_of_one_process(found):
    for rank in found:
        # Two types, masks on either rank, both and none, bias or not, 23, 1 and 0 rows, three ways to a loss;
        # then a rank of padding alone and no padding at all.
        assert len(rank["cases"]) == 2 * 4 * 2 * 3 * 3 + 6
        for case in rank["cases"]:
            assert len(case["errors"]) >= 3
            for name, error in case["errors"].items():
                assert error <= BOUND[case["dtype"]], (case, name)


def test_the_triton_backend_gives_the_same_on_either_rank(found):
    for rank in found:
        assert len(rank["triton"]) == 3
        for name, error in rank["triton"].items():
            assert error <= 5e-6, name


def test_bfloat16_is_as_near_to_float64_as_its_rounding(found):
    for rank in found:
        assert max(rank["bfloat16"].values()) < BFLOAT16, rank["bfloat16"]


def test_padding_and_masks_get_no_gradient(found):
    for rank in found:
        assert all(case["silent"] for case in rank["cases"])


def test_the_gradient_of_hidden_crosses_the_ranks_once_and_the_rest_is_two_numbers_a_row(found):
    """23 rows of 12 numbers, in chunks of 4: peaks, then sums with the target's logit."""
    chunks = [4] * 5 + [3]
    each = [size for rows in chunks for size in (rows, 2 * rows)]
    for rank in found:
        assert rank["traffic"]["announced"] == [*each, 23 * 12]
        assert rank["traffic"]["computed again"] == [23, 2 * 23, 23 * 12]


def test_no_rank_makes_the_logits_of_all_rows(found):
    for rank in found:
        assert rank["largest"] <= 64 * 24
