"""The trainer's hold on the processes that carry its metrics elsewhere. Imports none of their libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from bdtrain.errors import ConfigError
from bdtrain.tracking.child import child_environment
from bdtrain.tracking.mlflow import URI_VARIABLE, default_uri, quiet_environment
from bdtrain.tracking.names import run_name
from bdtrain.tracking.run_files import METRICS_FILE
from bdtrain.tracking.spool import (
    MLFLOW,
    TENSORBOARD,
    WANDB,
    ShipState,
    ended,
    lines_left,
    log_file,
    redact,
    writer_of,
)

if TYPE_CHECKING:
    from bdtrain.config import RunConfig

TITLES = MappingProxyType({MLFLOW: "MLflow", TENSORBOARD: "TensorBoard", WANDB: "W&B"})


class Shipper:
    """The trainer's hold on one process that ships its metrics file.

    No method raises, and none waits for a server; ``close`` waits as long as it is told to.

    Args:
        folder: of the run.
        uri: ``tensorboard``, ``wandb``, or the address of MLflow's server; None is MLflow's database in the
            run's folder.
        experiment: that the run belongs to.
        run_name: shown on the store's page.
        run_uid: by which a resumed run is found again.
        attempt: number of this start of the run.
        restart_s: shortest time between two starts of the process.
        extra: more arguments of the process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        run_uid: str,
        attempt: int,
        restart_s: float = 30.0,
        extra: tuple[str, ...] = (),
    ) -> None:
        self._folder = folder
        self._uri = uri or default_uri(folder)
        self.title = TITLES[writer_of(self._uri)]
        self._words = [
            *("--experiment", experiment, "--name", run_name, "--uid", run_uid),
            *("--attempt", str(attempt), "--parent", str(os.getpid()), *extra),
        ]
        self._attempt, self._restart_s = attempt, restart_s
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = self._asked_at = -float("inf")
        self._said: str | None = None
        self._hopeless = self._closed = False

    @property
    def address(self) -> str:
        """Where the metrics go, without credentials."""
        return redact(self._uri)

    @property
    def _remedy(self) -> str:
        where = "" if writer_of(self._uri) == MLFLOW else f" --uri {self._uri}"
        return f"python tools/mlflow_sync.py {self._folder}{where}"

    @property
    def pid(self) -> int | None:
        """Of the shipping process; None if it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the process. Call it after the attempt's ``start`` event is written."""
        if self._closed:
            return
        self._started_at = time.monotonic()
        environment = child_environment(os.environ, {**quiet_environment(), "OMP_NUM_THREADS": "1"})
        environment[URI_VARIABLE] = self._uri
        try:
            with (self._folder / log_file(self._uri)).open("ab") as log:
                self._process = subprocess.Popen(
                    # -P: a file of the user's working folder must not hide a library.
                    [sys.executable, "-P", "-m", "bdtrain.tracking.ship", str(self._folder), *self._words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
        except OSError as error:
            self._said = f"cannot start: {error}"

    def poll(self) -> str | None:
        """Start the process again if it died; call it as often as you like.

        Returns:
            One line for the console when shipping begins to fail or works again, else None.
        """
        now = time.monotonic()
        if self._closed or self._hopeless or now - self._asked_at < 1.0:
            return None
        self._asked_at = now
        try:
            code = self._process.poll() if self._process is not None else 1
            if code == 2:  # ship.HOPELESS
                self._hopeless = True
            elif code is not None and now - self._started_at >= self._restart_s:
                self.start()
            return self._news()
        except Exception as error:
            return f"{self.title}: {type(error).__name__}: {redact(str(error), os.environ)}"

    def close(self, timeout_s: float) -> str | None:
        """Wait until everything is shipped, then end the process. Call it after the attempt's last event.

        Args:
            timeout_s: at most so long; then the process is killed.

        Returns:
            None if everything is shipped, else one line that says what is left and how to ship it.
        """
        if self._closed:
            return None
        self._closed = True
        try:
            self._drain(timeout_s)
            state = ShipState.load(self._folder, self._uri)
            left = lines_left(self._folder, self._uri)
            reason = state.problem or self._said or "there was no time for them"
            if left:
                what = f"{left} lines of {METRICS_FILE} are"
            elif state.files:
                what = f"{', '.join(state.files)} {'is' if len(state.files) == 1 else 'are'}"
            else:
                return None
            return f"{self.title}: {what} not in {self.address} ({reason}); {self._remedy} ships them"
        except Exception as error:
            return f"{self.title}: {type(error).__name__}: {redact(str(error), os.environ)}"

    def _drain(self, timeout_s: float) -> None:
        process = self._process
        if process is None:
            return
        # It leaves by itself behind the attempt's last event. Where there is none, it need not wait for one.
        leaves = ended(self._folder / METRICS_FILE, self._attempt)
        until = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < until:
            if not leaves and not lines_left(self._folder, self._uri):
                break
            time.sleep(0.05)
        if process.poll() is None:
            process.kill()  # it may be killed at any moment
            process.wait(2.0)

    def _news(self) -> str | None:
        problem = ShipState.load(self._folder, self._uri).problem
        if problem == self._said or (problem is not None and self._said is not None):
            return None
        self._said = problem
        if problem is None:
            return f"{self.title}: {self.address} takes metrics again"
        hopeless = ""
        if self._hopeless:
            hopeless = f"; {self._remedy} ships them once that is mended"
        waiting = f"they wait in {METRICS_FILE}{hopeless}"
        return f"{self.title}: {self.address} takes no metrics ({problem}); {waiting}"


class Shippers:
    """Several of them as one; with none it does nothing.

    Args:
        shippers: one for each writer.
    """

    def __init__(self, shippers: Sequence[Shipper]) -> None:
        self._shippers = list(shippers)

    @property
    def addresses(self) -> list[str]:
        """Who takes the metrics, in words."""
        return [f"{shipper.title}: {shipper.address}" for shipper in self._shippers]

    def start(self) -> None:
        """Start the processes. Call it after the attempt's ``start`` event is written."""
        for shipper in self._shippers:
            shipper.start()

    def poll(self) -> str | None:
        """As ``Shipper.poll``, a line for each that has news."""
        return _joined([shipper.poll() for shipper in self._shippers])

    def close(self, timeout_s: float) -> str | None:
        """As ``Shipper.close``; the time is for all of them together."""
        until = time.monotonic() + timeout_s
        return _joined([shipper.close(max(0.0, until - time.monotonic())) for shipper in self._shippers])


def make_shippers(config: RunConfig, folder: Path, *, run_uid: str, attempt: int) -> Shippers:
    """The processes that a run's configuration asks for, not started yet.

    Args:
        config: the run.
        folder: of the run.
        run_uid: of the run.
        attempt: number of this start of the run.
    """
    tracking = config.tracking
    uris: list[str | None] = [tracking.mlflow_uri] if tracking.mlflow else []
    uris += [TENSORBOARD] if tracking.tensorboard else []
    uris += [WANDB] if tracking.wandb else []
    return Shippers(
        [
            Shipper(
                folder,
                uri=uri,
                experiment=tracking.experiment,
                run_name=run_name(config),
                run_uid=run_uid,
                attempt=attempt,
            )
            for uri in uris
        ]
    )


def check_writers(config: RunConfig) -> None:
    """Refuse a writer whose library is missing, before any work begins; nothing is imported.

    Raises:
        ConfigError: saying what to install.
    """
    if config.tracking.wandb and find_spec("wandb") is None:
        raise ConfigError(
            "tracking.wandb=true, but the package wandb is not installed; pip install -c constraints.txt -e "
            "'.[wandb]', or set tracking.wandb=false (metrics.jsonl keeps everything, and "
            "tools/mlflow_sync.py RUN --uri wandb writes it later)"
        )


def _joined(news: Sequence[str | None]) -> str | None:
    return "\n".join(line for line in news if line is not None) or None
