"""The launchers themselves: train, evaluate, sample; equal runs; one clear error for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "run" / "tiny_synthetic.yaml"


def run(*command, launcher=None, expect=0, **environment):
    """Run a command from the repository's root; returns the finished process."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment}
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{settings['PATH']}"
    start = [launcher, "--num_gpus", "1"] if launcher else [sys.executable]
    done = subprocess.run(
        [*start, *map(str, command)], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["train/loss"].hex() for line in metrics(folder) if "train/loss" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run, started by the deepspeed command; no compiler may run."""
    folder = tmp_path_factory.mktemp("run") / "first"
    extensions = folder.parent / "torch-extensions"
    extensions.mkdir()
    done = run(
        "launchers/pretrain.py",
        "--config",
        TINY,
        f"run.folder={folder}",
        launcher="deepspeed",
        TORCH_EXTENSIONS_DIR=str(extensions),
    )
    assert list(extensions.iterdir()) == []
    return folder, done


def test_run_leaves_curve_samples_summary_and_verified_weights(trained):
    from bdtrain.checkpoint.weights import open_model

    folder, done = trained
    curve = metrics(folder)
    assert "ETA" in done.stdout
    steps = [line["step"] for line in curve if "train/loss" in line]
    assert steps == sorted(steps)
    assert steps[-1] == json.loads((folder / "summary.json").read_text())["steps"]
    valid = [line for line in curve if "val/nelbo" in line]
    assert valid[0]["step"] == 0
    assert valid[-1]["val/nelbo"] < valid[0]["val/nelbo"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["step"] == 0
    assert samples[-1]["step"] == steps[-1]
    saved = open_model(folder / "checkpoint")
    assert saved.facts["step"] == steps[-1]


def test_saved_weights_evaluate_to_what_the_run_reported(trained, tmp_path):
    folder, _ = trained
    out = tmp_path / "evaluation.json"
    run(
        "launchers/evaluate_checkpoint.py",
        "--checkpoint",
        folder / "checkpoint",
        "--sequences",
        16,
        "--json",
        out,
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(out.read_text())["nelbo"] == pytest.approx(summary["after"]["nelbo"], rel=1e-6)


def test_samples_do_not_depend_on_their_batch(trained):
    folder, _ = trained

    def sample(*more):
        command = [
            "launchers/sample_text.py",
            "--checkpoint",
            folder / "checkpoint",
            "--tokens",
            24,
            "--json",
            *more,
        ]
        return [
            json.loads(line)["tokens"] for line in run(*command).stdout.splitlines() if line.startswith("{")
        ]

    one, three = sample(), sample("--samples", 3)
    assert len(three) == 3
    assert one[0] == three[0]
    assert three[0] != three[1]


def test_micro_batch_and_launcher_do_not_change_the_run(trained, tmp_path):
    folder, _ = trained
    again = tmp_path / "again"
    run("launchers/pretrain.py", "--config", TINY, f"run.folder={again}", "--local_rank", "0")
    assert losses(again) == losses(folder)
    split = tmp_path / "split"
    run("launchers/pretrain.py", "--config", TINY, f"run.folder={split}", "train.micro_batch_size=2")
    ours = [float.fromhex(x) for x in losses(folder)]
    theirs = [float.fromhex(x) for x in losses(split)]
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_a_run_begins_with_the_weights_of_another(trained, tmp_path):
    folder, _ = trained
    overrides = [f"run.folder={tmp_path / 'next'}", "train.steps=4", "checkpoint.save_final=false"]
    start = f"train.init_from={folder / 'checkpoint'}"
    done = run("launchers/pretrain.py", "--config", TINY, *overrides, start)
    assert "begins with the averaged weights of step 20" in done.stdout
    ended = [line for line in metrics(folder) if "val/nelbo" in line][-1]
    begun = next(line for line in metrics(tmp_path / "next") if "val/nelbo" in line)
    assert begun["step"] == 0
    assert begun["val/nelbo"] == pytest.approx(ended["val/nelbo"], rel=1e-6)

    # Whatever cannot be its beginning is named, with nothing left behind.
    wider = [f"run.folder={tmp_path / 'wider'}", "model.hidden_size=64", start]
    assert "are not this model's" in run("launchers/pretrain.py", "--config", TINY, *wider, expect=7).stderr
    missing = ["--config", TINY, f"run.folder={tmp_path / 'none'}", f"train.init_from={tmp_path}"]
    assert "is no model folder or checkpoint" in run("launchers/pretrain.py", *missing, expect=3).stderr
    assert not (tmp_path / "wider").exists() and not (tmp_path / "none").exists()


def test_a_run_never_writes_over_another(trained):
    folder, _ = trained
    before = losses(folder)
    done = run("launchers/pretrain.py", "--config", TINY, f"run.folder={folder}", expect=3)
    assert "holds a finished run of 20 steps" in done.stderr
    assert losses(folder) == before


def test_run_that_is_never_finite_ends_with_advice(tmp_path):
    folder = tmp_path / "run"
    done = run("launchers/pretrain.py", "--config", TINY, f"run.folder={folder}", "optim.lr=1e36",
               "optim.warmup_steps=0", "train.max_nonfinite_steps=2", expect=4)  # fmt: skip
    assert "2 steps in a row were not finite" in done.stderr
    assert "optim.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_corpus_is_named_with_the_command_that_makes_one(tmp_path):
    config = ROOT / "configs" / "run" / "quickstart.yaml"
    done = run(
        "launchers/pretrain.py",
        "--config",
        config,
        f"run.folder={tmp_path / 'run'}",
        "data.path=/nowhere",
        expect=3,
    )
    assert "/nowhere" in done.stderr
    assert "preprocess.py" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["optim.lrr=1"], 3, "optim.lr"),
        (["train.steps=ten"], 3, "train.steps"),
        (["diffusion.block_size=7"], 3, "seq_len"),
        (["diffusion.plan.clip_range=[0.9,0.3]"], 3, "clip_range"),
        (["diffusion.plan.clip_range=[0.3,0.8]", "diffusion.schedule=cosine"], 3, "linear"),
        (["diffusion.plan.clip_range=[0.3,0.4]", "diffusion.plan.resample=true"], 3, "resample"),
    ],
)
def test_mistakes_end_before_anything_starts(tmp_path, overrides, code, message):
    folder = tmp_path / "run"
    done = run("launchers/pretrain.py", "--config", TINY, f"run.folder={folder}", *overrides, expect=code)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert not folder.exists()
