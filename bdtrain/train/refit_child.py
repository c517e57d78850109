"""The trainer's hold on a re-fit in another process. Nothing here waits, and nothing raises."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bdtrain.refit.reserved_gpu import VISIBLE, visible_gpu
from bdtrain.tracking.child import child_environment

LOG_FILE = "log.txt"
NICE = 10
"""How much the re-fit's priority is lowered: training goes first."""


class RefitChild:
    """A process that makes one re-fit, in a session of its own.

    Args:
        run: folder of the run.
        step: of the snapshot.
        folder: where its results and its log go.
        gpus: whether it may see the GPUs that the trainer sees; by default it sees none.
        reserved: GPU that training leaves to it (``refit.gpu``): it sees this one, and measures there.
    """

    def __init__(
        self, run: Path, *, step: int, folder: Path, gpus: bool = False, reserved: int | None = None
    ) -> None:
        self._log, self._gpus, self._reserved = folder / LOG_FILE, gpus, reserved
        # Settings are the snapshot's; one that is given here could leave another one without effect.
        self._words = ["--run", str(run), "--step", str(step), "--nice", str(NICE)]
        if reserved is not None:
            self._words += ["--device", "cuda"]
        self._process: subprocess.Popen[bytes] | None = None
        self._trouble = ""

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            environment: of the trainer; what names ranks is left out.
        """
        reserved = self._reserved
        shown = None if reserved is None else {VISIBLE: visible_gpu(reserved, environment)}
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    # -P: a file of the user's working folder must not hide a library.
                    [sys.executable, "-P", "-m", "bdtrain.refit", *self._words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=child_environment(environment, shown, gpus=self._gpus),
                    start_new_session=True,
                )
        except OSError as error:
            self._trouble = f"it could not be started: {error.strerror or error}"

    @property
    def running(self) -> bool:
        """Whether it is at work."""
        return self._process is not None and self._process.poll() is None

    def problem(self) -> str:
        """Why it ended without a result; empty while it runs or after a good end."""
        if self._process is None:
            return self._trouble
        code = self._process.poll()
        if not code:
            return ""
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with {code}: {self._last_words()}"

    def kill(self) -> None:
        """End it and everything that it started; a stopped process, too."""
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)

    def _last_words(self) -> str:
        """The last line of its log that says something."""
        try:
            with self._log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(file.tell() - 4096, 0))
                lines = file.read().decode("utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        told = [line.strip() for line in lines if line.strip()]
        errors = [line for line in told if line.startswith("error: ")]
        return (errors or told or ["it said nothing"])[-1][:300]
