"""MLflow: the store of a run, as the shipping process uses it (``bdtrain.tracking.ship``)."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bdtrain.tracking.json_files import read_yaml
from bdtrain.tracking.jsonl import read_lines
from bdtrain.tracking.run_artifacts import describe_inputs, make_files
from bdtrain.tracking.run_files import ARTIFACTS, CONFIG_FILE, DATABASE_FILE, METRICS_FILE, RUN_FILE
from bdtrain.tracking.spool import MAX_POINTS, Point, redact

URI_VARIABLE = "BDTRAIN_MLFLOW_URI"
"""Names the store to the shipping process: as an argument everyone on the machine would see it."""

REQUEST_TIMEOUT_S = 10
MAX_VALUE_CHARACTERS = 500
MAX_PARAMS = 100
MAX_DIGEST_CHARACTERS = 36
ENVIRONMENT_TAGS = ("bdtrain", "torch", "python", "host", "device", "world_size")
"""Facts of an attempt's ``start`` that become tags."""

FINISHED, KILLED, FAILED = "FINISHED", "KILLED", "FAILED"
STATUS: Mapping[str, str] = MappingProxyType({"end": FINISHED, "stop": KILLED, "failed": FAILED})
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
        mark: nothing: what is stored twice is there once.

    Raises:
        Exception: whatever MLflow raises: every method may be called again.
    """

    mark = 0

    def __init__(self, folder: Path, options: StoreOptions, run_id: str | None) -> None:
        self._folder, self._options = folder, options
        self._local = options.uri == default_uri(folder)
        if self._local and not (folder / DATABASE_FILE).exists():
            self._make_database(folder / DATABASE_FILE)
        self._client = self._connect(options.uri)
        self.run_id = self._find_run(run_id) or self._make_run()

    def begin(self, start: dict[str, Any]) -> None:
        """Note an attempt, its software, and the resolved configuration as parameters."""
        from mlflow.entities import Param, RunTag

        number, step = start["attempt"], start["step"]
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start["time"]))
        tags = {
            "bdtrain.attempt": str(number),
            f"bdtrain.attempt.{number}": f"from step {step}, {when}, {socket.gethostname()}",
            **{f"bdtrain.{name}": str(start[name]) for name in ENVIRONMENT_TAGS if name in start},
        }
        known = self._client.get_run(self.run_id).data.params
        params = dict(flatten(read_yaml(self._folder / CONFIG_FILE)))
        # MLflow refuses to change a parameter: what a later attempt changed is a tag.
        changed = {key: value for key, value in params.items() if known.get(key, value) != value}
        if changed:
            tags[f"bdtrain.changed.{number}"] = json.dumps(changed)[:MAX_VALUE_CHARACTERS]
        new = [Param(key, value) for key, value in params.items() if key not in known]
        self._client.update_run(self.run_id, status="RUNNING")
        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for first in range(0, len(new), MAX_PARAMS):
            self._client.log_batch(self.run_id, params=new[first : first + MAX_PARAMS])

    def log(self, points: list[Point]) -> None:
        """Store points under their own times: storing them again changes nothing."""
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        self._client.log_batch(self.run_id, metrics=metrics)

    def put(self, name: str) -> None:
        """Store a file of the run, or the data it takes as inputs; storing it again replaces it."""
        if name == "inputs":
            self._log_inputs()
            return
        with tempfile.TemporaryDirectory() as aside:
            for path, place in make_files(self._folder, name, Path(aside)):
                self._client.log_artifact(self.run_id, str(path), place)

    def finish(self, event: str, time_ms: int) -> None:
        """Note how the run ended.

        Args:
            event: with which the attempt ended.
            time_ms: when, since 1970.
        """
        self._client.set_terminated(self.run_id, STATUS[event], time_ms)

    def _log_inputs(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=known.name,
                    digest=known.digest[:MAX_DIGEST_CHARACTERS],
                    source_type="local",
                    source=json.dumps({"uri": known.name}),
                    profile=json.dumps(known.profile),
                ),
                [InputTag("mlflow.data.context", known.context)],
            )
            for known in describe_inputs(self._folder)
        ]
        if inputs:
            self._client.log_inputs(self.run_id, inputs)

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


@dataclass(frozen=True)
class NestedRun:
    """A run below another one, complete.

    Attributes:
        name: on MLflow's page; no other run below the same one has it.
        status: how it ended, such as ``FINISHED``.
        began_ms: when, since 1970.
        params: its parameters; anything that JSON holds.
        metrics: its points.
        tags: its tags.
        files: stored with it.
        draw: makes more files in the folder that it is given.
    """

    name: str
    status: str
    began_ms: int
    params: Mapping[str, Any]
    metrics: Sequence[Point] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    draw: Callable[[Path], list[Path]] | None = None


class NestedRuns:
    """A run that is made of runs, such as a sweep; ``quiet_environment`` must be set before.

    Args:
        uri: address of the store; files of a database on this machine lie in a folder beside it.
        experiment: made if it is not there.
        name: of the run that holds the others.

    Attributes:
        run_id: MLflow's name of the run that holds the others.

    Raises:
        Exception: whatever MLflow raises. Methods may be called again; nothing is there twice then, save a
            run whose making was not answered.
    """

    def __init__(self, uri: str, experiment: str, name: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        self._experiment_id: str = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(
                experiment, artifact_location=_artifacts_beside(uri), tags=dict(EXPERIMENT_TAGS)
            )
        )
        self._made: dict[str, str] = {}
        # Nothing after it: what fails here is begun again.
        self.run_id = str(self._client.create_run(self._experiment_id, run_name=name).info.run_id)

    def log(self, run: NestedRun) -> None:
        """Store a run below this one."""
        if run.name not in self._made:
            made = self._client.create_run(
                self._experiment_id,
                start_time=run.began_ms,
                run_name=run.name,
                tags={"mlflow.parentRunId": self.run_id},
            )
            self._made[run.name] = str(made.info.run_id)
        run_id = self._made[run.name]
        self._log(run_id, params=run.params, metrics=run.metrics, tags=run.tags)
        with tempfile.TemporaryDirectory() as aside:
            for path in (*run.files, *(run.draw(Path(aside)) if run.draw is not None else ())):
                self._client.log_artifact(run_id, str(path))
        self._client.set_terminated(run_id, run.status)

    def finish(
        self,
        status: str,
        *,
        params: Mapping[str, Any],
        metrics: Sequence[Point],
        tags: Mapping[str, str],
        files: Sequence[Path],
    ) -> None:
        """Store what belongs to the whole, and its end; the arguments are those of ``NestedRun``."""
        self._log(self.run_id, params=params, metrics=metrics, tags=tags)
        for path in files:
            self._client.log_artifact(self.run_id, str(path))
        self._client.set_terminated(self.run_id, status)

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Sequence[Point] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self._client.log_batch(
            run_id,
            params=[Param(key, value) for key, value in flatten(params or {})],
            tags=[RunTag(key, redact(value, os.environ)) for key, value in (tags or {}).items()],
        )
        stored = [Metric(point.name, point.value, point.time_ms, point.step) for point in metrics]
        for first in range(0, len(stored), MAX_POINTS):
            self._client.log_batch(run_id, metrics=stored[first : first + MAX_POINTS])


def _artifacts_beside(uri: str) -> str | None:
    """Where the files of a local database belong: by default MLflow puts them into the working folder."""
    scheme, _, path = uri.partition("://")
    if not scheme.startswith("sqlite") or not path:
        return None
    return (Path(path.removeprefix("/").partition("?")[0]).resolve().parent / ARTIFACTS).as_uri()


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs ``a.b``, text: cut to what every server takes, without credentials."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{key}", redact(text, os.environ)[:MAX_VALUE_CHARACTERS]
