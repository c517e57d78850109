"""The split model equals its serial twin: loss, every gradient, logits of generation.

One launch of two gloo ranks computes everything; the tests read what it found.
"""

from pathlib import Path

import pytest

from bdtrain.testing import run_ranks

LAYOUTS = {"tp2 pp1 sp0": [2, 1, 0], "tp2 pp1 sp1": [2, 1, 1], "tp1 pp2 sp0": [1, 2, 0]}
EXACT = 1e-10
"""Relative, in float64: several thousand roundings of 1e-16."""


@pytest.fixture(scope="module")
def found():
    """Of each rank, by layout."""
    worker = Path(__file__).with_name("model_ranks.py")
    return run_ranks(f"{worker}:compare_layouts", 2, list(LAYOUTS.values()), timeout_s=180)


def cases(found, layout):
    return [case for rank in found for case in rank[layout]["cases"]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_equal_the_serial_twins(found, layout):
    told = cases(found, layout)
    assert len(told) == 2 * 8
    for case in told:
        assert case["gradient"] < EXACT, case
        # The last layer's clean rows are all that never gets a gradient, and they are no parameters.
        assert case["compared"] == case["parameters"], case
    losses = [case["loss"] for case in told if case["loss"] is not None]
    assert len(losses) == (8 if "pp2" in layout else 16)
    assert max(losses) < EXACT


@pytest.mark.parametrize("layout", ["tp2 pp1 sp0", "tp2 pp1 sp1"])
def test_leaving_out_the_sum_of_partial_gradients_is_seen(found, layout):
    for case in cases(found, layout):
        for name, error in case["partial"].items():
            assert error > 1e-3, (name, case["case"])


def test_only_partial_gradients_are_marked(found):
    """4 layers: two head norms of the qwen3 shape; under sequence parallelism its other two norms, or the
    weights and biases of two norms and one bias of the bd3lm shape. All others are right without a sum. A
    stage of two has half the layers; whether tp is 1 makes no difference."""
    marks = {"tp2 pp1 sp0": (8, 0), "tp2 pp1 sp1": (16, 20), "tp1 pp2 sp0": (4, 0)}
    for layout, (qwen3, bd3lm) in marks.items():
        for case in cases(found, layout):
            assert case["marked"] == (qwen3 if "qwen3" in case["case"] else bd3lm), (layout, case)
            assert case["whole"] < EXACT, (layout, case)


def test_a_view_of_a_split_vocabulary_equals_the_whole_one(found):
    for rank in found:
        view = rank["tp2 pp1 sp0"]["view"]
        assert len(view) == 9
        assert max(view.values()) < 1e-12, view


def test_generation_is_the_same_on_split_heads(found):
    for rank in found:
        assert rank["tp2 pp1 sp0"]["denoiser"] < 1e-6  # logits come as float32


def test_what_cannot_be_split_over_the_sequence_is_refused(found):
    for rank in found:
        length, generation = rank["tp2 pp1 sp1"]["refused"]
        assert "2 ranks do not divide the 7 tokens" in length and "multiple of 2" in length
        assert "build it with sequence_parallel=False" in generation


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_parts_stay_near_the_float32_twin_and_add_up_in_float32(found, layout):
    for rank in found:
        for told in rank[layout]["bf16"]:
            assert told["finite"] and told["loss"] < 0.02 and told["gradient"] < 0.08, told
            assert told["dtypes"] == ["torch.float32"], told
