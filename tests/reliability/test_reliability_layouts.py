"""A run goes on under another layout as if nothing had happened: losses, data, noise, counters, saved bits.

Each run is the launcher on one or two real ranks, forked from a process that has imported everything.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kill_trials import Job, curve, finish, keep_one_checkpoint, recorded_rows, starts
from nursery import SAVE_TO, Nursery

from bdtrain.checkpoint.folders import step_name
from bdtrain.checkpoint.load import TrainingState

STEPS, SAVED = 12, 6
COMMON = (
    f"train.steps={STEPS}",
    "train.micro_batch_size=2",
    "model.num_layers=4",
    "optim.lr=3e-4",
    "optim.epsilon=1e-6",
    "optim.grad_clip_norm=0.5",
    "optim.ema_decay=0.9",
    "validation.every_steps=4",
    "validation.sequences=8",
    "validation.sample_tokens=0",
    f"checkpoint.every_steps={SAVED}",
    "checkpoint.keep_last=9",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "one zero2": (1, ("parallel.zero_stage=2",)),
    "one zero3": (1, ("parallel.zero_stage=3",)),
    "tp2": (2, ("parallel.tp=2",)),
    "tp2 zero2": (2, ("parallel.tp=2", "parallel.zero_stage=2")),
    "tp2 zero3": (2, ("parallel.tp=2", "parallel.zero_stage=3")),
    "tp2 sp": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "tp2 sp zero2": (2, ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero_stage=2")),
    "pp2": (2, ("parallel.pp=2",)),
    "pp2 zero2": (2, ("parallel.pp=2", "parallel.zero_stage=2")),
    "dp2": (2, ()),
    "dp2 zero2": (2, ("parallel.zero_stage=2",)),
    "dp2 zero3": (2, ("parallel.zero_stage=3",)),
    "tp2 dp2": (4, ("parallel.tp=2",)),
    "pp2 dp2": (4, ("parallel.pp=2",)),
    "tp2 pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
}
CLOSE = ("train/loss", "train/grad_norm", "val/nelbo")
SAME_BITS = (
    "train/masked_share",
    "train/counted_tokens",
    "train/samples",
    "train/tokens",
    "train/epoch",
    "train/lr",
    "fault/skipped_steps",
    "val/tokens",
)
COUNTERS = ("step", "tokens", "samples", "applied_steps", "skipped_steps", "adam_step", "lr", "averaged")
FIRST = ["tp2", "tp2 sp", "pp2", "dp2", "dp2 zero2", "dp2 zero3"]
"""Both directions of each, on every change; the ``soak`` mark has the rest."""


@dataclass
class Runs:
    """Runs of this file, each made once, when it is asked for."""

    folder: Path
    nursery: Nursery
    made: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def job(self, name: str, layout: str, *more: str, environment: dict[str, str] | None = None) -> Job:
        """A run of this name under a layout; its attempts are logged beside it."""
        world, overrides = LAYOUTS[layout]
        return Job(
            self.folder / name,
            self.folder / f"{name}, logs",
            world,
            (*COMMON, *overrides, *more),
            environment=environment or {},
            nursery=self.nursery,
            record=True,
        )

    def uninterrupted(self, layout: str) -> Path:
        """A whole run."""
        return self._once((layout,), lambda job: None, layout)

    def continued(self, saved_by: str, on: str) -> Path:
        """The second half of a run whose first half was another layout's."""
        whole = self.uninterrupted(saved_by)
        return self._once((saved_by, on), lambda job: keep_one_checkpoint(whole, job.folder, SAVED), on)

    def _once(self, key: tuple[str, ...], prepare: Callable[[Job], None], layout: str) -> Path:
        if key not in self.made:
            job = self.job(" to ".join(key), layout)
            prepare(job)
            finish(job)
            self.made[key] = job.folder
        return self.made[key]

    def saved_again(self, run: Path, layout: str, name: str) -> Path:
        """A run whose checkpoint a layout has loaded, and saved without a step of training."""
        saved = self.folder / f"{name}, saved"
        job = self.job(name, layout, f"train.steps={SAVED}", environment={SAVE_TO: str(saved)})
        keep_one_checkpoint(run, job.folder, SAVED)
        finish(job)
        assert starts(job.folder)[-1] == SAVED
        target = self.folder / f"{name}, run"
        keep_one_checkpoint(run, target, SAVED)
        shutil.rmtree(target / "checkpoints")
        saved.rename(target / "checkpoints")
        return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Nursery() as nursery:
        yield Runs(tmp_path_factory.mktemp("layouts"), nursery)


def rows_of(folder: Path, first: int) -> dict[tuple[int, int], tuple[str, str]]:
    """What the last attempt of a run trained on, from a step on."""
    logs = sorted(folder.with_name(f"{folder.name}, logs").glob("attempt-*"))[-1]
    rows = recorded_rows(logs)
    assert min(step for step, _ in rows) == first, "an attempt trains from where it says"
    return rows


