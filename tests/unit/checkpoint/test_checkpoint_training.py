"""One format for every layout: saved under one, loaded under another, to the last bit."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.checkpoint.load import LoadReport, TrainingState
from bdtrain.checkpoint.save import save_training_state
from bdtrain.errors import CheckpointError
from tests.unit.checkpoint.layouts import (
    KINDS,
    PARAMETERS,
    Layout,
    first_error,
    fragments,
    on_ranks,
    same_bits,
    serial,
)

LAYOUTS = [
    Layout(),
    Layout(forget_cut=True),
    Layout(tp=2),
    Layout(tp=4),
    Layout(pp=2),
    Layout(dp=2, seed=1),
    Layout(dp=5, seed=2),
    Layout(tp=2, dp=3, seed=3),
    Layout(tp=2, pp=2, dp=2, seed=4),
    Layout(tp=4, pp=2, seed=5),
]
STATE = {"step": 3, "tokens": 300, "applied_steps": 2, "lr": 0.1 + 0.2, "plan": {"clip_range": [0.3, 0.8]}}


def save(root, layout, *, kinds=KINDS, step=3, state=STATE, ranks=None, **more):
    owned = ranks if ranks is not None else fragments(layout, kinds=kinds)
    arguments = {
        "step": step,
        "state": state,
        "config_yaml": "a: 1\n",
        "tokenizer": None,
        "run_uid": "run-1",
        **more,
    }
    return first_error(
        on_ranks(
            len(owned),
            lambda ranks: save_training_state(
                root, fragments=owned[ranks.rank], communicator=ranks, **arguments
            ),
        )
    )[0]


def load(folder, layout, *, kinds=KINDS, parameters=tuple(PARAMETERS)):
    owned = fragments(layout, kinds=kinds, blank=True, parameters=parameters)
    reports = first_error(
        on_ranks(layout.world, lambda ranks: TrainingState.open(folder).load_into(owned[ranks.rank], ranks))
    )
    assert len(set(reports)) == 1
    return owned, reports[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    return {layout: save(root / str(number), layout).folder for number, layout in enumerate(LAYOUTS)}


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_any_layout_continues_any_other_bit_for_bit(saved, target):
    wanted = fragments(target)
    for folder in saved.values():
        owned, report = load(folder, target)
        assert report == LoadReport(average_started=False, average_ignored=False)
        for mine, theirs in zip(owned, wanted, strict=True):
            for got, right in zip(mine, theirs, strict=True):
                for kind in KINDS:
                    assert same_bits(got.tensors[kind], right.tensors[kind]), (folder, got.name, kind)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_serial_tensors_come_back_from_every_layout(saved, layout):
    opened = TrainingState.open(saved[layout])
    assert set(opened.parameters) == set(PARAMETERS)
    for name in PARAMETERS:
        for kind in KINDS:
            assert same_bits(opened.full_tensor(name, kind), serial(name, kind))
    assert opened.state == STATE
    assert (opened.run_uid, opened.step, opened.world_size) == ("run-1", 3, layout.world)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_is_written_once_whatever_the_layout(saved, layout):
    numbers = 0
    for path in saved[layout].glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                assert file.get_slice(key).get_dtype() == "F32"
                numbers += file.get_tensor(key).numel()
    assert numbers == len(KINDS) * sum(math.prod(shape) for shape, _, _ in PARAMETERS.values())


def test_index_describes_every_tensor_of_its_file(saved):
    folder = saved[Layout(tp=2, dp=3, seed=3)]
    for path in folder.glob("rank-*.json"):
        index = json.loads(path.read_text())
        keys = {
            f"{kind}/{record['name']}@{record['start']}"
            for record in index["fragments"]
            for kind in record["kinds"]
        }
        with safe_open(folder / index["file"], framework="pt") as file:
            assert set(file.keys()) == keys


def test_stretch_in_one_piece_reads_no_other_file(tmp_path):
    layout = Layout(dp=3, seed=8)
    folder = save(tmp_path, layout).folder
    for rank in (1, 2):
        (folder / f"rank-{rank:05d}.safetensors").unlink()
    opened, mine = TrainingState.open(folder), fragments(layout, blank=True)[0]
    everything = fragments(Layout())[0]
    others = [dataclasses.replace(fragment, count=0) for fragment in everything]
    with pytest.raises(CheckpointError, match="not in the model"):
        opened.load_into(others)

    class SecondHasTheRest(OneProcess):
        def gather_objects(self, value):
            return [value, value and [[], list(range(len(PARAMETERS))), False, False]]

    opened.load_into(mine, SecondHasTheRest())
    assert all(
        same_bits(got.tensors["ema"], right.tensors["ema"])
        for got, right in zip(mine, fragments(layout)[0], strict=True)
    )


@pytest.mark.parametrize("target", [Layout(), Layout(tp=2, dp=3, seed=6)], ids=str)
def test_average_that_was_not_kept_begins_at_the_weights(tmp_path, target):
    folder = save(tmp_path, Layout(tp=2, pp=2), kinds=KINDS[:3]).folder
    owned, report = load(folder, target)
    assert report == LoadReport(average_started=True, average_ignored=False)
    for mine, theirs in zip(owned, fragments(target), strict=True):
        for got, right in zip(mine, theirs, strict=True):
            assert same_bits(got.tensors["ema"], right.tensors["master"])
            assert same_bits(got.tensors["exp_avg"], right.tensors["exp_avg"])


def test_average_that_is_not_wanted_is_ignored_and_said(tmp_path):
    folder = save(tmp_path, Layout(tp=2)).folder
    owned, report = load(folder, Layout(dp=2), kinds=KINDS[:3])
    assert report == LoadReport(average_started=False, average_ignored=True)
    assert same_bits(owned[0][0].tensors["master"], fragments(Layout(dp=2))[0][0].tensors["master"])


def test_other_model_is_one_error_on_every_rank_that_lists_all_and_copies_nothing(tmp_path):
    names = list(PARAMETERS)
    folder = save(tmp_path, Layout(), ranks=[fragments(Layout(), parameters=names[1:])[0]]).folder
    target = Layout(tp=2, pp=2)
    owned = fragments(target, kinds=(*KINDS[:2], "ema"), blank=True, parameters=names[:-1])
    first = owned[0]
    number = next(i for i, fragment in enumerate(first) if fragment.name == names[2])
    first[number] = dataclasses.replace(first[number], full_shape=(16, 6))
    state = TrainingState.open(folder)
    errors = on_ranks(4, lambda ranks: state.load_into(owned[ranks.rank], ranks))
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, CheckpointError) for error in errors)
    text = str(errors[0])
    assert f"{names[0]} is not in the checkpoint" in text
    assert f"{names[-1]} is in the checkpoint and not in the model" in text
    assert f"{names[2]} has shape (16, 5), the model's is (16, 6)" in text
    assert f"{names[1]} has exp_avg_sq, which this run does not keep" in text
    for rank in owned:
        for fragment in rank:
            assert all((tensor == -7).all() for tensor in fragment.tensors.values())


def test_moments_that_were_not_saved_are_an_error(tmp_path):
    folder = save(tmp_path, Layout(), kinds=("master",)).folder
    with pytest.raises(CheckpointError, match=r"has no exp_avg, exp_avg_sq"):
        TrainingState.open(folder).load_into(fragments(Layout())[0])


def test_file_that_one_rank_cannot_read_is_the_same_error_on_all(tmp_path):
    folder = save(tmp_path, Layout(pp=2)).folder
    (folder / "rank-00001.safetensors").write_bytes(b"not this")
    state, owned = TrainingState.open(folder), fragments(Layout(pp=2), blank=True)
    errors = on_ranks(2, lambda ranks: state.load_into(owned[ranks.rank], ranks))
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith("rank 1: ")
    assert "rank-00001.safetensors" in str(errors[0])


def test_parameter_with_a_gap_is_never_committed(tmp_path):
    ranks = fragments(Layout(tp=2, dp=2, seed=7))
    lost = ranks[3].pop(-2)
    assert lost.partition_dim is not None
    with pytest.raises(CheckpointError, match=rf"{lost.name}: elements .* of tp rank 1 are missing"):
        save(tmp_path, None, ranks=ranks)
    assert list(tmp_path.iterdir()) == []


def test_parameter_owned_twice_is_never_committed(tmp_path):
    ranks = fragments(Layout(dp=2, seed=7))
    ranks[1].append(ranks[0][0])
    with pytest.raises(CheckpointError, match="are too many"):
        save(tmp_path, None, ranks=ranks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"plan": {1: 2}}, r"state\.plan has the key 1"),
        ({"history": [0, torch.zeros(1)]}, r"state\.history\[1\] is a Tensor"),
        ({"set": {1}}, r"state\.set is a set"),
    ],
)
def test_state_that_json_would_change_is_refused_by_name(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, Layout(), state=state)
    assert list(tmp_path.iterdir()) == []


def test_counters_and_floats_come_back_exactly(tmp_path):
    state = {
        "tokens": 2**62 + 1,
        "worst": float("inf"),
        "lr": 1 / 3,
        "tiny": 5e-324,
        "text": "é\n",
        "none": None,
        "flag": True,
    }
    opened = TrainingState.open(save(tmp_path, Layout(), state=state).folder)
    assert opened.state == state
    assert isinstance(opened.state["flag"], bool)


def test_tokenizer_travels(tmp_path):
    (tmp_path / "t").write_bytes(b"pieces")
    opened = TrainingState.open(save(tmp_path / "c", Layout(tp=2), tokenizer=tmp_path / "t").folder)
    assert opened.tokenizer.read_bytes() == b"pieces"


def test_absent_tensor_is_named(saved):
    opened = TrainingState.open(saved[Layout()])
    with pytest.raises(CheckpointError, match="no 'momentum' of 'scale'"):
        opened.full_tensor("scale", "momentum")
