"""The command of a re-fit: one snapshot of a run, every new one of a run that is at work, or a sweep.

``launchers/refit_schedule.py`` is its command line for people; the trainer starts it as a module.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from bdtrain.config import RunConfig, load_config, positive_int
from bdtrain.config.refit_rules import refit_without_effect
from bdtrain.config.schema import RefitConfig
from bdtrain.config.sources import read_overrides
from bdtrain.errors import BdtrainError, RefitError, report_failure

if TYPE_CHECKING:
    from bdtrain.refit.job import Refit
    from bdtrain.refit.ray_backend import SharedSession

DESCRIPTION = "Fit the noise plan of a run again to what its model has learned."

EXAMPLES = """\
examples:
  %(prog)s --run runs/books/run              the newest snapshot of a run
  %(prog)s --run runs/books/run --watch      every new one, until the run ends (placement: external)
  %(prog)s --checkpoint runs/books/run/checkpoint --out runs/books/ranges --block-sizes 4,16
  ray job submit -- python launchers/refit_schedule.py --run /shared/run refit.placement=ray \\
      refit.ray_address=auto
  a sweep, all of it in one session of Ray, a table in OUT/sweep.json and nested runs in MLflow:
  %(prog)s --checkpoint RUN/checkpoints/step-000001000 --checkpoint RUN/checkpoints/step-000002000 \\
      --out OUT --block-sizes 4,16 --mlflow-uri http://127.0.0.1:5000 refit.placement=ray

