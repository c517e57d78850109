"""MLflow: the store of a run, and the trainer's hold on the process that ships to it.

``MlflowShipper`` is what the trainer uses; it never imports MLflow. ``MlflowStore`` is what the shipping
process uses (``bdtrain.tracking.ship``).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bdtrain.tracking.jsonl import read_lines
from bdtrain.tracking.run_files import (
    ARTIFACTS,
    CONFIG_FILE,
    DATABASE_FILE,
    METRICS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
)
from bdtrain.tracking.spool import (
    LOG_FILE,
    Point,
    ShipState,
    ended,
    lines_left,
    redact,
)

URI_VARIABLE = "BDTRAIN_MLFLOW_URI"
"""Names the store to the shipping process: as an argument everyone on the machine would see it."""

REQUEST_TIMEOUT_S = 10
MAX_VALUE_CHARACTERS = 500
MAX_PARAMS = 100
LAST_FILES = (SUMMARY_FILE, SAMPLES_FILE)
STATUS: Mapping[str, str] = MappingProxyType({"end": "FINISHED", "stop": "KILLED", "failed": "FAILED"})
# What makes the pages of MLflow 3 open as those of a trained model, not of an LLM application.
EXPERIMENT_TAGS: Mapping[str, str] = MappingProxyType({"mlflow.experimentKind": "custom_model_development"})


def default_uri(folder: Path) -> str:
    """Address of the database in a run's folder."""
    return f"sqlite:///{folder.resolve() / DATABASE_FILE}"


