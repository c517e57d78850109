"""The command of a re-fit: one snapshot of a run, every new one of a run that is at work, or a sweep.

``launchers/refit_schedule.py`` is its command line for people; the trainer starts it as a module.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bdtrain.config import RunConfig, load_config, positive_int
from bdtrain.config.refit_rules import refit_without_effect
from bdtrain.config.schema import RefitConfig
from bdtrain.config.sources import read_overrides
from bdtrain.errors import BdtrainError, RefitError, report_failure

DESCRIPTION = "Fit the noise plan of a run again to what its model has learned."

EXAMPLES = """\
examples:
  %(prog)s --run runs/books/run              the newest snapshot of a run
  %(prog)s --run runs/books/run --watch      every new one, until the run ends (placement: external)
  %(prog)s --checkpoint runs/books/run/checkpoint --out runs/books/ranges --block-sizes 4,16
  ray job submit -- python launchers/refit_schedule.py --run /shared/run refit.placement=ray \\
      refit.ray_address=auto

Settings are those of the run; refit.KEY=VALUE replaces one.
"""

POLL_S = 5.0


def main(arguments: list[str]) -> int:
    """Do it.

    Returns:
        The exit code: 0 done, 3 wrong settings, 6 data, 7 a damaged snapshot, 8 no result.
    """
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of a run; results go to its refit/step-N")
    parser.add_argument("--step", type=positive_int, help="snapshot of the run; the newest if left out")
    parser.add_argument(
        "--watch", action="store_true", help="go on with every new snapshot until the run ends"
    )
    parser.add_argument("--checkpoint", type=Path, action="append", help="any saved model, instead of a run")
    parser.add_argument("--out", type=Path, help="where the results of --checkpoint go")
    parser.add_argument(
        "--data", type=Path, help="corpus whose valid split is measured; the run's if left out"
    )
    parser.add_argument("--block-sizes", help="block sizes to fit a plan for, 4,16; the run's if left out")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where blocks are measured; cuda with refit.worker_gpus"
    )
    parser.add_argument("--nice", type=int, default=0, help="lower the priority of this process, 0 to 19")
    parser.add_argument("overrides", nargs="*", metavar="refit.KEY=VALUE", help="settings of the re-fit")
    options = parser.parse_args(arguments)
    try:
        if options.nice:
            os.nice(options.nice)
        _check(options)
        if options.watch:
            return _watch(options)
        for snapshot, folder in _tasks(options):
            _refit(snapshot, folder, options)
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error)
    return 0


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
    if options.watch and options.step is not None:
        raise RefitError("--watch takes every snapshot; leave --step out")
    wrong = [text for text in options.overrides if not text.startswith("refit.")]
    if wrong:
        raise RefitError(f"{', '.join(wrong)}: only settings of the section refit can be given here")


def _tasks(options: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Snapshots, and the folders of their results.

    Raises:
        RefitError: if there is no snapshot.
    """
    # Names of folders only: torch is imported for a task that exists.
    from bdtrain.checkpoint.folders import list_checkpoints
    from bdtrain.refit.snapshot import result_folder, snapshot_folder, snapshots_folder

    if options.checkpoint is not None:
        single = len(options.checkpoint) == 1
        return [
            (place, options.out if single else options.out / "-".join(place.resolve().parts[-3:]))
            for place in options.checkpoint
        ]
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
    return [(snapshot_folder(options.run, step), result_folder(options.run, step))]


def _refit(snapshot: Path, folder: Path, options: argparse.Namespace) -> None:
    """Make one re-fit and say what came of it."""
    from bdtrain.checkpoint.folders import CONFIG
    from bdtrain.checkpoint.manifest import verify_folder
    from bdtrain.refit.backends import choose_measure

    verify_folder(snapshot)
    config = _configured(snapshot / CONFIG, options.overrides)
    measure = choose_measure(config)
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
    while True:
        # Asked first: what was written before the end is still seen below.
        ended = (options.run / EXIT_FILE).exists()
        for step, snapshot in list_checkpoints(snapshots_folder(options.run)):
            folder = result_folder(options.run, step)
            if step in tried or (folder / SCHEDULE_FILE).exists():
                continue
            tried.add(step)
            try:
                _refit(snapshot, folder, options)
            except (BdtrainError, OSError) as error:
                report_failure(error)
        if ended:
            return 0
        time.sleep(POLL_S)


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
