"""What besides numbers reaches a store: re-fits, checkpoints, data, environment; a refusal loses nothing."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bdtrain.tracking import pictures
from bdtrain.tracking.jsonl import MetricsLog
from bdtrain.tracking.refits import Refit, read_refit
from bdtrain.tracking.report.refit_plots import list_plots
from bdtrain.tracking.run_artifacts import (
    describe_environment,
    describe_inputs,
    list_checkpoints,
    make_files,
)
from bdtrain.tracking.ship import SHIPPED, Shipping
from bdtrain.tracking.spool import Point, ShipState, files_of
from tests.unit.tracking.refit_files import make_counts, make_refits
from tests.unit.tracking.report_run import Page, make_run

DIGEST = "ab" * 32


class Store:
    """Takes everything but the files it is told to refuse."""

    run_id, mark = "r", 0

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.files: list[str] = []
        self.refused: set[str] = set()
        self.ends: list[str] = []

    def begin(self, start: dict) -> None:
        """Nothing."""

    def log(self, points: list[Point]) -> None:
        self.points += points

    def put(self, name: str) -> None:
        if name in self.refused:
            raise PermissionError("no files here")
        self.files.append(name)

    def finish(self, event: str, time_ms: int) -> None:
        self.ends.append(event)


def ship(run: Path, store: Store, said: list[str] | None = None, **more: object) -> Shipping:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    work = Shipping(
        run, "memory", lambda run_id: store, attempt=None, parent_alive=lambda: False,
        clock=lambda: clock[0], sleep=sleep, say=(said if said is not None else []).append, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    assert work.run() == SHIPPED
    return work


def write_run(run: Path) -> None:
    with MetricsLog(run / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        log.write(5, {"train/loss": 1.0})
        log.event("checkpoint", 5, folder="step-000000005", bytes=10)
        log.event("refit_begun", 5, snapshot_step=5, adopt_step=9)
        log.event("refit", 9, snapshot_step=5, outcome="adopted", reason="r", version=1, replayed=False)
        log.event("end", 10)


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"event": "refit", "snapshot_step": 5}, ("schedule/step-000000005",)),
        ({"event": "refit", "snapshot_step": 5, "replayed": True}, ()),
        ({"event": "refit", "snapshot_step": "../x"}, ()),
        ({"event": "refit_begun", "snapshot_step": 5}, ()),
        ({"event": "checkpoint", "folder": "step-000000005"}, ("checkpoints.json",)),
        ({"event": "start"}, ("config.yaml", "environment.json", "inputs")),
        ({"event": "stop"}, ("summary.json", "samples.jsonl", "report.html")),
        ({"train/loss": 1.0, "step": 3}, ()),
    ],
)
def test_events_name_the_files_that_they_tell_of(record: dict, names: tuple[str, ...]) -> None:
    assert files_of(record) == names


def test_each_file_is_stored_once_however_often_the_process_starts(tmp_path: Path) -> None:
    write_run(tmp_path)
    store = Store()
    ship(tmp_path, store)
    ship(tmp_path, store)
    assert sorted(store.files) == sorted(
        ["config.yaml", "environment.json", "inputs", "checkpoints.json", "schedule/step-000000005",
         "summary.json", "samples.jsonl", "report.html"]
    )  # fmt: skip


def test_a_store_that_takes_no_files_takes_the_numbers_and_the_files_later(tmp_path: Path) -> None:
    write_run(tmp_path)
    store, said = Store(), list[str]()
    store.refused = {"schedule/step-000000005", "report.html"}
    ship(tmp_path, store, said)
    assert [point.name for point in store.points] == ["train/loss"] and store.ends == ["end"]
    state = ShipState.load(tmp_path, "memory")
    assert state.finished and state.files == ["schedule/step-000000005", "report.html"]
    assert sum("was not stored: PermissionError: no files here" in line for line in said) == 2
    before = list(store.files)
    ship(tmp_path, store)  # still refused: nothing is said or sent twice
    assert store.files == before
    store.refused = set()
    ship(tmp_path, store)
    assert store.files == [*before, "schedule/step-000000005", "report.html"]
    assert ShipState.load(tmp_path, "memory").files == [] and len(store.points) == 1


def test_checkpoints_have_the_digest_of_their_manifest(tmp_path: Path) -> None:
    there = tmp_path / "checkpoints" / "step-000000010"
    there.mkdir(parents=True)
    (there / "MANIFEST.json").write_bytes(b"{}\n")
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        log.event("checkpoint", 5, folder="step-000000005", bytes=10, manifest_sha256=DIGEST)
        log.event("checkpoint", 8, folder="../step-000000008", bytes=11)
        log.event("checkpoint", 10, folder="step-000000010", bytes=12)
    first, second, third = list_checkpoints(tmp_path)
    assert first == {
        "path": "checkpoints/step-000000005", "step": 5, "bytes": 10, "manifest_sha256": DIGEST,
        "deleted": True,
    }  # fmt: skip
    assert (second["path"], second["manifest_sha256"]) == ("checkpoints/step-000000008", None)
    assert third["manifest_sha256"] == hashlib.sha256(b"{}\n").hexdigest() and not third["deleted"]


def test_the_data_are_named_by_corpus_split_and_fingerprint(tmp_path: Path) -> None:
    corpus = tmp_path / "somewhere" / "books"
    corpus.mkdir(parents=True)
    sizes = {"tokens": 1000, "rows": 10, "documents": 3, "text_bytes": 4000, "shards": []}
    (corpus / "index.json").write_text(json.dumps({"splits": {"train": sizes, "valid": {"tokens": 7}}}))
    (tmp_path / "config.yaml").write_text(f"data: {{kind: corpus, path: {corpus}}}\n")
    known = {"corpus": DIGEST, "split": "train", "seq_len": 64}
    (tmp_path / "run.json").write_text(json.dumps({"data_fingerprint": known}))
    train, valid = describe_inputs(tmp_path)
    assert (train.name, train.context, train.digest) == ("books/train", "training", DIGEST[:36])
    assert train.profile == {
        "split": "train", "tokens": 1000, "rows": 10, "documents": 3, "text_bytes": 4000,
        "fingerprint": DIGEST, "seq_len": 64,
    }  # fmt: skip
    assert (valid.name, valid.context, valid.profile["tokens"]) == ("books/valid", "validation", 7)
    assert str(tmp_path) not in repr((train, valid))


def test_generated_data_have_a_digest_of_their_description(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {kind: synthetic}\n")
    (tmp_path / "run.json").write_text(json.dumps({"data_fingerprint": {"corpus": "markov/1:7:64"}}))
    (only,) = describe_inputs(tmp_path)
    assert only.digest == hashlib.sha256(b"markov/1:7:64").hexdigest()[:36]
    (tmp_path / "run.json").write_text("{torn")
    assert describe_inputs(tmp_path) == []


def test_the_environment_names_versions_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    found = describe_environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["pydantic"] and "hunter2" not in json.dumps(found)


def make_schedule(run: Path, aside: Path) -> dict[str, bytes]:
    aside.mkdir()
    return {
        f"{place}/{path.name}": path.read_bytes()
        for path, place in make_files(run, "schedule/step-000000005", aside)
    }


def test_a_refit_is_a_file_of_its_schedule_and_report_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    folder = make_refits(tmp_path / "run")
    monkeypatch.setattr(pictures, "has_matplotlib", lambda: False)
    files = make_schedule(tmp_path / "run", tmp_path / "a")
    # Variance by range; loss, its variance and the gradient's by mask count; one variance against the other.
    pages = ["step-5.svg", *(f"step-5-{number}.svg" for number in (2, 3, 4, 5))]
    assert list(files) == [f"schedule/{name}" for name in ("step-5.json", *pages)]
    stored = json.loads(files["schedule/step-5.json"])
    report = json.loads((folder / "step-000000005" / "report.json").read_text())
    assert stored["report"] == report and stored["schedule"]["snapshot_step"] == 5
    assert stored["outcome"]["outcome"] == "adopted"
    page = Page(files["schedule/step-5.svg"].decode())
    assert "plan in use: full range" in page.texts["text"] and "least: clip 0.5-1" in page.texts["text"]


def test_a_refit_that_failed_is_stored_without_pictures(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    make_refits(tmp_path / "run")
    aside = tmp_path / "a"
    aside.mkdir()
    ((path, _),) = make_files(tmp_path / "run", "schedule/step-000000015", aside)
    assert json.loads(path.read_text()) | {"outcome": None} == {
        "snapshot_step": 15, "outcome": None, "schedule": None, "report": None,
    }  # fmt: skip


def test_matplotlib_gets_the_same_points_as_the_page(tmp_path: Path) -> None:
    make_refits(tmp_path)
    refit = read_refit(tmp_path, 5)
    assert refit is not None
    drawn: list[tuple] = []
    bins: list[tuple] = []

    class Axes:
        """Takes what the picture draws."""

        def errorbar(self, xs, ys, yerr, **more):
            drawn.append((xs, ys, yerr))

        def stairs(self, ys, edges, **more):
            bins.append((tuple(ys), edges))

        def get_legend_handles_labels(self):
            return [], []

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *words, **more: None

        spines: dict = dict.fromkeys(
            ("top", "right"), type("Spine", (), {"set_visible": lambda self, on: None})()
        )

    for plot in pictures.list_plots(refit):
        pictures._draw(Axes(), plot)
        wanted = [series.points for series in plot.series]
        assert [tuple(zip(xs, ys, errors, strict=True)) for xs, ys, errors in drawn] == wanted
        drawn.clear()
    fitted = next(list_plots(Refit(5, 9, "adopted", results={4: make_counts()})))
    pictures._draw(Axes(), fitted)
    # Four counts: a tenth, two, three and four tenths of all, over a quarter each.
    ((heights, edges),) = bins
    assert heights == pytest.approx((0.4, 0.8, 1.2, 1.6)) and edges == (0.5, 1.5, 2.5, 3.5, 4.5)


def test_mlflow_has_inputs_files_and_environment_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", end=None)
    make_refits(run)
    (run / "run.json").write_text(json.dumps({"run_uid": "u-1", "data_fingerprint": {"corpus": DIGEST}}))
    with MetricsLog(run / "metrics.jsonl", 2) as log:
        log.event("start", 20, torch="9.9", world_size=1)
        log.event("refit", 21, snapshot_step=5, outcome="adopted", reason="r", version=1, replayed=False)
        log.event("end", 21)
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace('"http://someone:secret-word@server:5000"', "null")
    )
    tool = Path(__file__).parents[3] / "tools" / "mlflow_sync.py"
    done = subprocess.run(
        [sys.executable, tool, run], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with sqlite3.connect(run / "mlflow.db") as database:
        inputs = database.execute("select name, digest, dataset_profile from datasets").fetchall()
        tags = dict(database.execute("select key, value from tags"))
    ((digest, profile),) = [row[1:] for row in inputs if row[0] == "corpus/train"]
    assert digest == DIGEST[:36] and json.loads(profile)["fingerprint"] == DIGEST
    assert tags["bdtrain.torch"] == "9.9"
    stored = {path.name for path in (run / "mlflow-artifacts").rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json", "report.html", "step-5.json"} <= stored
    assert any(name.startswith("step-5") and not name.endswith("json") for name in stored)