def check_same_future(folder: Path, reference: Path) -> None:
    """Compare all that a continued run reports, reads, draws and keeps with the uninterrupted one's."""
    assert starts(folder) == [0, SAVED]
    ours, theirs = curve(folder), curve(reference)
    assert ours.keys() == theirs.keys() == set(range(STEPS + 1))
    for step in range(SAVED + 1, STEPS + 1):
        assert ours[step].keys() == theirs[step].keys()
        for name in SAME_BITS:
            assert ours[step].get(name) == theirs[step].get(name), (step, name)
        for name in (name for name in CLOSE if name in theirs[step]):
            assert float(ours[step][name]) == pytest.approx(float(theirs[step][name]), rel=1e-5, abs=0), (
                step,
                name,
            )
    assert "val/nelbo" in theirs[8] and "val/nelbo" in theirs[STEPS]
    expected = {key: value for key, value in rows_of(reference, 0).items() if key[0] >= SAVED}
    assert rows_of(folder, SAVED) == expected
    assert len(expected) == (STEPS - SAVED) * 8
    last, twin = (TrainingState.open(run / "checkpoints" / step_name(STEPS)) for run in (folder, reference))
    for name in twin.parameters:
        weights, others = last.full_tensor(name, "master"), twin.full_tensor(name, "master")
        torch.testing.assert_close(weights, others, rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023
        for kind in ("exp_avg", "ema"):
            mine, other = last.full_tensor(name, kind), twin.full_tensor(name, kind)
            assert float((mine - other).norm()) <= 1e-4 * float(other.norm()), (name, kind)


PAIRS = [(layout, "one") for layout in FIRST] + [("one", layout) for layout in FIRST]
REST = (
    [(layout, "one") for layout in LAYOUTS if layout not in FIRST and layout != "one"]
    + [("one", layout) for layout in LAYOUTS if layout not in FIRST and layout != "one"]
    + [
        ("tp2", "pp2"),
        ("pp2", "dp2 zero3"),
        ("dp2 zero3", "tp2 sp"),
        ("tp2 dp2", "tp2 pp2"),
        ("tp2 pp2", "pp2 dp2"),
        ("dp2 zero2", "tp2 zero3"),
    ]
)
EVERY = [pytest.param(*pair, id=" to ".join(pair)) for pair in PAIRS] + [
    pytest.param(*pair, id=" to ".join(pair), marks=pytest.mark.soak) for pair in REST
]


@pytest.mark.parametrize(("saved_by", "on"), EVERY)
def test_a_run_goes_on_under_another_layout_with_the_uninterrupted_losses(
    runs: Runs, saved_by: str, on: str
) -> None:
    check_same_future(runs.continued(saved_by, on), runs.uninterrupted("one"))


def tensors(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Everything of a checkpoint as the serial model has it, by parameter and kind."""
    state = TrainingState.open(checkpoint)
    return {
        (name, kind): state.full_tensor(name, kind)
        for name, parameter in state.parameters.items()
        for kind in parameter.kinds
    }


def tensor_files(checkpoint: Path) -> dict[str, str]:
    """Digests of what the ranks wrote."""
    files = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.startswith("rank-")}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[] if layout in ("tp2", "pp2", "dp2", "dp2 zero3") else pytest.mark.soak)
        for layout in LAYOUTS
        if layout != "one"
    ],
)
def test_a_checkpoint_through_one_process_and_back_keeps_every_bit(runs: Runs, layout: str) -> None:
    run = runs.uninterrupted(layout)
    through_one = runs.saved_again(run, "one", f"{layout} through one")
    there_and_back = runs.saved_again(through_one, layout, f"{layout} and back")
    original, alone, back = (
        folder / "checkpoints" / step_name(SAVED) for folder in (run, through_one, there_and_back)
    )
    saved = tensors(original)
    assert {kind for _, kind in saved} == {"master", "exp_avg", "exp_avg_sq", "ema"}
    for other in (alone, back):
        found = tensors(other)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], saved[key]) for key in saved)
        before, after = TrainingState.open(original).state, TrainingState.open(other).state
        assert {name: after[name] for name in COUNTERS} == {name: before[name] for name in COUNTERS}
        assert after["progress"]["window"] == before["progress"]["window"]
        assert (after["step"], after["adam_step"], after["samples"]) == (SAVED, SAVED, SAVED * 8)
    # The same bytes from every rank, not only the same values.
    assert tensor_files(back) == tensor_files(original)
    assert len(tensor_files(original)) == 2 * LAYOUTS[layout][0]
    assert tensor_files(alone).keys() == {"rank-00000.safetensors", "rank-00000.json"}
