"""Two gloo processes save, fail, find and load together. One launch computes everything."""

from pathlib import Path

import pytest

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.testing import run_ranks


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    worker = Path(__file__).with_name("gloo_ranks.py")
    return run_ranks(f"{worker}:main", 2, tmp_path_factory.mktemp("ranks"), timeout_s=100)


def test_values_of_any_length_reach_every_rank(told):
    for rank in told:
        assert rank["gathered"] == [{"rank": 0, "text": "é"}, {"rank": 1, "text": "é" * 1001}]
        assert rank["nothing"] == [None, None]
        assert rank["broadcast"] == ["from", 0]


def test_group_that_does_not_hold_the_worlds_first_rank_broadcasts(told):
    assert told[1]["alone"] == 1


def test_ranks_save_together(told):
    assert [rank["saved"] for rank in told] == ["step-000000001"] * 2


def test_failure_of_one_rank_is_the_same_error_on_both_and_leaves_nothing(told):
    assert told[0]["refused"] == told[1]["refused"]
    assert "refused: step 2 was not saved" in told[0]["refused"]
    assert "rank 1: No space left on device" in told[0]["refused"]
    assert told[0]["after"] == told[1]["after"] == ["step-000000001"]


def test_save_after_a_failure_succeeds(told):
    assert [rank["again"] for rank in told] == ["step-000000003"] * 2


def test_both_ranks_pass_over_the_damaged_one(told):
    assert told[0]["found"] == told[1]["found"]
    name, [[rejected, reason]] = told[0]["found"]
    assert name == "step-000000001"
    assert rejected.endswith("step-000000003")
    assert "has 40 bytes" in reason


def test_two_tensor_parallel_ranks_go_on_as_two_stages(told):
    assert [rank["loaded"] for rank in told] == [True, True]


def test_one_process_says_what_a_group_would():
    alone = OneProcess()
    alone.barrier()
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.gather_objects((1, 2)) == [[1, 2]]
    assert alone.broadcast_object({"a": None}) == {"a": None}
