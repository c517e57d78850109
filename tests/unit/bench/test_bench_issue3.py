"""The benchmarks of the driver and of checkpoint formats compare the same work, on a tiny size."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bdtrain.parallel.fragments import StateFragment
from bdtrain.testing import run_ranks
from tools.bench import checkpoint_candidates, checkpoint_formats, driver_cost

TINY = driver_cost.Shape(layers=2, hidden=32, heads=4, vocabulary=64, seq=32, block=4, rows=2)


def test_driver_and_bare_loop_train_on_the_same_losses(tmp_path):
    (result,) = run_ranks(f"{driver_cost.__file__}:rank_main", 1, vars(TINY), 3, tmp_path)
    assert set(result["seconds"]) == {"ours", "plain", "fused"}
    assert all(len(values) == 3 for values in result["seconds"].values())
    assert result["loss_difference"] < 1e-5
    parts = result["parts"]["ours"]
    assert parts["update"] >= parts["optimizer"] > 0


def test_shape_is_of_at_least_two_micro_batches_and_all_of_it_reaches_the_configuration(tmp_path):
    shape = replace(TINY, rows=3, micro_batches=2, zero_stage=2)
    overrides = shape.overrides(tmp_path, ranks=2)
    assert "train.global_batch_size=12" in overrides
    assert "train.micro_batch_size=3" in overrides
    assert "parallel.zero_stage=2" in overrides


def test_overhead_is_the_ratio_of_medians():
    seconds = {"ours": [1.1, 1.05, 9.0, 1.2, 1.0], "plain": [1.0, 1.0, 1.0, 1.0, 1.0]}
    middle, low, high = driver_cost.over({"seconds": seconds}, "plain")
    assert middle == pytest.approx(0.1)
    assert (low, high) == (pytest.approx(0.05), pytest.approx(0.2))


def test_parts_of_a_step_add_up_to_the_whole():
    record = {"data": 1.0, "update": 3.0, "optimizer": 2.0, "whole": 5.0}
    parts = driver_cost.medians([record])
    assert parts["rest"] == 1.0
    assert parts["update without optimizer"] == 1.0


def fragment(start, count, name="head.weight"):
    tensors = {kind: torch.zeros(count) for kind in checkpoint_candidates.KINDS}
    return StateFragment(name, (4, 5), None, 1, 0, 1, start, count, tensors)


def bench(*fragments):
    zero = SimpleNamespace(_lazy_init_hp_params_optimizer_state=lambda: None)
    engine = SimpleNamespace(_engine=SimpleNamespace(optimizer=zero), fragments=lambda: list(fragments))
    return checkpoint_candidates.Bench(engine, [], SimpleNamespace(rank=0))


def test_a_kind_that_was_not_restored_is_named():
    filled = bench(fragment(0, 7), fragment(7, 13, "other.weight"))
    filled.fill()
    assert filled.wrong() == []
    filled.fragments[1].tensors["ema"][3] += 1
    assert filled.wrong() == ["ema"]


def test_numbers_say_where_they_belong():
    whole, tail = bench(fragment(0, 20)), bench(fragment(7, 13))
    whole.fill()
    tail.fill()
    for kind in checkpoint_candidates.KINDS:
        values = whole.fragments[0].tensors[kind]
        assert values.unique().numel() == 20
        assert values[7:].equal(tail.fragments[0].tensors[kind])
    first, second = (whole.fragments[0].tensors[kind] for kind in ("exp_avg", "exp_avg_sq"))
    assert not first.equal(second)


def test_every_candidate_gives_back_what_it_saved_to_two_ranks(tmp_path):
    # DeepSpeed's universal format starts a converter of its own, which costs more than all of this.
    names = ["ours", "ours, no digests", "torch dcp", "deepspeed"]
    size = checkpoint_formats.SIZES["tiny"]
    records, _ = run_ranks(f"{checkpoint_formats.__file__}:save_and_load", 2, size, names, 1, tmp_path, False)
    for name in names:
        (record,) = records[name]
        assert record["wrong"] == [], name
        assert record["bytes"] > 0
    assert list(tmp_path.iterdir()) == []
