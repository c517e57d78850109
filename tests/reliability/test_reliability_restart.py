"""Runs that were killed, and runs that must not go on: what a restart repeats, and what it refuses.

Every later line of a killed run must hold the bits of the uninterrupted one. Means are reported over several
steps and checkpoints fall between two reports, so that a window that crosses a restart is tested too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kill_trials import (
    ROOT,
    Attempt,
    Job,
    curve,
    differences,
    finish,
    kill_at,
    kill_by_fault,
    random_fault,
    starts,
    when_reported,
)
from nursery import Nursery

from bdtrain.checkpoint.folders import list_checkpoints, step_name
from bdtrain.tracking.jsonl import read_events

STEPS, REPORT, SAVE, VALIDATE = 40, 4, 7, 10
COMMON = (
    f"train.steps={STEPS}",
    f"train.log_every_steps={REPORT}",
    f"validation.every_steps={VALIDATE}",
    f"checkpoint.every_steps={SAVE}",
    "validation.sample_tokens=8",
    "optim.schedule=cosine",
)
SKIPPED = (9, 10, 23)
"""Steps that one rank spoils, the last rank where there are two: in the middle of windows."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "one zero3": (1, ("parallel.zero_stage=3",)),
    "dp2": (2, ("train.micro_batch_size=2",)),
    "dp2 zero2": (2, ("train.micro_batch_size=2", "parallel.zero_stage=2")),
    "dp2 zero3": (2, ("train.micro_batch_size=2", "parallel.zero_stage=3")),
    "pp2": (2, ("parallel.pp=2",)),
    "tp2": (2, ("parallel.tp=2",)),
    "tp2 sp bf16": (2, ("parallel.tp=2", "parallel.sequence_parallel=true", "train.precision=bf16")),
    "pp2 recompute": (2, ("parallel.pp=2", "train.recompute=full", "diffusion.noise_copies=2")),
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@dataclass
class Runs:
    """Jobs of this file, and the uninterrupted run of each layout."""

    folder: Path
    nursery: Nursery
    whole: dict[str, Path] = field(default_factory=dict)

    def job(self, name: str, layout: str, *more: str) -> Job:
        world, overrides = LAYOUTS[layout]
        spoiled = ";".join(f"{world - 1}:{step}:forward:nan_loss" for step in SKIPPED)
        return Job(
            self.folder / name,
            self.folder / f"{name}, logs",
            world,
            (*COMMON, *overrides, *more),
            environment={"BDTRAIN_FAULT": spoiled},
            nursery=self.nursery,
        )

    def uninterrupted(self, layout: str) -> Path:
        if layout not in self.whole:
            job = self.job(layout, layout)
            finish(job)
            self.whole[layout] = job.folder
        return self.whole[layout]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Runs:
    return Runs(tmp_path_factory.mktemp("restart"), nursery)


