"""A run that measures named held-out sets: its numbers, their manifests, other layouts, a restart."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bdtrain.tracking.jsonl import deterministic_fields, read_metrics
from tests.reliability.launched import Launched, free_port

STEPS, KILLED = 10, 7
WORDS = "the old sea took one small boat and gave back two long oars".split()
RUN = """\
model: {{num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, vocab_multiple: 16}}
data: {{path: {folder}/mine, seq_len: 32}}
diffusion: {{block_size: 4, plan: {{clip_range: [0.3, 0.8]}}}}
optim: {{lr: 3.0e-3, warmup_steps: 4, ema_decay: 0.9}}
train: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 4}}
validation:
  every_steps: 4
  sample_tokens: 0
  sets:
    - {{name: zero, path: {folder}/zero.txt, sequences: 7}}
    - {{name: twin, path: {folder}/mine}}
    - {{name: others, path: {folder}/others}}
checkpoint: {{every_steps: 4}}
tracking: {{mlflow: false}}
"""


def finish(scratch: Path, *command: object, expect: int = 0, **environment: str) -> str:
    """What a command printed."""
    with Launched(command, scratch, environment) as run:
        code, text = run.wait(), run.text()
    assert code == expect, (code, text[-3000:])
    return text


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora ``mine`` and ``others`` of one tokenizer, a text file, and ``run.yaml``."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in ((1, "mine"), (2, "others")):
        lines = (json.dumps({"text": text}) + "\n" for text in sentences(seed, 300))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "zero.txt").write_text("\n".join(sentences(3, 40)))
    log, model = folder / "log", folder / "tokenizer" / "tokenizer.model"
    train = ["--input", folder / "mine.jsonl", "--vocab-size", 300, "--out", model.parent]
    finish(log, "python", "tools/train_tokenizer.py", *train)
    for name, share in (("mine", 0.1), ("others", 0)):
        where = ["--input", folder / f"{name}.jsonl", "--tokenizer", model, "--out", folder / name]
        rows = ["--valid-fraction", share, "--row-length", 64, "--workers", 1]
        finish(log, "python", "tools/preprocess.py", *where, *rows)
    (folder / "run.yaml").write_text(RUN.format(folder=folder, steps=STEPS))
    return folder


def pretrain(texts: Path, folder: Path, *overrides: str) -> list[object]:
    return ["launchers/pretrain.py", "--config", texts / "run.yaml", f"run.folder={folder}", *overrides]


@pytest.fixture(scope="module")
def trained(texts: Path) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    folder = texts / "trained" / "run"
    return folder, finish(texts / "trained" / "log", "python", *pretrain(texts, folder))


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def reports(folder: Path) -> dict[int, dict[str, str]]:
    """By step, every bit of the reports that hold a likelihood."""
    return {line["step"]: deterministic_fields(line) for line in read_metrics(folder / "metrics.jsonl")
            if "val/nelbo" in line}  # fmt: skip


def test_every_validation_measures_every_set_and_says_so(trained: tuple[Path, str]) -> None:
    folder, said = trained
    found = evaluations(folder)
    steps, names = [0, 4, 8, STEPS], ["valid", "zero", "twin", "others"]
    assert [(one["step"], one["set"]) for one in found] == [(s, name) for s in steps for name in names]
    heads = [line.split(" (")[0] for line in said.splitlines() if " at step " in line and "NELBO" in line]
    assert heads == [f"{name} at step {step}" for step in steps for name in names]
    told = reports(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["sets"]) == names[1:]
    for one in found:
        section = "val" if one["set"] == "valid" else f"val_{one['set']}"
        for quantity in ("nelbo", "nelbo_noise_error", "nelbo_text_error", "ppl", "bpb", "tokens"):
            assert told[one["step"]][f"{section}/{quantity}"] == repr(float(one["result"][quantity]))
        if one["step"] == STEPS:
            last = summary["after"] if one["set"] == "valid" else summary["sets"][one["set"]]
            assert one["result"] == last
            assert one["manifest"]["averaged_weights"]
        assert one["manifest"]["mask_mode"] == "count"
        assert one["manifest"]["noise_plan"]["clip_range"] is None
    # The same rows by another name are the same number.
    for step in steps:
        own, twin = (told[step][f"{section}/nelbo"] for section in ("val", "val_twin"))
        assert own == twin
    assert "Held-out sets" in (folder / "report.html").read_text()


def test_saved_weights_evaluate_to_the_same_number_under_the_same_manifest(
    texts: Path, trained: tuple[Path, str]
) -> None:
    folder, _ = trained
    out = texts / "evaluation.json"
    command = ["launchers/evaluate_checkpoint.py", "--checkpoint", folder / "checkpoint", "--json", out]
    finish(texts / "log", "python", *command, "--text", texts / "zero.txt", "--sequences", 7)
    saved = json.loads(out.read_text())
    (own,) = [one for one in evaluations(folder) if (one["step"], one["set"]) == (STEPS, "zero")]
    assert saved["nelbo"] == pytest.approx(own["result"]["nelbo"], rel=1e-6)
    # Where the weights came from aside, all that decides the number is the same.
    assert own["manifest"].pop("checkpoint") is None
    assert saved["manifest"].pop("checkpoint") == str((folder / "checkpoint").resolve())
    assert saved["manifest"] == own["manifest"]


def test_a_killed_run_repeats_the_likelihoods_of_every_set(texts: Path, trained: tuple[Path, str]) -> None:
    folder = texts / "killed" / "run"
    log, command = texts / "killed" / "log", pretrain(texts, folder)
    finish(log, "python", *command, expect=-9, BDTRAIN_FAULT=f"*:{KILLED}:forward:kill")
    assert max(one["step"] for one in evaluations(folder)) == 4
    finish(log, "python", *command)
    assert reports(folder) == reports(trained[0])
    # The file only grows; of the two lines of step 4 the second attempt's counts, and they agree.
    found = evaluations(folder)
    assert [(one["step"], one["attempt"]) for one in found if one["set"] == "zero"] == [
        (0, 1), (4, 1), (4, 2), (8, 2), (STEPS, 2),
    ]  # fmt: skip
    first, again = ([one for one in found if (one["step"], one["attempt"]) == (4, n)] for n in (1, 2))
    for before, after in zip(first, again, strict=True):
        del before["result"]["seconds"], after["result"]["seconds"]
        assert (before["result"], before["manifest"]) == (after["result"], after["manifest"])


def test_two_ranks_measure_what_one_does(texts: Path, trained: tuple[Path, str]) -> None:
    folder = texts / "two" / "run"
    front = ["torchrun", "--nproc_per_node", 2, "--master_addr", "127.0.0.1", "--master_port", free_port()]
    finish(texts / "two" / "log", *front, *pretrain(texts, folder, "train.steps=4"))
    assert len(evaluations(folder)) == 8  # one rank writes
    for theirs, ours in zip(evaluations(folder), evaluations(trained[0]), strict=False):
        assert (theirs["step"], theirs["set"]) == (ours["step"], ours["set"])
        for name, value in ours["result"].items():
            if isinstance(value, float) and name != "seconds":
                assert theirs["result"][name] == pytest.approx(value, rel=1e-4), name
            elif name != "seconds":
                assert theirs["result"][name] == value, name
        assert theirs["manifest"] == ours["manifest"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{{name: gone, path: {0}/no.txt}}", "no.txt does not exist"),
        ("{{name: twin, path: {0}/zero.txt, split: train}}", "split=train would be ignored"),
        ("{{name: valid, path: {0}/zero.txt}}", "name='valid'; that is the name of the run's own"),
    ],
)
def test_a_mistake_ends_before_the_run_begins(texts: Path, tmp_path: Path, entry: str, said: str) -> None:
    folder = tmp_path / "run"
    wrong = f"validation.sets=[{entry.format(texts)}]"
    text = finish(tmp_path / "log", "python", *pretrain(texts, folder, wrong), expect=3)
    assert said in text
    assert text.count("error:") == 1 and "Traceback" not in text
    assert not folder.exists()
