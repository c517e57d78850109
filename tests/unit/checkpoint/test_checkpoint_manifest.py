"""The commit protocol: complete and verified, or not there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bdtrain.checkpoint.manifest import MANIFEST, commit_folder, verify_folder
from bdtrain.errors import CheckpointError


def write(folder, content):
    with commit_folder(folder) as temporary:
        (temporary / "a.bin").write_bytes(content)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b.bin").write_bytes(content * 2)


def test_committed_folder_verifies_and_leaves_nothing_else(tmp_path):
    write(tmp_path / "x", b"one")
    verify_folder(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert set(json.loads((tmp_path / "x" / MANIFEST).read_text())["files"]) == {"a.bin", "sub/b.bin"}


def test_new_folder_replaces_the_old_one(tmp_path):
    write(tmp_path / "x", b"one")
    write(tmp_path / "x", b"two!")
    verify_folder(tmp_path / "x")
    assert (tmp_path / "x" / "a.bin").read_bytes() == b"two!"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_error_while_writing_keeps_the_old_one(tmp_path):
    write(tmp_path / "x", b"one")
    with pytest.raises(ZeroDivisionError), commit_folder(tmp_path / "x") as temporary:
        (temporary / "a.bin").write_bytes(b"half")
        raise ZeroDivisionError
    verify_folder(tmp_path / "x")
    assert (tmp_path / "x" / "a.bin").read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_refusal_of_the_disk_is_one_clear_error(tmp_path):
    write(tmp_path / "x", b"one")
    with (
        pytest.raises(CheckpointError, match=r"No space left.*untouched"),
        commit_folder(tmp_path / "x") as temporary,
    ):
        (temporary / "a.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    verify_folder(tmp_path / "x")
    assert (tmp_path / "x" / "a.bin").read_bytes() == b"one"


def damage_bit(folder):
    content = bytearray((folder / "a.bin").read_bytes())
    content[0] ^= 1
    (folder / "a.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_bit, r"a\.bin.*SHA-256"),
        (lambda f: os.truncate(f / "sub" / "b.bin", 1), r"b\.bin has 1 bytes"),
        (lambda f: (f / "a.bin").unlink(), r"a\.bin is missing"),
        (lambda f: (f / MANIFEST).unlink(), "never completed"),
        (lambda f: (f / MANIFEST).write_text("{"), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text('{"format": "other", "files": {}}'), "format 'other'"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write(tmp_path / "x", b"one")
    damage(tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        verify_folder(tmp_path / "x")


WRITER = """
import sys
from pathlib import Path
from bdtrain.checkpoint.manifest import commit_folder
root = Path(sys.argv[1])
for number in range(1, 100000):
    with commit_folder(root / f"save-{number % 2}") as temporary:
        for name in "abc":
            (temporary / name).write_bytes((str(number) + chr(10)).encode() * 3000)
    print(number, flush=True)
"""


def test_kill_at_any_moment_leaves_the_last_finished_save(tmp_path):
    for round_number in range(4):
        root = tmp_path / str(round_number)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE, text=True
        )
        acknowledged = [writer.stdout.readline() for _ in range(3)]
        time.sleep(0.007 * round_number)
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.read().splitlines()
        writer.wait()
        last = int(acknowledged[-1])
        found = []
        for folder in root.glob("save-*"):
            verify_folder(folder)
            contents = {(folder / name).read_bytes() for name in "abc"}
            assert len(contents) == 1
            found.append(int(contents.pop().splitlines()[0]))
        assert max(found) >= last


def test_save_that_dies_between_its_renames_is_undone(tmp_path, monkeypatch):
    from bdtrain.checkpoint import manifest

    write(tmp_path / "x", b"one")
    monkeypatch.setattr(manifest, "_sync", lambda path: None)

    def die(self, target):
        if target.name == "x":
            os._exit(9)  # as kill -9 would: no handler runs
        os.rename(self, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(manifest.Path, "rename", die)
        write(tmp_path / "x", b"two")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "x").exists()
    verify_folder(tmp_path / "x")
    assert (tmp_path / "x" / "a.bin").read_bytes() == b"one"
    write(tmp_path / "x", b"three")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
