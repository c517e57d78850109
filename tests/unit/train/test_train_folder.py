"""A run's folder: small files that are whole or not there, and when a folder is free."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.config import load_config
from bdtrain.errors import ConfigError
from bdtrain.train.folder import (
    begin_attempt,
    changed_since_last,
    claim_run_folder,
    clear_exit,
    write_exit,
    write_json,
)
from bdtrain.train.run_lock import RunLock

TINY = "configs/run/tiny_synthetic.yaml"


def test_exit_file_says_how_the_attempt_ended(tmp_path):
    clear_exit(tmp_path)
    write_exit(tmp_path, "SIGTERM", 12, resumable=True, exit_code=0)
    found = json.loads((tmp_path / "EXIT.json").read_text())
    assert abs(found.pop("time") - time.time()) < 60
    assert found == {"reason": "SIGTERM", "step": 12, "resumable": True, "exit_code": 0}
    write_exit(tmp_path, "finished", 20, resumable=False, exit_code=0)
    assert json.loads((tmp_path / "EXIT.json").read_text())["reason"] == "finished"
    clear_exit(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_exit_file_takes_listed_reasons_only(tmp_path):
    with pytest.raises(ValueError, match="none of"):
        write_exit(tmp_path, "bored", 1, resumable=True, exit_code=0)


@pytest.fixture
def claim(tmp_path):
    """Claims a folder for the tiny run, which is what lies in ``tmp_path / "run"``."""
    config = load_config([TINY], [f"run.folder={tmp_path / 'run'}"]).config
    locks = []

    def claim():
        locks.append(RunLock(tmp_path / "run"))
        claimed = claim_run_folder(config, OneProcess(), locks[-1])
        return config, claimed

    yield claim
    for lock in locks:
        lock.release()


LEFT = [".lock.host.77", ".tmp.77.run.json", ".tmp.77.EXIT.json", ".tmp-run.json", ".tmp-EXIT.json"]


def test_a_folder_with_nothing_but_unfinished_files_is_free(tmp_path, claim):
    (tmp_path / "run").mkdir()
    for name in LEFT:
        (tmp_path / "run" / name).write_text("{")
    _, claimed = claim()
    assert (claimed.known, claimed.attempt) == (None, 1)


@pytest.mark.parametrize("name", ["notes.txt", "EXIT.json", ".tmpfile", "tmp.run.json"])
def test_a_folder_with_anything_else_is_not(tmp_path, claim, name):
    (tmp_path / "run").mkdir()
    for left in [*LEFT, name]:
        (tmp_path / "run" / left).write_text("{")
    with pytest.raises(ConfigError, match="holds files, but no run"):
        claim()


def test_an_attempt_begins_without_the_last_ones_end_and_unfinished_files(tmp_path, claim):
    config, claimed = claim()
    begin_attempt(claimed, config, {"tokenizer": {}, "data_fingerprint": {}})
    write_exit(tmp_path / "run", "SIGTERM", 3, resumable=True, exit_code=0)
    (tmp_path / "run" / ".tmp.77.run.json").write_text("{")
    begin_attempt(claimed, config, {})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "run.json",
    ]


def test_free_settings_that_differ_from_the_last_attempts_are_named(tmp_path, claim):
    config, claimed = claim()
    begin_attempt(claimed, config, {"tokenizer": {}, "data_fingerprint": {}})
    assert changed_since_last(claimed, config, OneProcess()) == []
    # What has no part in the numbers is no change.
    other = load_config([TINY], ["run.name=b", "optim.lr=0.5", "refit.mode=clip"]).config
    assert changed_since_last(claimed, other, OneProcess()) == [
        ["optim.lr", 0.003, 0.5],
        ["refit.mode", "off", "clip"],
    ]
    for content in ("optim: [", "optim: {rate: 1}", None):
        path = tmp_path / "run" / "config.yaml"
        path.unlink() if content is None else path.write_text(content)
        (change,) = changed_since_last(claimed, config, OneProcess())
        assert change[0] == "config.yaml" and "unreadable" in change[1], "nobody knows what it was"


@pytest.mark.parametrize("refused", ["fsync", "replace"])
def test_a_file_that_the_disk_refuses_stays_as_it_was(tmp_path, monkeypatch, refused):
    write_json(tmp_path / "run.json", {"attempts": 1})
    write_exit(tmp_path, "SIGTERM", 3, resumable=True, exit_code=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, refused, refuse)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "run.json", {"attempts": 2})
    with pytest.raises(OSError, match="No space"):
        write_exit(tmp_path, "finished", 4, resumable=False, exit_code=0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_run_folder_needs_no_heavy_library():
    code = (
        "import sys, bdtrain.train.folder; assert not {'torch', 'deepspeed', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
