"""The re-fit as the loop sees it: begun at a step, used at a later one that was fixed in advance.

1. ``begin`` at step S (an epoch's end): all ranks write a snapshot, rank 0 starts a process that fits; or all
   ranks measure at once (inline). Training goes on.
2. ``settle`` at step S + ``refit.lag_steps``: rank 0 reads ``schedule.json``, trusts nothing in it, and tells
   all what becomes of the plan. What is not there by then is not used: two runs of one seed are the same run,
   whatever the machine's speed, as long as re-fits come in time.
3. The outcome is on disk before the first step that depends on it. A run that is continued reads it there.

A re-fit that fails costs the run nothing: the plan stays, and the failure is told and counted. The one
exception is ``RankError``: of several ranks that measure together, one cannot go on.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdtrain.checkpoint.communicator import Communicator
from bdtrain.config import RunConfig
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.tables import loss_scale
from bdtrain.errors import BdtrainError, RankError, RefitError
from bdtrain.refit.history import RefitOutcome, append_outcome
from bdtrain.refit.job import is_at_work
from bdtrain.refit.schedule_file import (
    REPORT_FILE,
    SCHEDULE_FILE,
    check_schedule,
    read_schedule,
)
from bdtrain.refit.snapshot import refit_folder, result_folder, snapshot_digest, snapshot_folder
from bdtrain.train.progress import Progress
from bdtrain.train.refit_child import RefitChild
from bdtrain.train.refit_state import RefitState, load_history, search_metrics

WARN_AFTER = 3
"""Re-fits in a row without a result before the run says so in words of its own."""

TOLD_RESCALING = 0.05
"""A plan that changes the scale of the loss by a larger share is worth a line."""

WAIT_POLL_S = 0.2


@dataclass(frozen=True)
class RefitHooks:
    """What the loop does for a re-fit.

    Attributes:
        snapshot: all ranks: write the weights of this step; raises CheckpointError on all.
        expected: how long a re-fit will take, in words that begin with a comma; empty where unknown.
        measure: all ranks: fit from the weights in memory; rank 0 writes the result into the folder.
        build_objective: the objective of training under a plan.
        tell: says a line on the console.
        event: writes an event of this step.
        write: writes metrics of this step.
        stopping: whether this rank was asked to stop.
    """

    snapshot: Callable[[], None]
    expected: Callable[[], str]
    measure: Callable[[Path, int], None]
    build_objective: Callable[[NoisePlan], Objective]
    tell: Callable[[str], None]
    event: Callable[..., None]
    write: Callable[[dict[str, float]], None]
    stopping: Callable[[], bool]


class ScheduleRefit:
    """The noise plan of a run and its re-fits.

    Args:
        config: the run.
        placement: ``inline``, ``process``, ``ray`` or ``external`` (``settle_placement``).
        run_uid: of the run.
        communicator: all ranks.
        plan: the configuration's plan; None without noise.
        objective: of that plan.
        epoch_samples: rows of an epoch.
        hooks: what the loop does.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        placement: str,
        run_uid: str,
        communicator: Communicator,
        plan: NoisePlan | None,
        objective: Objective,
        epoch_samples: int,
        hooks: RefitHooks,
    ) -> None:
        self.plan, self.objective = plan, objective
        self._config, self._settings, self._placement = config, config.refit, placement
        self._run, self._run_uid, self._communicator = Path(config.run.folder), run_uid, communicator
        self._epoch_samples, self._hooks = epoch_samples, hooks
        self._child: RefitChild | None = None
        self._history: dict[int, RefitOutcome] = {}
        self._state = RefitState(plans=[] if plan is None else [[0, plan.to_dict()]])

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, on every rank.

        A plan that a checkpoint has is the one that goes on, whatever the configuration began with.

        Args:
            saved: ``noise_plan``, ``noise_plan_history`` and ``refit`` of it.
        """
        if self.plan is None:
            return
        # Copied: the checkpoint's record stays what was read.
        known = copy.deepcopy({**(saved.get("refit") or {}), "plans": saved["noise_plan_history"]})
        self._state = RefitState(**{**RefitState().to_dict(), "seen": None, **known})
        self._use(NoisePlan.from_dict(saved["noise_plan"]))
        if self._settings.mode == "off":
            self._state.pending = None
        pending = self._state.pending
        if pending is not None and self._first and pending["snapshot_step"] not in self._history:
            self._restart(pending)

    def read_history(self) -> None:
        """Read what earlier attempts made of their re-fits, on every rank; call it before ``restore``.

        Raises:
            RefitError: if the history is damaged, the same on all ranks.
        """
        self._history = load_history(self._config, self._communicator)

    def at(self, progress: Progress) -> bool:
        """Whatever is due between two steps; every rank calls it with the same progress.

        Returns:
            Whether all is done. False if the run was asked to stop while it waited for a re-fit: no step may
            be taken then, because its plan is not known; the next attempt waits for it.
        """
        if not self._settle_due(progress):
            return False
        if self._is_due(progress):
            self._begin(progress.step)
        # Without a lag the plan is for the next step already.
        return self._settle_due(progress)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the plan, those before it, and the re-fits."""
        return {
            "noise_plan": None if self.plan is None else self.plan.to_dict(),
            "noise_plan_history": [list(entry) for entry in self._state.plans],
            "refit": self._state.to_dict(),
        }

    def close(self) -> None:
        """End a process that is still at work; when the run goes on, its re-fit is begun again."""
        if self._child is not None:
            self._child.kill()

    @property
    def _first(self) -> bool:
        return self._communicator.rank == 0

    def _is_due(self, progress: Progress) -> bool:
        """Whether an epoch, or ``refit.every_tokens``, was completed since the last one."""
        settings = self._settings
        before, now = self._state.seen, {"samples": progress.samples, "tokens": progress.tokens}
        self._state.seen = now
        if settings.mode == "off" or self.plan is None or before is None:
            return False
        if settings.every_tokens is None:
            unit, period = "samples", self._epoch_samples
        else:
            unit, period = "tokens", settings.every_tokens
        return now[unit] // period > before[unit] // period and now["tokens"] >= settings.start_tokens

    def _begin(self, step: int) -> None:
        state, hooks = self._state, self._hooks
        if state.pending is not None:
            state.count("skipped")
            hooks.tell(
                f"re-fit at step {step} skipped: that of step {state.pending['snapshot_step']} is not due"
            )
            return
        pending: dict[str, Any] = {
            "snapshot_step": step,
            "adopt_step": step + self._settings.lag_steps,
            "digest": "",
            "problem": "",
        }
        state.pending = pending
        known = self._history.get(step)
        if known is not None and known.adopt_step == pending["adopt_step"]:
            return  # its outcome is known
        try:
            hooks.tell(
                f"re-fit begun at step {step} ({self._placement}{hooks.expected()}); its plan is due at step "
                f"{pending['adopt_step']}"
            )
            if self._placement == "inline":
                hooks.measure(result_folder(self._run, step), state.version + 1)
            else:
                hooks.snapshot()
                self._start(pending)
        except RankError:
            raise  # the other ranks are not here
        except (BdtrainError, OSError) as error:
            # Told when it would have taken effect: until then nothing changes.
            pending["problem"] = str(error)
        hooks.event("refit_begun", snapshot_step=step, adopt_step=pending["adopt_step"])

    def _start(self, pending: dict[str, Any]) -> None:
        """Start what fits the snapshot, on rank 0; all ranks learn the snapshot's digest, or the problem."""
        step, told = pending["snapshot_step"], {}
        if self._first:
            try:
                told["digest"] = snapshot_digest(snapshot_folder(self._run, step))
                self._forget_other(result_folder(self._run, step) / SCHEDULE_FILE, told["digest"])
                if self._placement != "external":
                    self._child = self._make_child(step)
                    self._child.start(os.environ)
            except OSError as error:
                # The other ranks wait below.
                told["problem"] = str(error)
        pending.update(self._communicator.broadcast_object(told))

    def _restart(self, pending: Mapping[str, Any]) -> None:
        """Begin a pending re-fit again, on rank 0; an earlier attempt's may have finished meanwhile."""
        step = pending["snapshot_step"]
        folder = result_folder(self._run, step)
        if self._placement in ("inline", "external") or (folder / SCHEDULE_FILE).exists():
            return
        self._child = self._make_child(step)
        self._child.start(os.environ)

    def _make_child(self, step: int) -> RefitChild:
        folder, settings = result_folder(self._run, step), self._settings
        return RefitChild(
            self._run, step=step, folder=folder, gpus=settings.worker_gpus > 0, reserved=settings.gpu
        )

    @staticmethod
    def _forget_other(path: Path, digest: str) -> None:
        """Remove a schedule of another snapshot of the same step."""
        try:
            if read_schedule(path).snapshot_sha256 == digest:
                return
        except RefitError:
            pass
        path.unlink(missing_ok=True)

    def _settle_due(self, progress: Progress) -> bool:
        """Decide on rank 0 what becomes of a plan that is due, and do it on all; False if stopped before."""
        pending = self._state.pending
        if pending is None or progress.step < pending["adopt_step"]:
            return True
        known = self._history.get(pending["snapshot_step"])
        if known is not None and known.adopt_step != pending["adopt_step"]:
            known = None
        outcome = known
        if outcome is None:
            if not self._wait(pending):
                return False
            record = self._decide(pending).to_dict() if self._first else None
            outcome = RefitOutcome.from_dict(self._communicator.broadcast_object(record))
        self._apply(outcome)
        self._tell(outcome, replayed=known is not None)
        return True

    def _apply(self, outcome: RefitOutcome) -> None:
        state = self._state
        state.pending, state.version = None, outcome.version
        state.count(outcome.outcome)
        good = outcome.outcome in ("adopted", "kept")
        state.failures_in_a_row = 0 if good else state.failures_in_a_row + 1
        if outcome.outcome == "adopted":
            self._use(outcome.plan)
            state.plans.append([outcome.adopt_step, outcome.plan.to_dict()])

    def _use(self, plan: NoisePlan) -> None:
        if plan != self.plan:
            self.plan, self.objective = plan, self._hooks.build_objective(plan)

    def _tell(self, outcome: RefitOutcome, *, replayed: bool) -> None:
        state, hooks = self._state, self._hooks
        words = " (as before the restart)" if replayed else ""
        hooks.tell(f"re-fit of step {outcome.snapshot_step}: {outcome.outcome}{words}: {outcome.reason}")
        rescaled = abs(outcome.loss_scale - 1.0) > TOLD_RESCALING
        if rescaled:
            hooks.tell(
                f"from step {outcome.adopt_step} on the loss has {outcome.loss_scale:.3g} times its scale: "
                f"the range is new, and diffusion.plan.weighting={outcome.plan.weighting}; gradient clipping "
                "and Adam see a jump, weighting=reference keeps the scale"
            )
        if state.failures_in_a_row == WARN_AFTER:
            log = result_folder(self._run, outcome.snapshot_step)
            hooks.tell(
                f"warning: {WARN_AFTER} re-fits in a row had no result; training goes on with the plan it "
                f"has. See {log}"
            )
        hooks.event(
            "refit",
            snapshot_step=outcome.snapshot_step,
            outcome=outcome.outcome,
            reason=outcome.reason,
            version=outcome.version,
            replayed=replayed,
            **({"loss_scale": outcome.loss_scale} if rescaled else {}),
        )
        assert self.plan is not None
        beta, omega = self.plan.interval
        values = {
            "sched/version": outcome.version,
            "sched/beta": beta,
            "sched/omega": omega,
            **outcome.metrics,
            "fault/refits_failed": state.counts.get("failed", 0) + state.counts.get("rejected", 0),
            "fault/refits_late": state.counts.get("late", 0),
            "fault/refits_skipped": state.counts.get("skipped", 0),
        }
        hooks.write(values)

    def _decide(self, pending: Mapping[str, Any]) -> RefitOutcome:
        """What a re-fit came to, on rank 0. The child is over afterwards, and the outcome on disk."""
        assert self.plan is not None
        kept = RefitOutcome(
            snapshot_step=pending["snapshot_step"],
            adopt_step=pending["adopt_step"],
            outcome="failed",
            reason=str(pending.get("problem", "")),
            version=self._state.version,
            plan=self.plan,
        )
        try:
            outcome = kept if kept.reason else self._judge(pending, kept)
        except OSError as error:
            # A network disk may refuse even to look; the other ranks wait for an answer.
            why = f"its schedule could not be looked for ({error.strerror or error})"
            outcome = replace(kept, reason=why)
        self._tell_missing_gradients(outcome)
        if self._child is not None:
            self._child.kill()
            self._child = None
        try:
            append_outcome(refit_folder(self._run), outcome)
        except OSError as error:
            # A plan that a restart would not find must not be used.
            why = f"its outcome could not be written ({error.strerror or error})"
            return replace(kept, reason=why)
        return outcome

    def _tell_missing_gradients(self, outcome: RefitOutcome) -> None:
        """Say that a plan comes without its gradients, where nothing else says it."""
        asked = self._settings.gradient_variance and outcome.outcome in ("adopted", "kept")
        if not asked or "sched/gradient_variance" in outcome.metrics or self._placement == "inline":
            return
        child = self._child
        # What an earlier attempt left at work, or a watcher, counts, too.
        if (child is not None and child.running) or is_at_work(
            result_folder(self._run, outcome.snapshot_step)
        ):
            advice = "give them a larger refit.lag_steps" + (", or refit.wait=true" if child else "")
        elif child is None and self._placement != "external":
            # The schedule was there when the run was continued: nobody was started for the rest.
            advice = "the attempt that began them is over"
        else:
            return  # they failed, and who made them said why
        self._hooks.tell(
            f"re-fit of step {outcome.snapshot_step}: its gradients were not done in time and are left out; "
            f"{advice}"
        )

    def _judge(self, pending: Mapping[str, Any], kept: RefitOutcome) -> RefitOutcome:
        folder = result_folder(self._run, pending["snapshot_step"])
        path = folder / SCHEDULE_FILE
        if not path.exists():
            child = self._child
            if child is None or child.running or is_at_work(folder):
                lag = self._settings.lag_steps
                return replace(kept, outcome="late", reason=f"no schedule after {lag} steps; the plan stays")
            return replace(kept, reason=child.problem() or "its process ended and left no schedule")
        try:
            decision = check_schedule(
                read_schedule(path),
                run_uid=self._run_uid,
                snapshot_step=pending["snapshot_step"],
                snapshot_sha256=pending["digest"],
                version=self._state.version + 1,
                current=kept.plan,
            )
            # What cannot be built here must not be told to the others.
            self._hooks.build_objective(decision.plan)
        except BdtrainError as error:
            return replace(kept, outcome="rejected", reason=str(error))
        if decision.adopt and not self._settings.adopt:
            # Made by somebody else, with settings of their own.
            return replace(
                kept, outcome="rejected", reason=f"{path} changes the plan, and refit.adopt=false keeps it"
            )
        return replace(
            kept,
            outcome="adopted" if decision.adopt else "kept",
            reason=decision.reason,
            version=self._state.version + 1,
            plan=decision.plan,
            metrics=search_metrics(folder / REPORT_FILE, decision.plan.block_size),
            loss_scale=loss_scale(decision.plan) / loss_scale(kept.plan) if decision.adopt else 1.0,
        )

    def _wait(self, pending: Mapping[str, Any]) -> bool:
        """With ``refit.wait``: let all ranks wait for the schedule, or for the end of what makes it.

        They meet at every look: a wait of any length is shorter than what a collective may take, and a rank
        that is asked to stop tells the others.

        Returns:
            False if a rank was asked to stop.
        """
        if not self._settings.wait:
            return True
        folder = result_folder(self._run, pending["snapshot_step"])
        end = time.monotonic() + self._settings.deadline_s
        while True:
            coming = self._first and time.monotonic() < end and self._is_coming(folder)
            looks = self._communicator.gather_objects([coming, self._hooks.stopping()])
            if not looks[0][0]:
                return True
            if any(stopping for _, stopping in looks):
                return False
            time.sleep(WAIT_POLL_S)

    def _is_coming(self, folder: Path) -> bool:
        """Whether something is not there and may still come: an earlier attempt's child counts, too."""
        if self._child is None:
            return False
        try:
            # Gradients follow the schedule, from the same process.
            missing = self._settings.gradient_variance or not (folder / SCHEDULE_FILE).exists()
            return missing and (self._child.running or is_at_work(folder))
        except OSError:
            return False