Settings are those of the run; refit.KEY=VALUE replaces one. A checkpoint of a sweep that fails is told, the
others are made, and the exit code is that of the first failure.
"""

POLL_S = 5.0
GRACE_S = 60.0
"""What a process is given beyond its own deadline, and to end when it is asked to."""


def main(arguments: list[str]) -> int:
    """Do it.

    Returns:
        The exit code: 0 done, 3 wrong settings, 6 data, 7 a damaged snapshot, 8 no result.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.nice:
            os.nice(options.nice)
        _check(options)
        if options.watch:
            return _watch(options)
        if options.checkpoint is not None:
            return _sweep(options)
        _refit(*_snapshot(options), options)
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of a run; results go to its refit/step-N")
    parser.add_argument("--step", type=positive_int, help="snapshot of the run; the newest if left out")
    parser.add_argument(
        "--watch", action="store_true", help="go on with every new snapshot until the run ends"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        help="any saved model, instead of a run; several are a sweep, one after another",
    )
    parser.add_argument(
        "--out", type=Path, help="where the results of --checkpoint go: sweep.json, and a folder for each"
    )
    parser.add_argument(
        "--data", type=Path, help="corpus whose valid split is measured; the run's if left out"
    )
    parser.add_argument("--block-sizes", help="block sizes to fit a plan for, 4,16; the run's if left out")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where blocks are measured; cuda with refit.worker_gpus"
    )
    parser.add_argument(
        "--mlflow-uri",
        metavar="URI",
        help="MLflow store that gets a run of the sweep, with one nested run for each checkpoint and block "
        "size; credentials go into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )
    parser.add_argument("--nice", type=int, default=0, help="lower the priority of this process, 0 to 19")
    parser.add_argument("overrides", nargs="*", metavar="refit.KEY=VALUE", help="settings of the re-fit")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        RefitError: naming the arguments.
    """
    if (options.run is None) == (options.checkpoint is None):
        raise RefitError("give either --run RUN or --checkpoint FOLDER (with --out FOLDER)")
    if options.run is None and (options.watch or options.step is not None):
        raise RefitError("--watch and --step belong to --run; leave them out with --checkpoint")
    if (options.out is None) != (options.checkpoint is None):
        raise RefitError("--out says where the results of --checkpoint go; give both or neither")
    if options.mlflow_uri is not None and options.checkpoint is None:
        raise RefitError(
            "--mlflow-uri shows a sweep and belongs to --checkpoint; the re-fits of a run are shown with it"
        )
    if options.watch and options.step is not None:
        raise RefitError("--watch takes every snapshot; leave --step out")
    wrong = [text for text in options.overrides if not text.startswith("refit.")]
    if wrong:
        raise RefitError(f"{', '.join(wrong)}: only settings of the section refit can be given here")


def _snapshot(options: argparse.Namespace) -> tuple[Path, Path]:
    """The snapshot of a run that is asked for, and the folder of its results.

    Raises:
        RefitError: if there is no snapshot.
    """
    # Names of folders only: torch is imported for a task that exists.
    from bdtrain.checkpoint.folders import list_checkpoints
    from bdtrain.refit.snapshot import result_folder, snapshot_folder, snapshots_folder

    if options.step is not None:
        step = options.step
    else:
        found = list_checkpoints(snapshots_folder(options.run))
        if not found:
            raise RefitError(
                f"{snapshots_folder(options.run)} holds no snapshot; a run with refit.mode=clip or counts "
                "writes one at each epoch, or give --checkpoint FOLDER --out FOLDER"
            )
        step = found[-1][0]
    return snapshot_folder(options.run, step), result_folder(options.run, step)


def _sweep(options: argparse.Namespace) -> int:
    """Re-fit saved models, on Ray all of them in one session."""
    from bdtrain.refit.ray_backend import SharedSession
    from bdtrain.refit.sweep import run_sweep

    with SharedSession() as shared:
        return run_sweep(
            options.checkpoint,
            options.out,
            lambda checkpoint, folder: _refit(checkpoint, folder, options, shared),
            mlflow_uri=options.mlflow_uri,
        )


def _refit(
    snapshot: Path, folder: Path, options: argparse.Namespace, shared: SharedSession | None = None
) -> Refit:
    """Make one re-fit and say what came of it."""
    from bdtrain.checkpoint.folders import CONFIG
    from bdtrain.checkpoint.manifest import verify_folder
    from bdtrain.refit.backends import choose_measure

    verify_folder(snapshot)
    config = _configured(snapshot / CONFIG, options.overrides)
    measure = choose_measure(config, shared)
    sizes = tuple(_sizes(options.block_sizes))
    with _deadline(config):
        from bdtrain.refit.job import run_refit

        refit = run_refit(
            snapshot,
            folder,
            measure=measure,
            config=config,
            block_sizes=sizes,
            device=options.device or ("cuda" if config.refit.worker_gpus else "cpu"),
            data_path=None if options.data is None else str(options.data),
        )
    print(refit.describe())
    print(f"wrote {refit.folder}", flush=True)
    return refit


def _configured(path: Path, overrides: Sequence[str]) -> RunConfig:
    """A run's configuration with other settings of the re-fit.

    A resolved configuration names every setting that had an effect in the run. Those that have none under the
    new settings are dropped; only what is given here must have one.

    Raises:
        ConfigError: for a setting that is unknown, wrong, or without effect.
    """
    given = {key: origin.value for layer in read_overrides(overrides) for key, origin in layer.values.items()}
    own = {key.removeprefix("refit."): value for key, value in given.items()}
    config = load_config([path]).config
    try:
        refit = RefitConfig.model_validate({**config.refit.model_dump(), **own})
    except ValueError:
        return load_config([path], overrides).config  # which says what is wrong
    changed = config.model_copy(update={"refit": refit})
    idle = {key for _, _, keys in refit_without_effect(changed) for key in keys} - set(given)
    return load_config([path], [*overrides, *(f"{key}=null" for key in sorted(idle))]).config


def _sizes(text: str | None) -> list[int]:
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RefitError(f"--block-sizes {text}: give whole numbers with commas, for example 4,16") from error


def _watch(options: argparse.Namespace) -> int:
    """Re-fit every snapshot of a run that has no schedule yet, until the run has ended.

    A re-fit that fails is told and not tried again: the trainer keeps its plan.
    """
    from bdtrain.checkpoint.folders import list_checkpoints
    from bdtrain.refit.schedule_file import SCHEDULE_FILE
    from bdtrain.refit.snapshot import result_folder, snapshots_folder
    from bdtrain.tracking.run_files import EXIT_FILE

    tried: set[int] = set()
    with _exit_on_request():
        while True:
            # Asked first: what was written before the end is still seen below.
            ended = (options.run / EXIT_FILE).exists()
            for step, snapshot in list_checkpoints(snapshots_folder(options.run)):
                folder = result_folder(options.run, step)
                if step in tried or (folder / SCHEDULE_FILE).exists():
                    continue
                tried.add(step)
                try:
                    _refit_apart(snapshot, step, options)
                except (BdtrainError, OSError) as error:
                    report_failure(error)
            if ended:
                return 0
            time.sleep(POLL_S)


@contextlib.contextmanager
def _exit_on_request() -> Iterator[None]:
    """Turn SIGTERM into an exception: who is asked to end takes its child along."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _refit_apart(snapshot: Path, step: int, options: argparse.Namespace) -> None:
    """Make one re-fit of a run in a process of its own: one that hangs ends alone.

    Raises:
        RefitError: if it did not end by itself; what else went wrong it has told.
        ConfigError: if its settings are wrong.
    """
    from bdtrain.checkpoint.folders import CONFIG
    from bdtrain.tracking.child import child_environment

    limit_s = _configured(snapshot / CONFIG, options.overrides).refit.deadline_s + GRACE_S
    process = subprocess.Popen(
        _command(step, options),
        stdin=subprocess.DEVNULL,
        env=child_environment(os.environ, gpus=True),
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise RefitError(
            f"the re-fit of step {step} did not end at its deadline (refit.deadline_s) and was killed"
        ) from error
    finally:
        _end(process)
    if code < 0:
        raise RefitError(f"the re-fit of step {step} was ended by {signal.Signals(-code).name}")


def _command(step: int, options: argparse.Namespace) -> list[str]:
    """What makes one re-fit of the run with the same settings."""
    words = ["--run", str(options.run), "--step", str(step)]
    for name in ("data", "block_sizes", "device"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    # -P: a file of the user's working folder must not hide a library.
    return [sys.executable, "-P", "-m", "bdtrain.refit", *words, *options.overrides]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs: asked first, because its Ray has things to put away."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    if process.poll() is None:
        process.kill()
    process.wait()


class _deadline:  # noqa: N801 - used as a function
    """End this process when a re-fit takes longer than ``refit.deadline_s``."""

    def __init__(self, config: RunConfig) -> None:
        self._limit_s = config.refit.deadline_s
        self._timer = threading.Timer(self._limit_s, self._end)
        self._timer.daemon = True

    def _end(self) -> None:
        print(
            f"error: the re-fit took longer than refit.deadline_s={self._limit_s:g}; nothing was written",
            file=sys.stderr,
            flush=True,
        )
        # What hangs in a library does not hear an exception.
        os._exit(RefitError.exit_code)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
