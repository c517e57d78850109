"""The commit protocol: complete and verified, or not there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bdtrain.checkpoint.files import DISK
from bdtrain.checkpoint.manifest import MANIFEST, commit_folder, verify_folder
from bdtrain.errors import CheckpointError
from tests.unit.checkpoint.layouts import Crash, UnluckyDisk


def write(folder, content, actions=DISK):
    with commit_folder(folder, actions=actions) as temporary:
        (temporary / "a.bin").write_bytes(content)
        (temporary / "b.bin").write_bytes(content * 2)


def test_committed_folder_verifies_and_leaves_nothing_else(tmp_path):
    write(tmp_path / "x", b"one")
    verify_folder(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert set(json.loads((tmp_path / "x" / MANIFEST).read_text())["files"]) == {"a.bin", "b.bin"}


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
        (lambda f: os.truncate(f / "b.bin", 1), r"b\.bin has 1 bytes"),
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


@pytest.mark.parametrize("lose", [False, True])
def test_crash_at_any_action_of_a_replacement_leaves_the_old_or_the_new(tmp_path, lose):
    outcomes = set()
    for number in range(100):
        root = tmp_path / str(number)
        write(root / "x", b"one")
        disk = UnluckyDisk(number, lose=lose)
        try:
            write(root / "x", b"two", disk)
            finished = True
        except Crash:
            finished = False
        verify_folder(root / "x")
        content = (root / "x" / "a.bin").read_bytes()
        assert content == b"two" or (content == b"one" and not finished)
        outcomes.add((finished, content))
        # The next save cleans up.
        write(root / "x", b"three")
        assert [p.name for p in root.iterdir()] == ["x"]
        if finished:
            break
    assert outcomes == {(False, b"one"), (False, b"two"), (True, b"two")}


def test_folder_that_is_not_there_yet_appears_whole_or_not_at_all(tmp_path):
    for number in range(100):
        folder = tmp_path / str(number) / "x"
        try:
            write(folder, b"one", UnluckyDisk(number))
            break
        except Crash:
            if folder.exists():
                verify_folder(folder)
    assert number > 5
    verify_folder(folder)


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "sub/b.bin", "..", "", "a\\b", MANIFEST])
def test_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    write(tmp_path / "x", b"one")
    manifest = tmp_path / "x" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"][name] = content["files"]["a.bin"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not the name of a file in it"):
        verify_folder(tmp_path / "x")


def test_parts_of_a_verification_cover_every_file_once(tmp_path):
    with commit_folder(tmp_path / "x") as temporary:
        for size in range(7):
            (temporary / f"{size}").write_bytes(b"a" * size)
    for size in range(7):
        (tmp_path / "x" / f"{size}").write_bytes(b"b" * size or b"b")
        complaints = 0
        for part in range(3):
            try:
                verify_folder(tmp_path / "x", part=(part, 3))
            except CheckpointError:
                complaints += 1
        assert complaints == 1
        (tmp_path / "x" / f"{size}").write_bytes(b"a" * size)
