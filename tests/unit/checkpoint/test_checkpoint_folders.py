"""Finding the newest whole checkpoint, and deleting old ones."""

import json
import os
import re
import shutil

import pytest

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.checkpoint.files import FileActions
from bdtrain.checkpoint.folders import choose_checkpoint, clean_leftovers, find_checkpoints, prune
from bdtrain.checkpoint.manifest import MANIFEST, commit_folder
from bdtrain.checkpoint.save import save_training_state
from bdtrain.errors import CheckpointError
from tests.unit.checkpoint.layouts import Crash, Layout, UnluckyDisk, fragments, on_ranks

OWNED = fragments(Layout())[0]


def save(root, step, *, run_uid="run-1", tokens=None):
    return save_training_state(
        root,
        step=step,
        fragments=OWNED,
        state={"tokens": 100 * step if tokens is None else tokens},
        config_yaml="a: 1\n",
        tokenizer=None,
        run_uid=run_uid,
        communicator=OneProcess(),
    ).folder


def flip_bit(folder):
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def rename_file(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../../secret"] = manifest["files"].pop("state.json")
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGES = {
    "bit flip": (flip_bit, r"rank-00000\.safetensors: its SHA-256 differs"),
    "truncation": (lambda f: os.truncate(f / "rank-00000.safetensors", 100), "has 100 bytes, the manifest"),
    "missing file": (lambda f: (f / "state.json").unlink(), r"state\.json is missing"),
    "missing manifest": (lambda f: (f / MANIFEST).unlink(), "never completed"),
    "torn manifest": (lambda f: os.truncate(f / MANIFEST, 50), "cannot be read"),
    "unsafe name": (rename_file, "'../../secret', which is not the name of a file in it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_it_found(tmp_path, damage):
    spoil, reason = DAMAGES[damage]
    for step in (1, 2, 10):
        save(tmp_path, step)
    spoil(tmp_path / "step-000000010")
    found = find_checkpoints(tmp_path, run_uid="run-1")
    assert found.newest == tmp_path / "step-000000002"
    [(folder, said)] = found.rejected
    assert folder == tmp_path / "step-000000010"
    assert re.search(reason, said)
    assert folder.exists()


def test_several_damaged_ones_are_passed_over_newest_first(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_bit(tmp_path / "step-000000003")
    (tmp_path / "step-000000002" / MANIFEST).unlink()
    newest, rejected = find_checkpoints(tmp_path)
    assert newest == tmp_path / "step-000000001"
    assert [folder.name for folder, _ in rejected] == ["step-000000003", "step-000000002"]


def test_checkpoint_of_another_run_is_passed_over(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2, run_uid="run-2")
    found = find_checkpoints(tmp_path, run_uid="run-1")
    assert found.newest == tmp_path / "step-000000001"
    assert "belongs to another run (uid run-2, this run is run-1)" in found.rejected[0][1]
    assert find_checkpoints(tmp_path).newest == tmp_path / "step-000000002"


def test_copy_under_another_step_and_other_folders_are_passed_over(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / "step-000000005")
    with commit_folder(tmp_path / "step-000000006") as folder:
        (folder / "a").write_bytes(b"a")
    found = find_checkpoints(tmp_path)
    assert found.newest == tmp_path / "step-000000001"
    assert "not a training checkpoint" in found.rejected[0][1]
    assert "holds step 1, which is not its name's" in found.rejected[1][1]


def test_folder_without_checkpoints_and_no_folder_have_none(tmp_path):
    assert find_checkpoints(tmp_path / "none") == (None, [])
    (tmp_path / ".tmp-step-000000001").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert find_checkpoints(tmp_path) == (None, [])


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999_999, 1_000_000_000):
        save(tmp_path, step)
    assert find_checkpoints(tmp_path).newest == tmp_path / "step-1000000000"


def test_ranks_that_share_the_reading_agree(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    # The largest file is the first rank's, the smallest the last one's.
    flip_bit(tmp_path / "step-000000003")
    (tmp_path / "step-000000002" / "config.yaml").write_text("b: 1\n")
    outcomes = on_ranks(3, lambda ranks: choose_checkpoint(tmp_path, ranks, "run-1"))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0] == find_checkpoints(tmp_path, run_uid="run-1")
    assert outcomes[0].newest == tmp_path / "step-000000001"
    assert [len(said.split("; ")) for _, said in outcomes[0].rejected] == [2, 2]


def test_leftovers_go_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    for name in (".tmp-step-000000002", ".tmp-dead-step-000000000", ".damaged-step-000000003", ".tmp-old-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(b"a")
    assert clean_leftovers(tmp_path) == [".tmp-dead-step-000000000", ".tmp-step-000000002"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "step-000000001",
        ".damaged-step-000000003",
        ".tmp-old-x",
    }


def steps(root):
    return sorted(int(p.name[5:]) for p in root.glob("step-*"))


def test_last_ones_stay(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    deleted = prune(tmp_path, keep_last=2, keep_every_tokens=None)
    assert [folder.name for folder in deleted] == ["step-000000001", "step-000000002", "step-000000003"]
    assert steps(tmp_path) == [4, 5]
    assert prune(tmp_path, keep_last=2, keep_every_tokens=None) == []
    assert {p.name for p in tmp_path.iterdir()} == {"step-000000004", "step-000000005"}


def test_first_one_after_each_multiple_of_tokens_stays_for_good(tmp_path):
    # 250 tokens apart, one kept for good every 1000: those that reach 1000, 2000 and, after a jump, 4100.
    tokens = {1: 250, 2: 750, 3: 1000, 4: 1250, 5: 1999, 6: 2010, 7: 2500, 8: 4100, 9: 4200, 10: 4300}
    for step, count in tokens.items():
        folder = save(tmp_path, step, tokens=count)
        prune(tmp_path, keep_last=1, keep_every_tokens=1000, trusted=folder)
    assert steps(tmp_path) == [3, 6, 8, 10]


def test_damaged_ones_are_neither_counted_nor_deleted(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    (tmp_path / "step-000000004" / "state.json").unlink()
    os.truncate(tmp_path / "step-000000001" / "rank-00000.safetensors", 10)
    prune(tmp_path, keep_last=1, keep_every_tokens=None)
    assert steps(tmp_path) == [1, 3, 4]


def test_only_whole_one_is_never_deleted(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    flip_bit(tmp_path / "step-000000002")
    assert prune(tmp_path, keep_last=1, keep_every_tokens=None) == []
    assert find_checkpoints(tmp_path).newest == tmp_path / "step-000000001"


def test_crash_at_any_action_of_a_deletion_leaves_whole_checkpoints_only(tmp_path):
    for number in range(50):
        root = tmp_path / str(number)
        for step in (1, 2, 3):
            save(root, step)
        try:
            prune(root, keep_last=1, keep_every_tokens=None, actions=UnluckyDisk(number))
            break
        except Crash:
            found = find_checkpoints(root)
            assert found.newest == root / "step-000000003"
            assert found.rejected == []
            clean_leftovers(root)
            prune(root, keep_last=1, keep_every_tokens=None)
            assert [p.name for p in root.iterdir()] == ["step-000000003"]
    assert number == 6


def test_refusal_to_delete_is_a_clear_error(tmp_path):
    class Stubborn(FileActions):
        def rename(self, source, target):
            raise PermissionError(13, "Permission denied")

    for step in (1, 2):
        save(tmp_path, step)
    with pytest.raises(CheckpointError, match=r"could not delete .*step-000000001: Permission denied"):
        prune(tmp_path, keep_last=1, keep_every_tokens=None, actions=Stubborn())
