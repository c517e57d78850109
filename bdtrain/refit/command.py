"""The command of a re-fit: one snapshot of a run, every new one of a run that is at work, or a sweep.

``launchers/refit_schedule.py`` is its command line for people; the trainer starts it as a module.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdtrain.config import RunConfig, load_config, positive_int
from bdtrain.config.refit_rules import known_placement, refit_without_effect
from bdtrain.config.schema import RefitConfig
from bdtrain.config.sources import read_overrides
from bdtrain.errors import BdtrainError, ConfigError, RefitError, report_failure
from bdtrain.refit.apart import GRACE_S, exit_on_request, refit_command, run_apart
from bdtrain.refit.deadline import deadline

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

Settings are those of the run; refit.KEY=VALUE replaces one. A checkpoint of a sweep that fails, or takes
longer than refit.deadline_s, is told, the others are made, and the exit code is that of the first failure.
On Ray, one that hangs in a library and hears no error ends the sweep.
"""

POLL_S = 5.0


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
        if options.one_of_sweep:
            _refit(options.checkpoint[0], options.out, options)
        elif options.checkpoint is not None:
            return _sweep(options)
        else:
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
    # For the processes of a sweep: the table is the sweep's.
    parser.add_argument("--one-of-sweep", action="store_true", help=argparse.SUPPRESS)
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
    if any(text.startswith("refit.gpu=") and text != "refit.gpu=null" for text in options.overrides):
        raise RefitError(
            "refit.gpu says which GPU a trainer leaves to the process that it starts; here, give "
            "CUDA_VISIBLE_DEVICES in the environment, and --device cuda"
        )


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
    """Re-fit saved models: on Ray all of them in one session, else each in a process of its own."""
    from bdtrain.refit.ray_backend import SharedSession
    from bdtrain.refit.sweep import run_sweep

    alone = len(options.checkpoint) == 1

    def refit(checkpoint: Path, folder: Path) -> None:
        if alone or _wants_ray(checkpoint, options):
            _refit(checkpoint, folder, options, shared)
        else:
            words = ["--one-of-sweep", "--checkpoint", str(checkpoint), "--out", str(folder)]
            _refit_apart(words, str(checkpoint), checkpoint, options)

    with SharedSession() as shared, exit_on_request():
        return run_sweep(options.checkpoint, options.out, refit, mlflow_uri=options.mlflow_uri)


def _wants_ray(checkpoint: Path, options: argparse.Namespace) -> bool:
    """Whether a checkpoint is measured on Ray."""
    from bdtrain.checkpoint.folders import CONFIG
    from bdtrain.checkpoint.manifest import verify_file
    from bdtrain.refit.backends import choose_measure
    from bdtrain.refit.job import measure_here

    config = _configured(verify_file(checkpoint, CONFIG), options.overrides)
    return choose_measure(config) is not measure_here


def _refit(
    snapshot: Path, folder: Path, options: argparse.Namespace, shared: SharedSession | None = None
) -> None:
    """Make one re-fit and say what came of it."""
    from bdtrain.checkpoint.folders import CONFIG
    from bdtrain.checkpoint.manifest import verify_file
    from bdtrain.refit.backends import choose_measure

    # The weights are compared by who opens them.
    config = _configured(verify_file(snapshot, CONFIG), options.overrides)
    measure = choose_measure(config, shared)
    sizes = tuple(_sizes(options.block_sizes))
    refit: Refit | None = None
    alone = options.checkpoint is None or options.one_of_sweep
    with deadline(config.refit.deadline_s, folder, alone=alone):
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
    if refit is not None:
        print(refit.describe())
    print(f"wrote {folder}", flush=True)


