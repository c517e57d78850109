"""The data tools as a user starts them: from text to a checked corpus, in processes, killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "cat", "sat", "on", "a", "mat;", "x = 12\n", "def f():\n    ", "naïve", "▁", "  ", "end.\n"]


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def call(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tool, *arguments), capture_output=True, text=True, env=environment(), timeout=300, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a tokenizer and the corpus that one process makes of them."""
    folder = tmp_path_factory.mktemp("work")
    draw = random.Random(5)
    with open(folder / "in.jsonl", "w", encoding="utf-8") as file:
        for number in range(6000):
            text = f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(10, 90)))
            file.write(json.dumps({"text": text}) + "\n")
    trained = call("train_tokenizer", "--input", folder / "in.jsonl", "--vocab-size", 300, "--out", folder)
    assert trained.returncode == 0, trained.stderr
    made = call("preprocess", *arguments(folder, "one"), "--workers", 1)
    assert made.returncode == 0, made.stderr
    assert "MB/s, done in" in made.stderr
    return folder


def arguments(folder: Path, out: str) -> list[object]:
    model = folder / "tokenizer.model"
    inputs = ["--input", folder / "in.jsonl", "--tokenizer", model, "--out", folder / out]
    return [*inputs, "--valid-fraction", 0.05, "--row-length", 64, "--member-rows", 16, "--task-mib", 0.06]


def test_any_number_of_workers_makes_the_same_corpus(work: Path) -> None:
    made = call("preprocess", *arguments(work, "three"), "--workers", 3)
    assert made.returncode == 0, made.stderr
    assert contents(work / "three") == contents(work / "one")
    assert len(list((work / "three").glob("train-*.tar"))) > 10


def test_kill_9_again_and_again_and_the_rerun_makes_the_same_corpus(work: Path) -> None:
    out = work / "killed"
    left_unfinished = 0
    for manifests in (0, 3, 8):
        run = subprocess.Popen(
            command("preprocess", *arguments(work, "killed"), "--workers", 2, "--quiet"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # The parent alone is killed, in the middle of its tasks; its workers must notice by themselves.
        deadline = time.monotonic() + 120
        while run.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob("manifest/0*.json"))) > manifests and list(out.glob(".tmp.*")):
                break
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.wait()
        left_unfinished += not (out / "index.json").exists()
    assert left_unfinished == 3
    made = call("preprocess", *arguments(work, "killed"), "--workers", 2)
    assert made.returncode == 0, made.stderr
    assert "tasks were done before" in made.stdout
    assert contents(out) == contents(work / "one")


def test_a_finished_corpus_passes_the_deep_check_and_can_be_looked_at(work: Path) -> None:
    checked = call("index_shards", work / "one", "--verify", "--deep")
    assert checked.returncode == 0 and "intact" in checked.stdout, checked.stderr
    shown = call(
        "inspect_data", work / "one", "--rows", 1, "--frequent", 3, "--order", "--dp", 2, "--steps", 1
    )
    assert shown.returncode == 0, shown.stderr
    assert "row 0: '0 " in shown.stdout and "step 0 rank 1: " in shown.stdout


def test_mistakes_are_one_line_with_the_exit_code_of_data(work: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    model = ["--tokenizer", work / "tokenizer.model", "--out", tmp_path / "c"]
    for tool, given, message in (
        ("preprocess", ["--input", bad, *model], "bad.txt, byte 0: is not UTF-8"),
        ("preprocess", ["--input", tmp_path / "gone", *model], "no such file"),
        ("preprocess", [*arguments(work, "one"), "--bos"], "begun with other options"),
        ("train_tokenizer", ["--input", bad, "--out", tmp_path], "the corpus is empty"),
        ("index_shards", [tmp_path / "none"], "does not exist"),
        ("inspect_data", [work], "is not a corpus"),
    ):
        result = call(tool, *given)
        assert result.returncode == 6, (tool, result.stderr)
        assert result.stderr.startswith("error: ") and message in result.stderr
        assert result.stderr.count("\n") == 1


def test_faults_found_in_a_worker_process_reach_the_user_as_one_line(work: Path, tmp_path: Path) -> None:
    lines = (work / "in.jsonl").read_bytes().split(b"\n")
    lines[4000] = b'{"text": '
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    given = arguments(work, "faulty")
    given[1], given[5] = tmp_path / "in.jsonl", tmp_path / "faulty"
    result = call("preprocess", *given, "--workers", 2, "--quiet")
    assert result.returncode == 6
    assert result.stderr.startswith("error: ") and "is not a line of JSON" in result.stderr
    assert result.stderr.count("\n") == 1
