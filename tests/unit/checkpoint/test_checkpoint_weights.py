"""A trained model opens from a model folder and from a training checkpoint alike."""

import os

import pytest
import torch

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.checkpoint.export import export_weights
from bdtrain.checkpoint.load import TrainingState
from bdtrain.checkpoint.manifest import verify_folder
from bdtrain.checkpoint.save import save_training_state
from bdtrain.checkpoint.weights import open_model, save_model
from bdtrain.config import dump_resolved
from bdtrain.errors import CheckpointError
from tests.unit.checkpoint.layouts import (
    KINDS,
    PARAMETERS,
    Layout,
    UnluckyDisk,
    first_error,
    fragments,
    on_ranks,
    same_bits,
    serial,
)
from tests.unit.config.helpers import load

FACTS = {"tokens": 50, "starts_with_bos": True, "tokenizer": {"mask_id": 3}, "noise_plan": None}


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "original.model"
    path.write_bytes(b"pieces")
    return path


def train(root, tokenizer, *, kinds=KINDS, applied=5):
    layout = Layout(tp=2, dp=2, seed=9)
    owned = fragments(layout, kinds=kinds)
    save = {
        "step": 6,
        "state": {"step": 6, "applied_steps": applied, **FACTS},
        "config_yaml": dump_resolved(load().config),
        "tokenizer": tokenizer,
        "run_uid": "u",
    }
    return first_error(
        on_ranks(
            layout.world,
            lambda ranks: save_training_state(root, fragments=owned[ranks.rank], communicator=ranks, **save),
        )
    )[0].folder


@pytest.mark.parametrize(
    ("kinds", "applied", "opened"), [(KINDS, 5, "ema"), (KINDS, 0, "master"), (KINDS[:3], 5, "master")]
)
def test_training_checkpoint_opens_as_a_model(tmp_path, tokenizer, kinds, applied, opened):
    model = open_model(train(tmp_path / "c", tokenizer, kinds=kinds, applied=applied))
    state = model.state()
    assert set(state) == set(PARAMETERS)
    assert all(same_bits(state[name], serial(name, opened)) for name in PARAMETERS)
    assert model.facts == {"step": 6, "applied_steps": applied, **FACTS, "averaged": opened == "ema"}
    assert model.config == load().config
    assert model.tokenizer.read_bytes() == b"pieces"


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:3]])
def test_exported_weights_are_what_the_checkpoint_opens_as(tmp_path, tokenizer, kinds):
    folder = train(tmp_path / "c", tokenizer, kinds=kinds)
    export_weights(folder, tmp_path / "out")
    exported, direct = open_model(tmp_path / "out"), open_model(folder)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.yaml",
        "facts.json",
        "tokenizer.model",
        "MANIFEST.json",
    }
    assert exported.facts == direct.facts
    assert exported.config == direct.config
    assert exported.tokenizer.read_bytes() == b"pieces"
    mine, theirs = exported.state(), direct.state()
    assert set(mine) == set(theirs)
    assert all(same_bits(mine[name], theirs[name]) for name in theirs)


def test_export_holds_one_parameter_at_a_time(tmp_path, tokenizer, monkeypatch):
    folder = train(tmp_path / "c", tokenizer)
    asked = []
    original = TrainingState.full_tensor

    def watched(self, name, kind):
        # What was asked for before is in the file when the next is asked for.
        asked.append(len([entry for entry in disk.log if entry[0] == "write"]))
        return original(self, name, kind)

    monkeypatch.setattr(TrainingState, "full_tensor", watched)
    disk = UnluckyDisk()
    export_weights(folder, tmp_path / "out", actions=disk)
    assert asked == list(range(1, 1 + len(PARAMETERS)))


def test_damaged_checkpoint_is_not_exported(tmp_path, tokenizer):
    folder = train(tmp_path / "c", tokenizer)
    os.truncate(folder / "rank-00003.safetensors", 20)
    with pytest.raises(CheckpointError, match="has 20 bytes"):
        export_weights(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_folder_is_no_training_checkpoint(tmp_path):
    save_model(tmp_path / "m", {"w": torch.ones(2)}, config_yaml="", facts={}, tokenizer=None)
    with pytest.raises(CheckpointError, match="a trained model and no optimizer state"):
        TrainingState.open(tmp_path / "m")


def test_model_folder_gives_back_weights_of_any_kind_as_float32(tmp_path, tokenizer):
    weights = {
        "matrix": torch.arange(12.0).view(3, 4).t(),
        "half": torch.tensor([0.5, 1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, 3),
    }
    save_model(
        tmp_path / "m",
        weights,
        config_yaml=dump_resolved(load().config),
        facts={"step": 1},
        tokenizer=tokenizer,
    )
    state = open_model(tmp_path / "m").state()
    assert set(state) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor.float())


def test_refused_model_folder_keeps_the_old_one(tmp_path):
    arguments = {"config_yaml": "", "facts": {}, "tokenizer": None}
    save_model(tmp_path / "m", {"w": torch.ones(2)}, **arguments)
    for number in range(100):
        disk = UnluckyDisk(number, error=OSError(28, "No space left on device"), only="write")
        try:
            save_model(tmp_path / "m", {"w": torch.zeros(2)}, **arguments, actions=disk)
            break
        except CheckpointError as error:
            assert "No space left on device; what was there before is untouched" in str(error)
            verify_folder(tmp_path / "m")
            assert [p.name for p in tmp_path.iterdir()] == ["m"]
    # Header and tensor, (empty) configuration, facts, manifest.
    assert number == 4


def test_single_rank_checkpoint_of_one_process(tmp_path):
    owned = fragments(Layout())[0]
    folder = save_training_state(
        tmp_path,
        step=1,
        fragments=owned,
        state={},
        config_yaml=dump_resolved(load().config),
        tokenizer=None,
        run_uid="u",
        communicator=OneProcess(),
    ).folder
    opened = open_model(folder)
    assert opened.tokenizer is None
    assert opened.facts == {"step": 1, "averaged": False}
