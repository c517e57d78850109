"""Metrics of named held-out sets: their names, and their place in the report."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bdtrain.config.schema.validation import MAIN_SET, HeldOutSet
from bdtrain.tracking.jsonl import MetricsLog, deterministic_fields, read_metrics
from bdtrain.tracking.names import METRICS, find_metric, is_deterministic, set_section
from tests.unit.tracking.report_run import make_run, read_page

QUANTITIES = {name.removeprefix("val/") for name in METRICS if name.startswith("val/")}


def of(name: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{set_section(name)}/{key}": value for key, value in values.items()}


def test_a_set_has_the_metrics_of_the_runs_own_rows_with_unit_and_meaning() -> None:
    assert set_section(MAIN_SET) == "val"
    for quantity in QUANTITIES:
        own, found = METRICS[f"val/{quantity}"], find_metric(f"{set_section('wiki_2')}/{quantity}")
        assert found is not None
        assert (found.unit, found.deterministic) == (own.unit, own.deterministic)
        assert found.meaning.endswith("of the held-out set wiki_2")
        assert "val/" not in found.meaning
        assert is_deterministic(f"val_wiki_2/{quantity}") is (quantity != "seconds")
    for name, metric in METRICS.items():
        assert find_metric(name) == metric


@pytest.mark.parametrize(
    "name",
    [
        "val_ptb/nelb",
        "val_ptb/loss",
        "val_ptb",
        "val_/nelbo",
        "val_PTB/nelbo",
        "val-ptb/nelbo",
        "val_ptb/nelbo/x",
        "train_ptb/loss",
        "val_valid/nelbo",
        f"val_{'x' * 41}/nelbo",
        "valptb/nelbo",
        "val_ptb/nelbo\n",
    ],
)
def test_a_mistyped_name_is_no_metric_and_is_refused(tmp_path: Path, name: str) -> None:
    assert find_metric(name) is None and not is_deterministic(name)
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        with pytest.raises(KeyError, match=r"are not in bdtrain/tracking/names\.py"):
            log.write(1, {name: 1.0})


@pytest.mark.parametrize("name", ["a", "9", "wiki_2", "_", "x" * 40])
def test_every_name_that_the_configuration_takes_has_metrics(name: str) -> None:
    assert HeldOutSet(name=name, path="x").name == name
    assert find_metric(f"{set_section(name)}/nelbo") is not None


def test_the_log_takes_them_and_tells_what_must_repeat(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 1) as log:
        log.event("start", 0)
        log.write(0, of("ptb", {"nelbo": 0.1, "seconds": 3.0}))
        with pytest.raises(KeyError, match="names of their own meaning"):
            log.event("checkpoint", 0, **{"val_ptb/nelbo": 1.0})
    (line,) = read_metrics(path)
    assert line["val_ptb/nelbo"] == 0.1
    assert deterministic_fields(line) == {"step": "0.0", "val_ptb/nelbo": "0.1"}


def test_the_report_has_a_row_and_a_curve_for_each_set(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", end=None)
    plain, content = read_page(folder)
    assert "Held-out sets" not in content
    assert plain.lines("val_ptb/bpb") == []

    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        f"{config}validation: {{sets: [{{name: ptb, path: some/<ptb>.txt}}, {{name: later, path: x}}]}}\n"
    )
    with MetricsLog(folder / "metrics.jsonl", 2) as log:
        log.event("start", 20)
        for step, nelbo in ((20, 4.0), (30, 3.0), (40, 2.0)):
            errors = {"nelbo_noise_error": 0.03, "nelbo_text_error": 0.04}
            values = {"nelbo": nelbo, **errors, "ppl": math.exp(nelbo), "bpb": nelbo / 2, "tokens": 1234}
            log.write(step, of("ptb", values))
    page, content = read_page(folder)
    assert len(page.lines("val_ptb/bpb")) == 3
    assert page.lines("val_ptb/nelbo_noise_error") == []
    assert len(page.plotted()["val_ptb/nelbo"]["steps"]) == 3
    cells = page.texts["td"]
    row = cells[cells.index("ptb") :][:7]
    # 0.05 from 0.03 and 0.04; the same share of exp(2) and of 1 bit per byte.
    assert row == ["ptb", "40", "2.000 ± 0.05", "7.389 ± 0.37", "1.000 ± 0.025", "1,234", "some/<ptb>.txt"]
    assert cells[cells.index("ptb") - 7 :][:2] == ["valid", "20"]
    assert "later" not in cells
    assert "some/<ptb>" not in content
