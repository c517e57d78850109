"""Snapshots on disk: which stay, and which belong to a time that the run has not come to again."""

import pytest
import torch

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.checkpoint.folders import list_checkpoints
from bdtrain.parallel.fragments import StateFragment
from bdtrain.refit.snapshot import (
    forget_later,
    refit_folder,
    result_folder,
    set_aside,
    snapshots_folder,
    write_snapshot,
)


def write(run, step, value):
    fragment = StateFragment(
        name="weight",
        full_shape=(4,),
        partition_dim=None,
        partition_stride=1,
        tp_rank=0,
        tp_size=1,
        start=0,
        count=4,
        tensors={name: torch.full((4,), value) for name in ("master", "exp_avg", "ema")},
    )
    return write_snapshot(
        run,
        step=step,
        fragments=[fragment],
        state={"averaged": True, "step": step},
        config_yaml="",
        tokenizer=None,
        run_uid="uid",
        communicator=OneProcess(),
    )


def steps(run):
    return [step for step, _ in list_checkpoints(snapshots_folder(run))]


def test_only_averaged_weights_are_written(tmp_path):
    from bdtrain.checkpoint.load import TrainingState

    saved = TrainingState.open(write(tmp_path, 5, 2.0).folder)
    assert saved.kinds == {"ema"}
    assert saved.full_tensor("weight", "ema").tolist() == [2.0] * 4


def test_the_last_two_stay_and_the_one_just_written_always_does(tmp_path):
    for step in (600, 800, 900):
        write(tmp_path, step, 1.0)
    assert steps(tmp_path) == [800, 900]
    # An earlier step again: later ones are no reason to delete it.
    write(tmp_path, 700, 1.0)
    assert steps(tmp_path) == [700, 800, 900]


def test_a_run_that_goes_back_forgets_the_snapshots_of_its_former_future(tmp_path):
    from bdtrain.checkpoint.load import TrainingState

    for step in (500, 800):
        write(tmp_path, step, 1.0)
    forget_later(tmp_path, 500)
    assert steps(tmp_path) == [500]
    # Else the old weights would have passed for those of this time.
    again = write(tmp_path, 800, 3.0)
    assert again.written
    assert TrainingState.open(again.folder).full_tensor("weight", "ema").tolist() == [3.0] * 4
    forget_later(tmp_path / "no run", 1)


def test_re_fits_of_another_beginning_are_set_aside_without_their_snapshots(tmp_path):
    assert set_aside(tmp_path, 2) is None
    names = []
    for said in ("first", "second"):
        write(tmp_path, 5, 1.0)
        result_folder(tmp_path, 5).mkdir()
        (result_folder(tmp_path, 5) / "report.json").write_text(said)
        aside = set_aside(tmp_path, 2)
        assert not refit_folder(tmp_path).exists()
        assert [path.name for path in aside.iterdir()] == ["step-000000005"]
        assert (aside / "step-000000005" / "report.json").read_text() == said
        names.append(aside.name)
    # An attempt that died right after it came to the same number again.
    assert names == ["refit-before-attempt-2", "refit-before-attempt-2-2"]


def test_re_fits_that_cannot_be_set_aside_are_an_error(tmp_path, monkeypatch):
    """Suppressed, the run would take them for its own."""
    write(tmp_path, 5, 1.0)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(PermissionError):
        set_aside(tmp_path, 2)
    assert steps(tmp_path) == [5]
