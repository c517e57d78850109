"""A save that dies or is refused anywhere leaves the old checkpoint or the new one, whole."""

import errno
import json
import os
import shutil

import pytest

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.checkpoint.folders import clean_leftovers, find_checkpoints
from bdtrain.checkpoint.load import TrainingState
from bdtrain.checkpoint.manifest import MANIFEST, verify_folder
from bdtrain.checkpoint.save import save_training_state
from bdtrain.errors import CheckpointError
from tests.unit.checkpoint.layouts import (
    Crash,
    Layout,
    UnluckyDisk,
    first_error,
    fragments,
    on_ranks,
    same_bits,
    serial,
)

TWO = Layout(tp=2)
OWNED = fragments(TWO)
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def outcomes_of_save(root, step, disks):
    """What each of two ranks returned or raised; a rank has a disk of its own or shares one."""
    return on_ranks(
        2,
        lambda ranks: save_training_state(
            root,
            step=step,
            fragments=OWNED[ranks.rank],
            state={"tokens": step},
            config_yaml="a: 1\n",
            tokenizer=None,
            run_uid="run-1",
            communicator=ranks,
            actions=disks[ranks.rank],
        ),
    )


def save(root, step, disk=None):
    disk = disk or UnluckyDisk()
    return first_error(outcomes_of_save(root, step, [disk, disk]))


def newest(root):
    found = find_checkpoints(root, run_uid="run-1")
    assert found.rejected == []
    opened = TrainingState.open(found.newest)
    assert same_bits(opened.full_tensor("embedding.weight", "exp_avg"), serial("embedding.weight", "exp_avg"))
    return opened.step


def test_saved_checkpoint_is_said_and_nothing_else_is_left(tmp_path):
    results = save(tmp_path, 7)
    for result in results:
        assert result.folder == tmp_path / "step-000000007"
        assert result.written
        assert result.seconds >= 0
    files = {p.name: p.stat().st_size for p in results[0].folder.iterdir()}
    assert set(files) == {
        "rank-00000.safetensors",
        "rank-00000.json",
        "rank-00001.safetensors",
        "rank-00001.json",
        "state.json",
        "config.yaml",
        MANIFEST,
    }
    assert results[0].bytes == results[1].bytes == sum(files.values()) - files[MANIFEST]
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000007"]
    manifest = json.loads((results[0].folder / MANIFEST).read_text())
    assert manifest["format"] == "bdtrain-training/1"
    assert (manifest["run_uid"], manifest["step"], manifest["world_size"]) == ("run-1", 7, 2)


def test_every_file_is_on_disk_before_the_name_and_the_name_before_the_return(tmp_path):
    disk = UnluckyDisk()
    save(tmp_path, 7, disk)
    kinds = [entry[0] for entry in disk.log]
    renamed = kinds.index("rename")
    assert disk.log[renamed + 1 :] == [("fsync", tmp_path)]
    _, temporary, final = disk.log[renamed]
    for path in final.iterdir():
        old = temporary / path.name
        writes = [i for i, entry in enumerate(disk.log) if entry == ("write", old)]
        synced = disk.log.index(("fsync", old))
        assert writes[-1] < synced < disk.log.index(("fsync", temporary)) < renamed
    # The manifest is the last file to be written.
    assert [entry for entry in disk.log if entry[0] == "write"][-1] == ("write", temporary / MANIFEST)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lose", [False, True])
