"""A run that takes steps and re-fits and does nothing else: no model, no process, no clock."""

import json
from types import SimpleNamespace
from typing import ClassVar

from bdtrain.checkpoint.communicator import OneProcess
from bdtrain.config import RunConfig
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.refit.history import read_history
from bdtrain.refit.schedule_file import Decision, Schedule, plan_digest, write_schedule
from bdtrain.refit.snapshot import refit_folder, result_folder, snapshot_digest, snapshot_folder
from bdtrain.testing import tiny_model_config
from bdtrain.train.refit import RefitHooks, ScheduleRefit

ROWS, SEQ = 8, 32
EPOCH = 5 * ROWS
PLAN = NoisePlan(4)
BETTER = NoisePlan(4, clip_range=(0.45, 0.95))
BEST = NoisePlan(4, clip_range=(0.5, 1.0))


class FakeChild:
    """A process that is at work until somebody says otherwise."""

    made: ClassVar[list["FakeChild"]] = []

    def __init__(self, run, *, step, folder, gpus=False, reserved=None):
        self.step, self.folder, self.gpus, self.reserved = step, folder, gpus, reserved
        self.running, self.killed, self.trouble = False, False, ""
        self.folder.mkdir(parents=True, exist_ok=True)
        FakeChild.made.append(self)

    def start(self, environment):
        self.running = True

    def problem(self):
        return self.trouble

    def kill(self):
        self.running, self.killed = False, True

    def end(self, trouble=""):
        self.running, self.trouble = False, trouble


class Run:
    """A run of one process that takes steps and does nothing else."""

    def __init__(self, folder, *, placement="process", uid="run-1", communicator=None, **settings):
        self.folder, self.uid, self.step = folder, uid, 0
        self.lines, self.events, self.written, self.built, self.snapshots = [], [], [], [], []
        self.snapshot_error = self.measure_error = None
        self.stopping = False
        self.config = RunConfig.model_validate(
            {
                "run": {"folder": str(folder)},
                "model": tiny_model_config(),
                "data": {"kind": "synthetic", "seq_len": SEQ},
                "diffusion": {"block_size": 4},
                "train": {"steps": 1000, "global_batch_size": ROWS},
                "refit": {"mode": "clip", "placement": placement, "lag_steps": 3, **settings},
            }
        )
        self.refit = ScheduleRefit(
            self.config,
            placement=placement,
            run_uid=uid,
            communicator=communicator or OneProcess(),
            plan=PLAN,
            objective="objective of the configuration",
            epoch_samples=EPOCH,
            hooks=RefitHooks(
                expected=lambda: "",
                snapshot=self._snapshot,
                measure=self._measure,
                build_objective=self._build,
                tell=self.lines.append,
                event=lambda name, **facts: self.events.append((self.step, name, facts)),
                write=lambda values: self.written.append((self.step, dict(values))),
                stopping=lambda: self.stopping,
            ),
        )

    def _snapshot(self):
        if self.snapshot_error is not None:
            raise self.snapshot_error
        folder = snapshot_folder(self.folder, self.step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "MANIFEST.json").write_text(f"weights of step {self.step}")
        self.snapshots.append(self.step)

    def _measure(self, results, version):
        if self.measure_error is not None:
            raise self.measure_error
        self.publish(self.step, version=version, digest="")

    def _build(self, plan):
        self.built.append(plan)
        return ("objective", plan)

    @property
    def state(self):
        return self.refit.state()

    @property
    def counts(self):
        return self.state["refit"]["counts"]

    @property
    def pending(self):
        return self.state["refit"]["pending"]

    def at(self, step):
        """The loop before the step after ``step``."""
        self.step = step
        return self.refit.at(SimpleNamespace(step=step, samples=step * ROWS, tokens=step * ROWS * SEQ))

    def steps(self, first, last):
        for step in range(first, last + 1):
            self.at(step)

    def publish(
        self, step, plan=BETTER, *, version=None, digest=None, current=None, adopt=True, reason="better"
    ):
        """What a re-fit of a step would write."""
        manifest = snapshot_folder(self.folder, step) / "MANIFEST.json"
        found = snapshot_digest(manifest.parent) if digest is None else digest
        schedule = Schedule(
            run_uid=self.uid,
            snapshot_step=step,
            snapshot_sha256=found,
            based_on=plan_digest(current or self.refit.plan),
            version=self.state["refit"]["version"] + 1 if version is None else version,
            decisions={4: Decision(plan, adopt, reason)},
        )
        folder = result_folder(self.folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        write_schedule(folder, schedule)

    def history(self):
        return {step: found.outcome for step, found in read_history(refit_folder(self.folder)).items()}

    def continued(self, saved, **settings):
        """The same run after a restart from a checkpoint's state."""
        other = Run(self.folder, placement=self.refit._placement, uid=self.uid, **settings)
        other.refit.read_history()
        other.refit.restore(json.loads(json.dumps(saved)))
        return other


def begun(run):
    return [facts["snapshot_step"] for _, name, facts in run.events if name == "refit_begun"]
