"""Small runs with two re-fits each, made once for all tests that look at them, and what a re-fit left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked_refits import FORK
from kill_trials import Job, curve, finish
from nursery import Nursery, NurseryRank

STEPS, LAG = 16, 4
SNAPSHOTS, ADOPTIONS = (5, 10), (9, 14)
"""A step has 256 tokens; the third re-fit, of step 15, would be due after the last step."""

COMMON = (
    f"train.steps={STEPS}",
    "validation.every_steps=8",
    "validation.sample_tokens=0",
    "checkpoint.every_steps=3",
)
REFIT = (
    "refit.mode=clip",
    "refit.every_tokens=1280",
    f"refit.lag_steps={LAG}",
    "refit.blocks=1024",
    "refit.bootstrap_draws=100",
    # Whatever is better is taken: the second re-fit must have something to do, too.
    "refit.min_gain=0",
)
PROCESS = ("refit.placement=process", "refit.wait=true", "refit.deadline_s=120")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, ("parallel.tp=2",)),
    "pp2": (2, ("parallel.pp=2",)),
    "dp2 zero2": (2, ("parallel.zero_stage=2", "train.micro_batch_size=2", "refit.batch_sequences=8")),
}


@dataclass
class Runs:
    """Runs of this file, each made once, when it is asked for."""

    folder: Path
    nursery: Nursery
    made: dict[str, Path] = field(default_factory=dict)

    def job(self, name: str, *more: str, layout: str = "one", **environment: str) -> Job:
        world, overrides = LAYOUTS[layout]
        return Job(
            self.folder / name,
            self.folder / f"{name}, logs",
            world,
            (*COMMON, *overrides, *more),
            environment={FORK: "1", **environment},
            nursery=self.nursery,
        )

    def once(self, name: str, *more: str, layout: str = "one", **environment: str) -> Path:
        if name not in self.made:
            job = self.job(name, *more, layout=layout, **environment)
            finish(job)
            self.made[name] = job.folder
        return self.made[name]

    @property
    def off(self) -> Path:
        return self.once("off")

    @property
    def process(self) -> Path:
        return self.once("process", *REFIT, *PROCESS)

    @property
    def inline(self) -> Path:
        return self.once("inline", *REFIT, "refit.placement=inline")

    def refit(self, *arguments: object, log: str) -> NurseryRank:
        """``launchers/refit_schedule.py`` by itself."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        command = ["launchers/refit_schedule.py", *map(str, arguments)]
        return self.nursery.start(command, environment=environment, log=self.folder / log)


def step_folder(run: Path, step: int) -> Path:
    return run / "refit" / f"step-{step:09d}"


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "refit" / "history.jsonl").read_text().splitlines()]


def outcomes(run: Path) -> dict[int, str]:
    return {line["snapshot_step"]: line["outcome"] for line in history(run)}


def learned(run: Path) -> dict[int, dict[str, str]]:
    """What training and validation came to, without what is told of re-fits: step -> name -> exact text."""
    kept = {
        step: {name: value for name, value in values.items() if name.split("/")[0] in ("train", "val")}
        for step, values in curve(run).items()
    }
    return {step: values for step, values in kept.items() if values}


def schedule(run: Path, step: int) -> dict[str, Any]:
    """What was decided, without what names the snapshot."""
    record = json.loads((step_folder(run, step) / "schedule.json").read_text())
    return {name: record[name] for name in ("snapshot_step", "based_on", "version", "decisions")}


def last_metric(run: Path, name: str) -> float:
    return float([values[name] for values in curve_of_all(run) if name in values][-1])


def curve_of_all(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [found.get("metrics", found) for found in map(json.loads, lines)]


def console(job: Job) -> str:
    logs = sorted(job.scratch.glob("attempt-*"))[-1]
    return (logs / "rank-0.log").read_text(errors="replace")


def wait_for(condition: Callable[[], object], what: str, limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"no {what} in {limit_s:g} s"
        time.sleep(0.01)
