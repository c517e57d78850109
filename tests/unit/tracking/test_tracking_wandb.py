"""W&B offline, through a stand-in for its library; the README says what the real one makes of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bdtrain.config import RunConfig
from bdtrain.errors import ConfigError
from bdtrain.tracking import shipper
from bdtrain.tracking.jsonl import MetricsLog
from bdtrain.tracking.mlflow import StoreOptions
from bdtrain.tracking.ship import SHIPPED, Shipping, open_store
from bdtrain.tracking.shipper import check_writers
from tests.unit.tracking.refit_files import make_refits

OPTIONS = StoreOptions("wandb", "project", "tiny", "uid/1")


class FakeRun:
    """Notes what it is told; the folder is made as the library makes it."""

    def __init__(self, library: FakeWandb, settings: dict[str, Any]) -> None:
        self.library, self.settings = library, settings
        self.rows: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str]] = []
        self.summary: dict[str, Any] = {}
        self.code: int | None = None
        self.place = Path(settings["dir"]) / "wandb" / f"offline-run-{len(library.runs)}-{settings['id']}"
        self.place.mkdir(parents=True)

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        assert self.code is None
        self.rows.append(row)

    def finish(self, *, exit_code: int) -> None:
        self.code = exit_code
        self.library.run = None


class FakeWandb(ModuleType):
    """As much of the library as is used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run: FakeRun | None = None
        self.runs: list[FakeRun] = []
        self.Settings = dict
        self.Image = lambda path: Path(path).read_bytes()

    def init(self, **settings: Any) -> FakeRun:
        self.run = FakeRun(self, settings)
        self.runs.append(self.run)
        return self.run


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def ship(run: Path) -> None:
    work = Shipping(
        run,
        "wandb",
        lambda run_id: open_store(run, OPTIONS, run_id),
        attempt=None,
        parent_alive=lambda: False,
        say=lambda text: None,
    )
    assert work.run() == SHIPPED


def write_run(folder: Path, *, attempt: int, first: int, last: int, end: str) -> None:
    with MetricsLog(folder / "metrics.jsonl", attempt) as log:
        log.event("start", first)
        for step in range(first + 1, last + 1):
            log.write(step, {"train/loss": 1.0 / step, "train/lr": 0.5})
        log.event("refit", last, snapshot_step=5, outcome="adopted", reason="r", version=1, replayed=False)
        log.event(end, last)


def points(run: FakeRun) -> list[tuple[str, int, float]]:
    return [
        (name, row["step"], value)
        for row in run.rows
        for name, value in row.items()
        if name.startswith("train/")
    ]


def test_each_process_writes_the_whole_run_anew_under_the_same_id(tmp_path: Path, library: FakeWandb) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: tiny}\nuri: http://u:hunter2@h\n")
    make_refits(tmp_path)
    write_run(tmp_path, attempt=1, first=0, last=10, end="stop")
    ship(tmp_path)
    write_run(tmp_path, attempt=2, first=8, last=12, end="end")
    ship(tmp_path)
    first, second = library.runs
    assert first.settings["id"] == second.settings["id"] == "uid-1"
    assert second.settings["mode"] == "offline" and second.settings["project"] == "project"
    assert second.settings["config"] == {"run.name": "tiny", "uri": "http://***@h"}
    wanted = [(name, step, 1.0 / step if name == "train/loss" else 0.5)
              for step in range(1, 13) for name in ("train/loss", "train/lr")]  # fmt: skip
    assert points(first) == wanted[:20] and points(second) == wanted
    assert second.defined == [("*", "step")]
    assert (first.code, second.code) == (0, 0)
    # One folder holds the run, once.
    assert [path.name for path in (tmp_path / "wandb").iterdir()] == [second.place.name]


def test_a_missing_package_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**tracking: Any) -> RunConfig:
        return RunConfig.model_construct(tracking=type("Tracking", (), {"wandb": False, **tracking})())

    monkeypatch.setattr(shipper, "find_spec", lambda name: None)
    check_writers(config())
    with pytest.raises(ConfigError, match=r"tracking\.wandb=true.*not installed.*pip install"):
        check_writers(config(wandb=True))
    monkeypatch.setattr(shipper, "find_spec", lambda name: object())
    check_writers(config(wandb=True))