def digests(folder: Path) -> dict[str, str]:
    """Of a folder's files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def kill_twice(job: Job, draw: random.Random, *, kills: int) -> list[int]:
    """``kill -9`` a run at random moments, each two saves later than the one before, then finish it.

    Returns:
        The step from which each attempt went on.
    """
    for number in range(kills):
        # Not before there is a checkpoint to go on from, which the last attempt did not have.
        first = SAVE + 2 + number * 2 * SAVE
        step = draw.randrange(first, first + 2 * SAVE - 2)
        if draw.random() < 0.5:
            killed = kill_at(job, when_reported(step + -step % REPORT, then_s=draw.uniform(0, 0.05)))
            assert killed, "finished before the kill"
        else:
            # All ranks at once, in the middle of a step.
            fault = random_fault(draw, job, STEPS, ("data", "forward", "step")).split(":")
            kill_by_fault(job, f"*:{step}:{fault[2]}:kill")
        assert not (job.folder / "EXIT.json").exists()
    finish(job)
    return starts(job.folder)


def check_same_lines(folder: Path, reference: Path) -> None:
    assert differences(folder, reference) == []
    found = curve(folder)
    # The windows: a report at every fourth step, a skipped step is counted and no part of a mean.
    assert [step for step, values in found.items() if "train/loss" in values] == [
        *range(REPORT, STEPS + 1, REPORT)
    ]
    assert [step for step, values in found.items() if "val/nelbo" in values] == [
        *range(0, STEPS + 1, VALIDATE)
    ]
    skipped = [float(found[step]["fault/skipped_steps"]) for step in (8, 12, 20, 24, STEPS)]
    assert skipped == [0, 2, 2, 3, 3]
    assert (
        digests(folder / "checkpoint")["model.safetensors"]
        == digests(reference / "checkpoint")["model.safetensors"]
    )


KILLS = [
    pytest.param("one", 1, 1, id="one process killed once"),
    pytest.param("dp2", 2, 2, id="dp2 killed twice"),
    pytest.param("pp2", 2, 3, id="pp2 killed twice", marks=pytest.mark.soak),
    pytest.param("one", 2, 4, id="one process killed twice", marks=pytest.mark.soak),
    *(
        pytest.param(layout, 2, 10 * number + seed, id=f"{layout} seed {seed}", marks=pytest.mark.soak)
        for number, layout in enumerate(LAYOUTS, start=1)
        for seed in range(2)
    ),
]


@pytest.mark.parametrize(("layout", "kills", "seed"), KILLS)
def test_every_line_after_kill_9_has_the_bits_of_the_uninterrupted_run(
    runs: Runs, layout: str, kills: int, seed: int
) -> None:
    job = runs.job(f"{layout}, killed, seed {seed}", layout)
    went_on = kill_twice(job, random.Random(seed), kills=kills)
    # A slow machine may see the first kill late, after the save that the second one is meant to follow.
    assert len(went_on) == kills + 1 and went_on == sorted(went_on)
    assert went_on[0] == 0 < went_on[1] and all(step % SAVE == 0 for step in went_on)
    check_same_lines(job.folder, runs.uninterrupted(layout))


MOMENTS = [
    pytest.param("one", "*:3:forward:kill", 0, id="before the first checkpoint"),
    pytest.param("one", "*:14:save:kill", 7, id="in a save"),
    pytest.param("pp2", "*:40:validate:kill", 40, id="in the last validation"),
    pytest.param("dp2", "1:0:validate:kill", 0, id="in the first validation", marks=pytest.mark.soak),
    pytest.param("dp2", "0:28:save:kill", 21, id="one rank in a save", marks=pytest.mark.soak),
    pytest.param("tp2", "*:20:validate:kill", 14, id="in a validation", marks=pytest.mark.soak),
    pytest.param("one", "*:40:save:kill", 35, id="in the last save", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("layout", "fault", "went_on"), MOMENTS)
def test_no_moment_of_a_kill_changes_a_bit(runs: Runs, layout: str, fault: str, went_on: int) -> None:
    job = runs.job(f"{layout}, {fault.replace(':', ' ').replace('*', 'all')}", layout)
    kill_by_fault(job, fault)
    finish(job)
    assert starts(job.folder) == [0, went_on]
    check_same_lines(job.folder, runs.uninterrupted(layout))


def test_a_validation_that_was_killed_after_its_save_is_made_up_for(runs: Runs) -> None:
    job = runs.job("one, killed between save and validation", "one", f"checkpoint.every_steps={VALIDATE}")
    kill_by_fault(job, "*:20:validate:kill")
    finish(job)
    assert starts(job.folder) == [0, 20]
    check_same_lines(job.folder, runs.uninterrupted("one"))


def test_a_run_that_one_rank_was_asked_to_stop_goes_on_with_the_same_bits(runs: Runs) -> None:
    job = runs.job("dp2, asked to stop", "dp2")
    # In the middle of a window, right after a skipped step: the window of the report is saved with it.
    faults = job.environment["BDTRAIN_FAULT"]
    finish(replace(job, environment={"BDTRAIN_FAULT": f"{faults};1:10:step:term"}))
    left = json.loads((job.folder / "EXIT.json").read_text())
    assert (left["reason"], left["resumable"], left["exit_code"]) == ("SIGTERM", True, 0)
    finish(job)
    # Step 10 was under way when the signal came; the collective of the next step tells all ranks.
    assert starts(job.folder) == [0, left["step"]] and left["step"] in (10, 11)
    check_same_lines(job.folder, runs.uninterrupted("dp2"))


WORDS = ["the", "cat", "sat", "on", "a", "mat;", "x = 12\n", "naïve", "  ", "end.\n"]
CORPUS_RUN = """
run: {name: corpus_run}
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, vocab_multiple: 16}
data: {kind: corpus, seq_len: 32, window_shards: 2, lanes: 4}
diffusion: {block_size: 4}
optim: {lr: 3.0e-3, schedule: constant, warmup_steps: 4, ema_decay: 0.9}
train: {steps: 12, global_batch_size: 8, micro_batch_size: 4}
validation: {sequences: 16, every_steps: 4, sample_tokens: 0}
checkpoint: {every_steps: 4}
"""


def tool(name: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def write_text(path: Path, seed: int) -> Path:
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) for _ in range(600)]
    path.write_text("".join(json.dumps({"text": f"{seed} {line}"}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``mine``, ``other text`` of the same tokenizer and size, and ``other tokenizer``."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = [write_text(folder / f"{seed}.jsonl", seed) for seed in (1, 2)]
    for name, vocabulary in (("t1", 300), ("t2", 290)):
        tool("train_tokenizer", "--input", texts[0], "--vocab-size", vocabulary, "--out", folder / name)
    made = (("mine", texts[0], "t1"), ("other text", texts[1], "t1"), ("other tokenizer", texts[0], "t2"))
    for name, text, tokenizer in made:
        model = folder / tokenizer / "tokenizer.model"
        where = ["--input", text, "--tokenizer", model, "--out", folder / name]
        tool("preprocess", *where, "--valid-fraction", 0.1, "--row-length", 64, "--workers", 1)
    (folder / "run.yaml").write_text(CORPUS_RUN)
    return folder


@dataclass(frozen=True)
class Stopped:
    """A run on a corpus that was killed at step 7, with the checkpoint of step 4."""

    job: Job

    def continued(self, *overrides: str, **changes: object) -> Job:
        """The same command with more settings."""
        return replace(self.job, overrides=(*self.job.overrides, *overrides), **changes)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, corpora: Path, nursery: Nursery) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped")
    mine = (f"data.path={corpora / 'mine'}",)
    job = Job(folder / "run", folder / "logs", 1, mine, corpora / "run.yaml", nursery=nursery)
    kill_by_fault(job, "*:7:forward:kill")
    assert [step for step, _ in list_checkpoints(job.folder / "checkpoints")] == [4]
    return Stopped(job)


def listing(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Size, time and content of every file of a run; the lock of a dead owner aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            state = path.stat()
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns, content)
        elif path.is_dir():
            found[str(path.relative_to(folder))] = (0, path.stat().st_mtime_ns, "folder")
    return found


def refusal(job: Job, code: int) -> str:
    """Start a run that must be refused without a trace; what it said.

    Raises:
        AssertionError: if the folder changed, a rank gave another code, or it was not one error.
    """
    before = listing(job.folder)
    with Attempt(job) as attempt:
        assert attempt.wait(120) == [code] * job.world_size, attempt.output()
        said = [path.read_text() for path in sorted(attempt.logs.glob("rank-*.log"))]
    assert listing(job.folder) == before
    assert "Traceback" not in "".join(said)
    # Before any work: no parameter was made.
    assert "parameters on" not in said[0]
    # What is wrong with the data every rank finds for itself, in the same words.
    errors = [text[text.index("error: ") :] for text in said if "error: " in text]
    assert len(errors) == 1, said
    assert errors[0].count("error: ") == 1
    return errors[0]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("model.num_layers=3", "model.num_layers: the run has 2, now 3"),
        ("model.hidden_size=64", "model.hidden_size: the run has 32, now 64"),
        ("run.seed=7", "run.seed: the run has 1234, now 7"),
        ("train.global_batch_size=16", "train.global_batch_size: the run has 8, now 16"),
        ("data.seq_len=64", "data.seq_len: the run has 32, now 64"),
        ("diffusion.block_size=8", "diffusion.block_size: the run has 4, now 8"),
    ],
)
def test_a_run_goes_on_as_the_same_run_or_not_at_all(stopped: Stopped, setting: str, named: str) -> None:
    said = refusal(stopped.continued(setting), 3)
    assert named in said and "differs in what cannot change" in said


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_another_corpus_or_tokenizer_is_refused(stopped: Stopped, corpora: Path, world_size: int) -> None:
    said = refusal(stopped.continued(f"data.path={corpora / 'other tokenizer'}", world_size=world_size), 6)
    assert "began with a tokenizer of 300 ids" in said and "now have one of 290 ids" in said
    said = refusal(stopped.continued(f"data.path={corpora / 'other text'}", world_size=world_size), 6)
    assert "tokenizer" not in said.splitlines()[0]


def test_run_resume_false_leaves_a_run_alone(stopped: Stopped) -> None:
    assert "run.resume=false" in refusal(stopped.continued("run.resume=false"), 3)


def test_a_folder_of_other_files_is_refused(stopped: Stopped, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    (folder / "figures").mkdir(parents=True)
    (folder / "chapter.tex").write_text("here")
    assert "holds files, but no run" in refusal(stopped.continued(folder=folder), 3)


def test_a_run_goes_on_where_its_corpus_was_moved_to(stopped: Stopped, corpora: Path, tmp_path: Path) -> None:
    shutil.copytree(corpora / "mine", tmp_path / "moved")
    here = stopped.continued(folder=tmp_path / "run", scratch=tmp_path / "logs")
    there = replace(here, overrides=(f"data.path={tmp_path / 'moved'}",))
    shutil.copytree(stopped.job.folder, here.folder)
    finish(there)
    whole = stopped.continued(folder=tmp_path / "whole", scratch=tmp_path / "logs")
    finish(whole)
    assert starts(here.folder) == [0, 4]
    assert differences(here.folder, whole.folder) == []

    # A finished run is refused; asked for more steps it goes on as if it had never ended.
    said = refusal(there, 3)
    assert "holds a finished run of 12 steps" in said and "raise train.steps" in said
    finish(replace(there, overrides=(*there.overrides, "train.steps=20")))
    longer = stopped.continued("train.steps=20", folder=tmp_path / "longer", scratch=tmp_path / "logs")
    finish(longer)
    assert starts(here.folder) == [0, 4, 12]
    assert differences(here.folder, longer.folder) == []
    assert "holds a finished run of 20 steps" in refusal(there, 3)


def test_a_second_writer_is_refused_while_the_first_is_alive(stopped: Stopped, tmp_path: Path) -> None:
    first = stopped.continued("train.steps=1000000", folder=tmp_path / "run", scratch=tmp_path / "first")
    second = replace(first, scratch=tmp_path / "second", world_size=2)
    with Attempt(first) as writer:
        while not list_checkpoints(first.folder / "checkpoints"):
            assert writer.codes() == [None], writer.output()
            time.sleep(0.01)
        with Attempt(second) as attempt:
            assert attempt.wait(120) == [3, 3], attempt.output()
            said = attempt.output()
        assert f"is being written by process {writer.ranks[0].pid} on" in said
        assert said.count("error: ") == 1
        assert writer.codes() == [None]
        writer.kill()
    assert starts(first.folder) == [0]
    # The dead writer's lock is no obstacle.
    steps = list_checkpoints(first.folder / "checkpoints")[-1][0] + 1
    finish(replace(second, overrides=(*first.overrides, f"train.steps={steps}")))
    assert starts(first.folder) == [0, steps - 1]
    assert [event["event"] for event in read_events(first.folder / "metrics.jsonl")][-1] == "end"


@pytest.mark.parametrize("layout", ["tp2", "pp2", pytest.param("dp2 zero3", marks=pytest.mark.soak)])
def test_checkpoints_of_any_layout_evaluate_and_sample_as_the_run_did(
    runs: Runs, nursery: Nursery, layout: str, tmp_path: Path
) -> None:
    folder = runs.uninterrupted(layout)
    checkpoint = folder / "checkpoints" / step_name(STEPS)
    command = ["launchers/evaluate_checkpoint.py", "--checkpoint", str(checkpoint), "--sequences", "16"]
    launch(nursery, [*command, "--json", str(tmp_path / "likelihood.json")], tmp_path / "log")
    found = json.loads((tmp_path / "likelihood.json").read_text())
    reported = curve(folder)[STEPS]
    assert found["nelbo"] == pytest.approx(float(reported["val/nelbo"]), rel=1e-6)
    assert found["tokens"] == float(reported["val/tokens"])
    assert found["manifest"]["step"] == STEPS and found["manifest"]["averaged_weights"]

    def sample(model: Path) -> list[int]:
        command = ["launchers/sample_text.py", "--checkpoint", str(model), "--tokens", "24", "--json"]
        (line,) = [
            text for text in launch(nursery, command, tmp_path / "log").splitlines() if text[:1] == "{"
        ]
        tokens: list[int] = json.loads(line)["tokens"]
        return tokens

    alone = runs.uninterrupted("one") / "checkpoints" / step_name(STEPS)
    assert sample(checkpoint) == sample(folder / "checkpoint") == sample(alone)


def launch(nursery: Nursery, command: list[str], log: Path) -> str:
    """Run a launcher on one process to its end; what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    code = nursery.start(command, environment=environment, log=log).wait()
    assert code == 0, log.read_text()
    return log.read_text()
