"""What the report reads: long, torn, missing and wrong files, and what becomes of their curves."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from bdtrain.errors import ConfigError
from bdtrain.tracking.jsonl import MetricsLog, read_metrics
from bdtrain.tracking.report import write_report
from bdtrain.tracking.report.columns import COLUMNS, read_columns
from bdtrain.tracking.report.curves import make_ticks, thin
from tests.unit.tracking.report_run import Page, make_run, read_page, train_line, validation_line


@pytest.mark.parametrize("seed", range(8))
def test_columns_are_what_read_metrics_keeps(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path, step = tmp_path / "metrics.jsonl", 0
    for attempt in range(1, 6):
        begin = draw.randint(0, step)
        with MetricsLog(path, attempt) as log:
            log.event("start", begin)
            for step in range(begin + draw.randint(0, 1), begin + draw.randint(1, 12)):
                shape = draw.random()
                if shape < 0.6:
                    log.write(step, train_line(step, draw.choice([draw.random(), math.nan, math.inf])))
                if shape > 0.4:
                    log.write(step, {"ckpt/seconds": 1.0, "train/loss": draw.random()})
                if shape > 0.8:
                    log.write(step, validation_line(draw.random()))
                if shape > 0.9:
                    log.event("skipped", step, note='a "train/loss": 1 inside')
    with path.open("ab") as file:
        file.write(
            b'not a line\n{"step": 1}\n{"step": 999, "attempt": 5, "time": 1, "train/loss": "odd"}\n{"ste'
        )
    reports = [line for line in read_metrics(path) if line.get("train/loss") != "odd"]
    columns = read_columns(path).columns
    for name in COLUMNS:
        expected = [(line["step"], repr(float(line[name]))) for line in reports if name in line]
        found = zip(columns[name].steps, columns[name].values, strict=True)
        assert [(at, repr(value)) for at, value in found] == expected, name


def test_thinned_curve_keeps_extremes_and_ends() -> None:
    draw = random.Random(3)
    values = [draw.gauss(0, 1) for _ in range(50_000)]
    values[12_345], values[40_000], values[7] = 99.0, -99.0, math.nan
    chosen = thin(values)
    assert len(chosen) <= 1000
    assert chosen == sorted(set(chosen))
    assert {12_345, 40_000, 0, 49_999} <= set(chosen)
    assert 7 not in chosen
    # Every hundredth of the curve keeps its least and greatest value, up to values of the next hundredth.
    for begin in range(0, 50_000, 500):
        part = [value for value in values[begin : begin + 500] if math.isfinite(value)]
        kept = [values[i] for i in chosen if begin - 150 <= i < begin + 650]
        assert max(kept) >= max(part)
        assert min(kept) <= min(part)
    assert thin([1.0, math.inf, 2.0]) == [0, 2]
    assert thin([math.nan]) == []


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0, 1), (4.1, 6.6), (-3, 5), (0, 1.2e9), (1e-5, 4e-3), (2.0, 2.001)):
        ticks = make_ticks(low, high)
        assert 3 <= len(ticks) <= 8
        assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in ticks)
        step = ticks[1] - ticks[0]
        digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(digits - round_one) for round_one in (1, 2, 2.5, 5)) < 1e-6


def test_hundred_thousand_lines_stay_small(tmp_path: Path) -> None:
    # A tenth of them by this machine's clock; the size does not grow with their number.
    lines, path = 10_000, tmp_path / "metrics.jsonl"
    start = {"step": 0, "attempt": 1, "time": 1.0, "event": "start"}
    extra = {f"x{number}": 0.123456789 for number in range(10)}
    with path.open("w") as file:
        file.write(json.dumps(start) + "\n")
        for step in range(1, lines):
            line = {
                "step": step,
                "attempt": 1,
                "time": 1.0 + step,
                **train_line(step, math.sin(step)),
                **extra,
            }
            file.write(json.dumps(line) + "\n")
    began = time.process_time()
    for line in path.open("rb"):
        json.loads(line)
    parsing = time.process_time() - began
    began = time.process_time()
    report = write_report(tmp_path)
    spent = time.process_time() - began
    assert report.stat().st_size < 2_000_000
    # No slower than parsing each line once, with what one page costs.
    assert spent < parsing + 2.0
    assert all(len(curve["steps"]) <= 1000 for curve in Page(report.read_text()).plotted().values())


@pytest.mark.parametrize("cut", [1, 150, 900])
def test_whatever_is_torn_or_missing_is_left_out(tmp_path: Path, cut: int) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text(
        json.dumps({"after": {"nelbo": 3.0}, "goodput": {"training_seconds": 3.0}})
    )
    (run / "samples.jsonl").write_text('{"step": 1, "text": "a"}\n')
    for path in sorted(run.iterdir()):
        for change in ("cut", "other", "gone"):
            copy = tmp_path / f"{path.name}-{change}-{cut}"
            shutil.copytree(run, copy)
            target = copy / path.name
            if change == "cut":
                os.truncate(target, min(cut, target.stat().st_size))
            elif change == "other":
                target.write_text(
                    '[1, {"step": {}, "event": []}]\n{"step": [], "attempt": 1, "time": "x"}\n"\\ud800"'
                )
            else:
                target.unlink()
            page, _ = read_page(copy)
            assert "h1" in page.texts


@pytest.mark.parametrize("values", [{}, {"after": 3, "goodput": []}, {"after": {"nelbo": "x", "bpb": None}}])
def test_values_of_the_wrong_kind_are_left_out(tmp_path: Path, values: dict[str, Any]) -> None:
    run = make_run(tmp_path)
    for name in ("summary.json", "run.json", "evaluation.json"):
        (run / name).write_text(
            json.dumps({**values, "tokenizer": 7, "nelbo": 1.0, "manifest": "x", "baselines": 4})
        )
    for config in (
        "",
        "model: 3\ntrain: [x]\nparallel: {tp: many}",
        "model: {num_layers: -3}",
        "{[",
        "run: {name: }",
    ):
        (run / "config.yaml").write_text(config)
        read_page(run)


def test_runs_without_steps_or_validation_have_a_page(tmp_path: Path) -> None:
    only_start = tmp_path / "a"
    with MetricsLog(only_start / "metrics.jsonl", 1) as log:
        log.event("start", 0)
    page, content = read_page(only_start)
    assert "No step was reported yet" in content
    with MetricsLog(tmp_path / "b" / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        log.write(1, train_line(1, 4.0))
    page, content = read_page(tmp_path / "b")
    assert "Nothing was evaluated on held-out text" in content
    assert page.plotted()["train/loss"] == {"steps": [1], "values": [4.0]}
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{}")
    read_page(tmp_path / "c")


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run: it has neither metrics.jsonl nor run.json; give"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        write_report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    write_report(run)
    before = (run / "report.html").read_bytes()
    files = sorted(run.iterdir())

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    (run / "samples.jsonl").write_text('{"step": 1, "text": "more"}\n')
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(path for path in run.iterdir() if path.name != "samples.jsonl") == files