def _configured(path: Path, overrides: Sequence[str]) -> RunConfig:
    """A run's configuration with other settings of the re-fit.

    A resolved configuration names every setting that had an effect in the run. Those that have none under the
    new settings are dropped; only what is given here must have one. A run that makes no re-fits itself is
    searched as with ``refit.mode=clip``, and all rules of that hold.

    Raises:
        ConfigError: for a setting that is unknown, wrong, or without effect.
    """
    given = {key: origin.value for layer in read_overrides(overrides) for key, origin in layer.values.items()}
    own = {key.removeprefix("refit."): value for key, value in given.items()}
    config = load_config([path]).config
    values = {**config.refit.model_dump(), **own}
    try:
        # null takes a value back: the default counts.
        refit = RefitConfig.model_validate({key: one for key, one in values.items() if one is not None})
    except ValueError:
        return load_config([path], overrides).config  # which says what is wrong
    words = list(overrides)
    # What draws no noise is refused by who reads its plan.
    searches = refit.mode == "off" and config.diffusion.algo != "ar"
    if searches:
        refit = refit.model_copy(update={"mode": "clip"})
        words = [*(text for text in words if not text.startswith("refit.mode=")), "refit.mode=clip"]
    idle = _idle(config.model_copy(update={"refit": refit}), given, dormant=config.refit.mode == "off")
    try:
        return load_config([path], [*words, *(f"{key}=null" for key in idle)]).config
    except ConfigError as error:
        if not searches:
            raise
        raise ConfigError(
            f"{error}\nthe run has refit.mode=off, and by hand it is searched as with refit.mode=clip; the "
            "other choice is refit.mode=counts"
        ) from error


def _idle(config: RunConfig, given: Collection[str], *, dormant: bool) -> list[str]:
    """Settings of the run that mean nothing to a re-fit by hand, or under what is given for it.

    Args:
        config: of the run, with what is given.
        given: keys of that.
        dormant: whether the run makes no re-fits, so that nothing checked its settings of them.
    """
    refit = config.refit
    # When a plan is used is the trainer's business: nothing comes too late here.
    idle = {"refit.lag_steps", "refit.wait"}
    placement = known_placement(refit)
    if (dormant or placement != "process") and "refit.gpu" not in given:
        # The trainer's, too: CUDA_VISIBLE_DEVICES says which GPU it is.
        idle.add("refit.gpu")
        refit = refit.model_copy(update={"gpu": None})
    elsewhere = not {"refit.placement", "refit.ray_address"}.isdisjoint(given)
    if placement != "ray" and (dormant or elsewhere):
        idle |= {"refit.worker_tp", "refit.worker_gpus"}
    changed = config.model_copy(update={"refit": refit})
    return sorted(idle.union(*(keys for _, _, keys in refit_without_effect(changed))) - set(given))


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
    from bdtrain.refit.snapshot import result_folder, snapshot_digest, snapshots_folder
    from bdtrain.tracking.run_files import EXIT_FILE

    tried: set[tuple[int, str]] = set()
    with exit_on_request():
        while True:
            # Asked first: what was written before the end is still seen below.
            ended = (options.run / EXIT_FILE).exists()
            for step, snapshot in list_checkpoints(snapshots_folder(options.run)):
                folder = result_folder(options.run, step)
                try:
                    try:
                        # A run that begins anew comes to the same step with another snapshot.
                        this = step, snapshot_digest(snapshot)
                    except FileNotFoundError:
                        continue  # deleted this moment: it is an old one
                    if this in tried or (folder / SCHEDULE_FILE).exists():
                        continue
                    tried.add(this)
                    words = ["--run", str(options.run), "--step", str(step)]
                    _refit_apart(words, f"step {step}", snapshot, options)
                except (BdtrainError, OSError) as error:
                    report_failure(error)
            if ended:
                return 0
            time.sleep(POLL_S)


def _refit_apart(words: Sequence[str], what: str, snapshot: Path, options: argparse.Namespace) -> None:
    """Make one re-fit in a process of its own, with the same settings.

    Args:
        words: which one, as arguments.
        what: it is, for messages.
        snapshot: that it measures.
        options: the rest.

    Raises:
        ApartError: if it failed.
        CheckpointError: if there is no snapshot.
        ConfigError: if its settings are wrong.
    """
    from bdtrain.checkpoint.folders import CONFIG
    from bdtrain.checkpoint.manifest import verify_file

    limit_s = _configured(verify_file(snapshot, CONFIG), options.overrides).refit.deadline_s + GRACE_S
    run_apart(refit_command([*words, *_settings(options)]), what, limit_s)


def _settings(options: argparse.Namespace) -> list[str]:
    """The arguments that say how a re-fit is made."""
    words = []
    for name in ("data", "block_sizes", "device"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return [*words, *options.overrides]
