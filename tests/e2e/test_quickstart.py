"""The quickstart on a small text, then the mistakes a user can make with a corpus."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.seq_len=64",
    "diffusion.block_size=8",
    "model.num_layers=1",
    "model.init_std=0.02",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "train.steps=6",
    "train.global_batch_size=4",
    "optim.warmup_steps=1",
    "optim.decay_steps=2",
    "validation.every_steps=3",
    "validation.sample_tokens=16",
]


def run(*command, expect=0, **environment):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == expect, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a finished quickstart. Compilers on the path leave a mark when they are called."""
    folder = tmp_path_factory.mktemp("quickstart")
    text = folder / "text"
    text.mkdir()
    for number, path in enumerate(sorted((ROOT / "bdtrain").rglob("*.py"))):
        shutil.copy(path, text / f"{number:03d}.txt")
    compilers = folder / "compilers"
    compilers.mkdir()
    mark = folder / "a-compiler-ran"
    for name in ("cc", "gcc", "g++", "c++", "clang", "nvcc", "ninja"):
        script = compilers / name
        script.write_text(f'#!/bin/sh\necho "$0 $@" >> {mark}\nexit 1\n')
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
    done = run(
        "tools/quickstart.py",
        "--input",
        text,
        "--folder",
        folder / "out",
        "--vocab-size",
        "400",
        *SMALL,
        PATH=f"{compilers}{os.pathsep}{os.environ['PATH']}",
        TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
    )
    assert not mark.exists(), mark.read_text()
    return folder / "out", done


def test_summary_holds_every_number(quickstart):
    folder, done = quickstart
    summary = json.loads((folder / "summary.json").read_text())
    numbers = {
        "nelbo_before",
        "nelbo_after",
        "bpb_before",
        "bpb_after",
        "unigram_bpb",
        "bigram_bpb",
        "gzip_bpb",
    }
    for name in numbers | {"tokens_per_second", "wall_seconds"}:
        assert summary[name] > 0, name
    assert (ROOT / summary["checkpoint"]).is_dir()
    assert summary["bpb_after"] < summary["bpb_before"]
    assert "bits per byte" in done.stdout
    # An untrained model knows nothing: its bound is the logarithm of the vocabulary.
    assert abs(summary["nelbo_before"] / 5.99 - 1) < 0.03


def test_last_lines_say_where_to_look_and_what_to_do_next(quickstart):
    folder, done = quickstart
    summary = json.loads((folder / "summary.json").read_text())
    report = (folder / "run" / "report.html").read_text(encoding="utf-8")
    for name in ("bpb_before", "unigram_bpb", "bigram_bpb", "gzip_bpb", "bpb_after"):
        assert f"<output>{summary[name]:.3f}</output>" in report, name
    lines = done.stdout.partition("\nNext:\n")[2].splitlines()
    assert 6 <= len(lines) <= 14
    assert (folder / "run" / "report.html").as_uri() in lines[0]
    assert f"make dashboard RUN={folder / 'run'}" in lines[1]
    for line in lines[2:]:
        scripts = [word for word in line.split() if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts), line
    # The trainings stand for themselves: what is said to change has changed, and nothing else.
    (more,) = [shlex.split(line.removeprefix("  train on")) for line in lines if line[2:10] == "train on"]
    run(*more[1:], "--check")
    assert "train.steps=12" in more and "train.steps=6" not in more
    (other,) = [shlex.split(line)[2:] for line in lines if line[2:12] == "block size"]
    assert other[-1] == "diffusion.block_size=4"
    assert set(SMALL) - set(other) == {"diffusion.block_size=8"}
    assert other[other.index("--input") + 1] == str(folder.parent / "text")
    assert other[other.index("--vocab-size") + 1] == "400"


def test_saved_weights_evaluate_to_what_training_reported(quickstart):
    folder, _ = quickstart
    checkpoint, again = folder / "run" / "checkpoint", folder / "again.json"
    corpus = folder / "corpus"
    run("launchers/evaluate_checkpoint.py", "--checkpoint", checkpoint, "--data", corpus, "--json", again)
    reported = json.loads((folder / "run" / "summary.json").read_text())["after"]
    found = json.loads(again.read_text())
    assert found["nelbo"] == pytest.approx(reported["nelbo"], rel=1e-6)
    assert found["bpb"] == pytest.approx(reported["bpb"], rel=1e-6)


def test_text_file_can_be_evaluated_and_its_bytes_are_counted(quickstart):
    folder, _ = quickstart
    text = folder / "one.txt"
    text.write_text("def main() -> int:\n    return 0  # fünf ▁ 😀\n" * 20, encoding="utf-8")
    run("launchers/evaluate_checkpoint.py", "--checkpoint", folder / "run" / "checkpoint", "--text", text,
        "--json", folder / "text.json")  # fmt: skip
    assert json.loads((folder / "text.json").read_text())["text_bytes"] == text.stat().st_size


def test_sample_continues_a_prompt(quickstart):
    folder, _ = quickstart
    command = [
        "launchers/sample_text.py",
        "--checkpoint",
        folder / "run" / "checkpoint",
        "--tokens",
        12,
        "--json",
    ]
    for method in ("first_hitting", "confidence"):
        done = run(*command, "--prompt", "def main(", "--method", method)
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
        sample = json.loads(line)
        assert sample["prompt"] == "def main("
        assert 0 < len(sample["tokens"]) <= 12


def damage_shard(corpus, split="train"):
    shard = sorted(corpus.glob(f"{split}-*.tar"))[0]
    os.truncate(shard, shard.stat().st_size // 2)
    return shard.name


def damage_held_out_shard(corpus):
    return damage_shard(corpus, "valid")


def change_tokenizer(corpus):
    path = corpus / "tokenizer.model"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "tokenizer"


def remove_index(corpus):
    (corpus / "index.json").unlink()
    return "index.json"


@pytest.mark.parametrize("damage", [damage_shard, damage_held_out_shard, change_tokenizer, remove_index])
def test_damaged_corpus_ends_the_run_before_it_starts(quickstart, tmp_path, damage):
    folder, _ = quickstart
    corpus = tmp_path / "corpus"
    shutil.copytree(folder / "corpus", corpus)
    name = damage(corpus)
    target = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "launchers/pretrain.py", "--config", "configs/run/quickstart.yaml", *SMALL,
         f"run.folder={target}", f"data.path={corpus}"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode in (3, 6), done.stderr[-2000:]
    assert name in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not target.exists()


def test_damaged_weights_are_refused(quickstart, tmp_path):
    folder, _ = quickstart
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder / "run" / "checkpoint", copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff")
    done = run("launchers/evaluate_checkpoint.py", "--checkpoint", copy, expect=7)
    assert "SHA-256" in done.stderr
