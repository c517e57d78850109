"""What is drawn over the number of masked tokens, and the two variances against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bdtrain.tracking.json_files import read_json
from bdtrain.tracking.refits import Refit, gradient_metrics, read_refit
from bdtrain.tracking.report.plots import HEIGHT, WIDTH, draw_plot, standalone
from bdtrain.tracking.report.refit_plots import (
    list_plots,
    plot_correlation,
    plot_counts,
    plot_gradient_variance,
    plot_loss_variance,
)
from tests.unit.tracking.refit_files import (
    candidate,
    error,
    make_counts,
    make_gradients,
    make_refits,
    make_result,
    variance,
)
from tests.unit.tracking.report_run import Page, make_run, read_page

REPORT = Path("refit") / "step-000000005" / "report.json"


def test_fitted_counts_are_drawn_over_uniform_ones() -> None:
    plot = plot_counts(make_counts(), 4)
    assert plot is not None and plot.whole
    (fitted,) = plot.series
    assert fitted.name == "fitted (better)"
    # A tenth, two, three and four tenths, where uniform counts have a quarter each.
    assert [y for _, y, _ in fitted.points] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert fitted.edges == (0.5, 1.5, 2.5, 3.5, 4.5)
    assert plot.levels == (("uniform = in use before", 1.0, None),)
    assert "0.033 ± 0.0011" in plot.notes[0]
    kept = plot_counts(make_counts(adopt=False), 4)
    assert kept is not None and kept.series[0].name == "fitted (no better)"


def test_a_plan_before_that_is_not_uniform_is_drawn_beside_the_fitted_and_the_plain_one() -> None:
    result = make_counts()
    before, fitted = result["candidates"]  # type: ignore[misc]
    before = {**before, "drawn": [0.4, 0.3, 0.2, 0.1], "density": [2.0, 1.0, 1.0, 1.0]}
    plain = candidate(0.0, 1.0, name="plain counts", drawn=[0.25] * 4)
    plot = plot_counts({**result, "candidates": [before, fitted, plain]}, 4)
    assert plot is not None
    assert [series.name for series in plot.series] == ["in use before", "fitted (better)"]
    assert [y for _, y, _ in plot.series[0].points] == pytest.approx([1.6, 1.2, 0.8, 0.4])
    assert plot.levels[0][0] == "uniform = plain counts"


def test_blocks_of_1024_tokens_are_64_bins_that_add_up_to_all_counts() -> None:
    plot = plot_counts(make_counts(1024, 64), 1024)
    assert plot is not None
    (fitted,) = plot.series
    widths = [high - low for low, high in zip(fitted.edges, fitted.edges[1:], strict=False)]
    assert len(fitted.points) == 64 and (fitted.edges[0], fitted.edges[-1]) == (0.5, 1024.5)
    total = sum(y * width for (_, y, _), width in zip(fitted.points, widths, strict=True))
    assert total == pytest.approx(1024)
    page = Page(draw_plot(plot))
    assert sum(given.get("class") == "bin" for _, given in page.tags) == 64
    assert "fitted (better), 17 to 32: 0.06154" in page.texts["title"]
    (line,) = [given["points"] or "" for tag, given in page.tags if tag == "polyline"]
    corners = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert len(corners) == 128 and all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in corners)
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)


def test_the_counts_axis_has_whole_numbers_only() -> None:
    plot = plot_counts(make_counts(2, 2), 2)
    assert plot is not None
    page = Page(draw_plot(plot))
    said = [
        text
        for (tag, given), text in zip(
            [entry for entry in page.tags if entry[0] == "text"], page.texts["text"], strict=True
        )
        if given.get("class") == "x"
    ]
    assert said == ["0", "1", "2"]


def test_variances_by_count_have_their_errors() -> None:
    loss, gradient = plot_loss_variance(make_result(), 4), plot_gradient_variance(make_gradients(), 4)
    assert loss is not None and gradient is not None
    assert loss.series[0].points == tuple((k, 1.0 + k, 0.1 * k) for k in (1, 2, 3, 4))
    assert gradient.series[0].points == tuple((k, 7.0 - k, 0.3 * k) for k in (1, 2, 3, 4))


def test_each_plan_is_a_point_of_both_variances_and_no_line_joins_them() -> None:
    gradients = make_gradients()
    plot = plot_correlation(make_result(), gradients, 4)
    assert plot is not None
    (series,) = plot.series
    assert len(series.points) == 6 and not series.joined
    assert all(y == pytest.approx(3 * x) for x, y, _ in series.points)
    spots = {spot.kind: (spot.x, spot.y) for spot in plot.spots}
    assert spots["current"] == pytest.approx((variance(0, 1), 3 * variance(0, 1)))
    assert spots["winner"] == pytest.approx((variance(0.5, 1), 3 * variance(0.5, 1)))
    assert plot.notes[0] == "correlation 0.987 ± 0.012, of ranks 0.900 ± 0.05, over 6 plans"
    page = Page(draw_plot(plot))
    assert not any(tag == "polyline" for tag, _ in page.tags)
    assert sum(given.get("r") == "2.6" for _, given in page.tags) == 6
    # The plan of least variance is the first of them, and the dots say which plan they are.
    assert (
        page.texts["title"][0].startswith("clip 0.5-1, ") and "clip 0.5-1 has the least of both" in plot.notes
    )
    assert any(words.startswith("full range, ") for words in page.texts["title"])


def test_plans_of_infinite_variance_are_no_points() -> None:
    gradients = make_gradients()
    gradients["plans"] = [{**plan, "finite": False} for plan in gradients["plans"]]  # type: ignore[attr-defined]
    assert plot_correlation(make_result(), gradients, 4) is None


def test_a_refit_of_counts_shows_counts_and_one_of_ranges_shows_ranges() -> None:
    for result, first in (
        (make_counts(), "How often mask counts are drawn"),
        (make_result(), "Variance by clip"),
    ):
        plot = next(list_plots(Refit(5, 9, "adopted", results={4: result})))
        assert plot.title.startswith(first)


def test_metrics_are_those_of_the_plan_before_and_of_the_best_of_the_search() -> None:
    report = {"results": {"4": make_result()}, "gradients": {"4": make_gradients()}}
    found = gradient_metrics(report, 4)
    assert found == {
        "sched/gradient_variance": pytest.approx(3 * variance(0, 1)),
        "sched/gradient_variance_error": pytest.approx(error(0, 1)),
        "sched/gradient_variance_best": pytest.approx(3 * variance(0.5, 1)),
        "sched/gradient_excess": 0.0,
        "sched/gradient_correlation": 0.987,
        "sched/gradient_correlation_error": 0.012,
        "sched/gradient_rank_correlation": 0.9,
    }
    assert gradient_metrics(report, 8) == gradient_metrics({"results": {"4": make_result()}}, 4) == {}


# -- The page ------------------------------------------------------------------------------------------------


def write_report(run: Path, report: dict[str, Any]) -> Path:
    (run / REPORT).write_text(json.dumps(report))
    return run


def test_the_page_has_the_correlation_as_one_number_and_all_pictures_of_the_newest(tmp_path: Path) -> None:
    make_refits(make_run(tmp_path))
    page, text = read_page(tmp_path)
    said = "reason of step 5 Variances of loss and gradient: correlation 0.987 ± 0.012."
    assert said in page.texts["div"]
    (opened,) = [given for tag, given in page.tags if tag == "details" and "open" in given]
    assert opened is not None
    for title in (
        "Variance by clip range",
        "Loss by mask count",
        "Loss variance by mask count",
        "Gradient variance by mask count",
        "Gradient variance by loss variance",
    ):
        assert text.count(f"<figcaption>{title}") == 1


def test_a_page_without_gradients_says_nothing_of_them(tmp_path: Path) -> None:
    make_refits(make_run(tmp_path))
    page, _ = read_page(write_report(tmp_path, {"results": {"4": make_result()}}))
    assert "orrelation" not in " ".join(page.texts["div"] + page.texts["p"])


def test_what_kept_gradients_from_being_measured_is_told(tmp_path: Path) -> None:
    make_refits(make_run(tmp_path))
    report = {"results": {"4": make_result()}, "gradients": {"4": {"error": "too <few> blocks"}}}
    page, _ = read_page(write_report(tmp_path, report))
    assert "Gradients, block size 4: too <few> blocks" in page.texts["p"]


NASTY: list[dict[str, Any]] = [
    {"gradients": 3},
    {"gradients": {"4": {"plans": [1, {}, {"name": [1], "nelbo": 1, "gradient": "x"}], "counts": {"a": 1}}}},
    {"gradients": {"4": make_gradients(pearson="x", pearson_error=[], excess={}, least_gradient=3)}},
    {"gradients": {"4": {"plans": [{"name": {}, "nelbo": 1e308, "gradient": 2.0}] * 3, "pearson": 1e308}}},
    {"gradients": {"4": {"counts": [{"masked_low": 3, "masked_high": 1, "variance": -1.0}]}}},
    {"gradients": {"4": make_gradients(counts=[{"masked_low": 1e99, "masked_high": 1e99, "variance": 1.0}])}},
    {"results": {"4": {**make_counts(), "losses": []}}},
    {"results": {"4": {**make_counts(), "losses": [{"masked_low": 9, "masked_high": 2}] * 4}}},
    {"results": {"4": make_result(settings={"mode": "counts"}, candidates=[candidate(0, 1, drawn=[2.0])])}},
    {"results": {"4": make_result(settings={"mode": "counts"}, candidates=[candidate(0, 1, drawn="abc")])}},
    {"results": {"4": make_result(candidates=[candidate(0, 1, name=[1], is_current=True)], winner=[1])}},
]


@pytest.mark.parametrize("more", NASTY, ids=range(len(NASTY)))
def test_a_report_of_any_content_breaks_neither_page_nor_pictures_nor_metrics(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    make_refits(make_run(tmp_path))
    write_report(tmp_path, {"results": {"4": make_result()}, "gradients": {"4": make_gradients()}, **more})
    _, text = read_page(tmp_path)
    assert "Noise schedule" in text
    for plot in list_plots(read_refit(tmp_path, 5)):  # type: ignore[arg-type]
        assert "nan" not in standalone(plot)
    assert all(
        isinstance(value, float) for value in gradient_metrics(read_json(tmp_path / REPORT), 4).values()
    )