def test_crash_at_any_action_leaves_the_old_or_the_new_checkpoint(tmp_path, half, lose):
    save(tmp_path, 1)
    reached = set()
    for number in range(500):
        disk = UnluckyDisk(number, half=half, lose=lose)
        try:
            save(tmp_path, 2 + number, disk)
            finished = True
        except Crash:
            finished = False
        found = newest(tmp_path)
        assert found == 2 + number if finished else found in (1, 2 + number)
        reached.add((finished, found > 1))
        clean_leftovers(tmp_path)
        assert all(p.name.startswith("step-") for p in tmp_path.iterdir())
        if finished:
            break
        shutil.rmtree(tmp_path / f"step-{2 + number:09d}", ignore_errors=True)
    assert reached == {(False, False), (False, True), (True, True)}
    assert number > 60


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["write", "fsync", "rename", "make"])
def test_refusal_of_the_disk_anywhere_is_one_error_on_all_ranks_and_keeps_the_old(tmp_path, rank, kind):
    save(tmp_path, 1)
    counted = 0
    for number in range(500):
        disks = [UnluckyDisk(), UnluckyDisk()]
        disks[rank] = UnluckyDisk(number, error=NO_SPACE, only=kind)
        results = outcomes_of_save(tmp_path, 2, disks)
        if not any(isinstance(result, BaseException) for result in results):
            break
        counted += 1
        texts = {str(result) for result in results}
        assert all(isinstance(result, CheckpointError) for result in results)
        assert len(texts) == 1
        assert f"rank {rank}: No space left on device" in texts.pop()
        left = {p.name for p in tmp_path.iterdir()}
        if kind == "fsync" and "step-000000002" in left:
            # Only the folder above could not be synced: the new one is there and whole.
            verify_folder(tmp_path / "step-000000002")
            break
        assert left == {"step-000000001"}
        assert newest(tmp_path) == 1
    # Header and tensors, index; of rank 0 also state, configuration and manifest. All files are
    # synced, then both folders.
    writes = [1 + 4 * 8 + 1 + 3, 1 + 4 * 6 + 1][rank]
    expected = {"write": writes, "fsync": [7, 2][rank], "rename": 1 - rank, "make": 1 - rank}
    assert counted == expected[kind]
    assert newest(tmp_path) == 2


def test_error_that_is_no_refusal_of_the_disk_reaches_all_ranks_too(tmp_path):
    disks = [UnluckyDisk(), UnluckyDisk(2, error=ValueError("odd"), only="write")]
    texts = [str(result) for result in outcomes_of_save(tmp_path, 2, disks)]
    assert texts[0] == texts[1]
    assert "rank 1: ValueError: odd" in texts[0]
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_found_before_anything_is_written(tmp_path):
    class Small(UnluckyDisk):
        def free_bytes(self, folder):
            return 1000

    save(tmp_path, 1)
    disk = Small()
    with pytest.raises(CheckpointError, match=r"needs .* GB and .* has 1e-06 GB free; make room") as caught:
        save(tmp_path, 2, disk)
    assert "older checkpoints are untouched" in str(caught.value)
    assert [kind for kind, *_ in disk.log if kind in ("make", "write", "rename")] == []
    assert newest(tmp_path) == 1


def test_step_that_is_there_is_not_written_again(tmp_path):
    first = save(tmp_path, 4)[0]
    disk = UnluckyDisk()
    again = save(tmp_path, 4, disk)[0]
    assert disk.log == []
    assert not again.written
    assert (again.folder, again.bytes) == (first.folder, first.bytes)


def test_damaged_step_is_moved_aside_and_written_again(tmp_path):
    save(tmp_path, 4)
    for name in (".damaged-step-000000004", ".damaged-step-000000004-2"):
        (tmp_path / "step-000000004" / "rank-00001.safetensors").write_bytes(name.encode())
        assert save(tmp_path, 4)[0].written
        assert newest(tmp_path) == 4
        assert (tmp_path / name / "rank-00001.safetensors").read_bytes() == name.encode()
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == {
        ".damaged-step-000000004",
        ".damaged-step-000000004-2",
    }


def test_leftover_of_an_earlier_save_of_the_step_is_no_obstacle(tmp_path):
    (tmp_path / ".tmp-step-000000004").mkdir()
    (tmp_path / ".tmp-step-000000004" / "rank-00007.json").write_text("old")
    save(tmp_path, 4)
    assert newest(tmp_path) == 4
    assert not (tmp_path / "step-000000004" / "rank-00007.json").exists()


def test_run_that_owns_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no rank owns anything"):
        save_training_state(
            tmp_path,
            step=1,
            fragments=[],
            state={},
            config_yaml="",
            tokenizer=None,
            run_uid="u",
            communicator=OneProcess(),
        )