def read_run_uid(folder: Path) -> str:
    """The run's uid from ``run.json``; the folder's path where there is none."""
    try:
        return str(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["run_uid"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(folder.resolve())


def quiet_environment() -> dict[str, str]:
    """Settings of MLflow that must be there before it is imported.

    By default a call to a dead server blocks for minutes; the shipping process has its own way to try again.
    """
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT_S),
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": str(REQUEST_TIMEOUT_S),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }


@dataclass(frozen=True)
class StoreOptions:
    """Which run of which store.

    Attributes:
        uri: address, with credentials where it has any.
        experiment: made if it is not there.
        run_name: shown on MLflow's page.
        run_uid: tag by which the run is found again.
    """

    uri: str
    experiment: str
    run_name: str
    run_uid: str


class MlflowStore:
    """A run in MLflow: continued by its id or its uid, made where there is none.

    Args:
        folder: of the run.
        options: which run.
        run_id: MLflow's name of the run, if known.

    Attributes:
        run_id: MLflow's name of the run.

    Raises:
        Exception: whatever MLflow raises: every method may be called again.
    """

    def __init__(self, folder: Path, options: StoreOptions, run_id: str | None) -> None:
        self._folder, self._options = folder, options
        self._local = options.uri == default_uri(folder)
        if self._local and not (folder / DATABASE_FILE).exists():
            self._make_database(folder / DATABASE_FILE)
        self._client = self._connect(options.uri)
        self.run_id = self._find_run(run_id) or self._make_run()

    def begin(self, start: dict[str, Any]) -> None:
        """Note an attempt, the resolved configuration as parameters, and the file it is in."""
        from mlflow.entities import Param, RunTag

        number, step = start["attempt"], start["step"]
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start["time"]))
        tags = {
            "bdtrain.attempt": str(number),
            f"bdtrain.attempt.{number}": f"from step {step}, {when}, {socket.gethostname()}",
        }
        known = self._client.get_run(self.run_id).data.params
        params = dict(flatten(self._read_config()))
        # MLflow refuses to change a parameter: what a later attempt changed is a tag.
        changed = {key: value for key, value in params.items() if known.get(key, value) != value}
        if changed:
            tags[f"bdtrain.changed.{number}"] = json.dumps(changed)[:MAX_VALUE_CHARACTERS]
        new = [Param(key, value) for key, value in params.items() if key not in known]
        self._client.update_run(self.run_id, status="RUNNING")
        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for first in range(0, len(new), MAX_PARAMS):
            self._client.log_batch(self.run_id, params=new[first : first + MAX_PARAMS])
        self._store_file(CONFIG_FILE)

    def log(self, points: list[Point]) -> None:
        """Store points under their own times: storing them again changes nothing."""
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        self._client.log_batch(self.run_id, metrics=metrics)

    def finish(self, event: str, time_ms: int) -> None:
        """Store the run's files and how it ended.

        Args:
            event: with which the attempt ended.
            time_ms: when, since 1970.
        """
        for name in LAST_FILES:
            self._store_file(name)
        self._client.set_terminated(self.run_id, STATUS[event], time_ms)

    @staticmethod
    def _connect(uri: str) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=uri)

    def _make_database(self, path: Path) -> None:
        """Set up the tables aside: a process that is killed meanwhile leaves no half-made database behind."""
        aside = path.with_name(".tmp-mlflow.db")
        aside.unlink(missing_ok=True)
        self._connect(f"sqlite:///{aside.resolve()}").search_experiments(max_results=1)
        aside.rename(path)

    def _find_run(self, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run_id
        experiment = self._client.get_experiment_by_name(self._options.experiment)
        if experiment is None:
            return None
        uid = self._options.run_uid.replace("'", "")
        found = self._client.search_runs(
            [experiment.experiment_id], f"tags.`bdtrain.run_uid` = '{uid}'", max_results=1
        )
        return found[0].info.run_id if found else None

    def _make_run(self) -> str:
        options = self._options
        experiment = self._client.get_experiment_by_name(options.experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            place = (self._folder.resolve() / ARTIFACTS).as_uri() if self._local else None
            experiment_id = self._client.create_experiment(
                options.experiment, artifact_location=place, tags=dict(EXPERIMENT_TAGS)
            )
        # When the run began, not when the store first answered.
        began = next((event["time"] for _, event in read_lines(self._folder / METRICS_FILE)), time.time())
        run = self._client.create_run(
            experiment_id,
            start_time=round(began * 1000),
            run_name=options.run_name,
            tags={"bdtrain.run_uid": options.run_uid.replace("'", "")},
        )
        return str(run.info.run_id)

    def _read_config(self) -> dict[str, Any]:
        import yaml

        try:
            config = yaml.safe_load((self._folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return config if isinstance(config, dict) else {}

    def _store_file(self, name: str) -> None:
        """Copy one of the run's files, without credentials.

        A server that takes no files still gets the numbers.
        """
        path = self._folder / name
        if not path.is_file():
            return
        try:
            with tempfile.TemporaryDirectory() as aside:
                copy = Path(aside) / name
                copy.write_text(redact(path.read_text(encoding="utf-8"), os.environ), encoding="utf-8")
                self._client.log_artifact(self.run_id, str(copy))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:160]
            print(f"{name} was not stored: {redact(reason, os.environ)}", flush=True)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs ``a.b``, text: cut to what every server takes, without credentials."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{key}", redact(text, os.environ)[:MAX_VALUE_CHARACTERS]


class MlflowShipper:
    """The trainer's hold on the process that ships its metrics file.

    No method raises, and none waits for a server; ``close`` waits as long as it is told to.

    Args:
        folder: of the run.
        uri: of the tracking server; None is a database in the run's folder.
        experiment: that the run belongs to.
        run_name: shown on MLflow's page.
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
    def pid(self) -> int | None:
        """Of the shipping process; None if it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the process. Call it after the attempt's ``start`` event is written."""
        if self._closed:
            return
        self._started_at = time.monotonic()
        root = str(Path(__file__).resolve().parent.parent.parent)
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment.update(
            quiet_environment(),
            PYTHONPATH=os.pathsep.join(path),
            CUDA_VISIBLE_DEVICES="",
            OMP_NUM_THREADS="1",
        )
        environment[URI_VARIABLE] = self._uri
        try:
            with (self._folder / LOG_FILE).open("ab") as log:
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
            return f"MLflow: {type(error).__name__}: {redact(str(error), os.environ)}"

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
            if not left:
                return None
            reason = state.problem or self._said or "there was no time for them"
            return (
                f"MLflow: {left} lines of {METRICS_FILE} are not in {self.address} ({reason}); "
                f"python tools/mlflow_sync.py {self._folder} ships them"
            )
        except Exception as error:
            return f"MLflow: {type(error).__name__}: {redact(str(error), os.environ)}"

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
            return f"MLflow: {self.address} takes metrics again"
        hopeless = ""
        if self._hopeless:
            hopeless = f"; python tools/mlflow_sync.py {self._folder} ships them once that is mended"
        return f"MLflow: {self.address} takes no metrics ({problem}); they wait in {METRICS_FILE}{hopeless}"


_RANK_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
)
