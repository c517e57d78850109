"""Weights & Biases, offline: a folder that ``wandb sync`` uploads later. The only place that imports wandb.

Its files cannot be continued, so each process writes the run anew from the metrics file's first line:
whatever ended the one before, the folder holds every point once.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from bdtrain.tracking.json_files import read_yaml
from bdtrain.tracking.mlflow import StoreOptions, flatten
from bdtrain.tracking.run_artifacts import make_files
from bdtrain.tracking.run_files import CONFIG_FILE, WANDB
from bdtrain.tracking.spool import SCHEDULES, Point

STEP = "step"
"""Horizontal axis of the metrics: wandb's own counts calls."""

EXIT_CODE = {"end": 0, "stop": 0, "failed": 1}


class WandbStore:
    """A run in wandb's files.

    Args:
        folder: of the run; the files lie in its folder ``wandb``.
        options: which run.

    Attributes:
        run_id: another one in each process, for each begins anew.
        mark: nothing: it begins anew.

    Raises:
        Exception: whatever wandb raises: every method may be called again on a new store.
    """

    mark = 0

    def __init__(self, folder: Path, options: StoreOptions) -> None:
        import wandb

        self._wandb, self._folder = wandb, folder
        if wandb.run is not None:  # of a store that failed
            wandb.run.finish(exit_code=1)
        for earlier in (folder / WANDB).glob("offline-run-*"):
            shutil.rmtree(earlier)
        uid = re.sub(r"[^A-Za-z0-9_-]", "-", options.run_uid)[-64:]
        self._run = wandb.init(
            mode="offline",
            project=options.experiment,
            name=options.run_name,
            id=uid,
            dir=str(folder),
            config=dict(flatten(read_yaml(folder / CONFIG_FILE))),
            # Its own samples would be of this process, and of the folder that it happens to run in.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )
        self._run.define_metric("*", step_metric=STEP)
        self.run_id = f"{uid}-{os.getpid()}-{time.time():.6f}"

    def begin(self, start: dict[str, Any]) -> None:
        """Note an attempt."""
        facts = {name: value for name, value in start.items() if name not in ("event", "time", "step")}
        self._run.summary.update({f"attempt/{name}": value for name, value in facts.items()})

    def log(self, points: list[Point]) -> None:
        """Store points; those of one line are one row."""
        for (step, _), group in groupby(points, key=lambda point: (point.step, point.time_ms)):
            self._run.log({**{point.name: point.value for point in group}, STEP: step})

    def put(self, name: str) -> None:
        """Store the pictures of a re-fit; wandb has the configuration and the environment already."""
        kind, _, rest = name.partition("/")
        if kind != SCHEDULES:
            return
        with tempfile.TemporaryDirectory() as aside:
            for path, _ in make_files(self._folder, name, Path(aside)):
                if path.suffix == ".png":
                    picture = self._wandb.Image(str(path))
                    self._run.log({"sched/refit": picture, STEP: int(rest.removeprefix("step-"))})

    def finish(self, event: str, time_ms: int) -> None:
        """Close the files."""
        self._run.finish(exit_code=EXIT_CODE[event])
