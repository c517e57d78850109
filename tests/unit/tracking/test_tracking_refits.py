"""The re-fits on the report's page: what the files say, and nothing that a file could break."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest

from bdtrain.tracking.refits import (
    describe_plan,
    plot_variance,
    read_files,
    read_refit,
    read_refits,
)
from bdtrain.tracking.report.plots import HEIGHT, WIDTH, draw_plot, standalone
from bdtrain.tracking.report.refit_plots import list_plots, plot_losses
from tests.unit.tracking.refit_files import (
    WIDTHS,
    candidate,
    error,
    line,
    make_refits,
    make_result,
    plan,
    search_metrics,
    variance,
)
from tests.unit.tracking.report_run import Page, make_run, read_page


def test_the_history_is_read_with_the_plan_before_and_after(tmp_path: Path) -> None:
    make_refits(tmp_path)
    first, second, third = read_refits(tmp_path)
    assert (first.step, first.adopt_step, first.outcome, first.version) == (5, 9, "adopted", 1)
    assert (first.before, first.after) == ("full range", "0.5 to 1")
    assert (second.outcome, second.before, second.after) == ("late", "0.5 to 1", "0.5 to 1")
    assert third.reason == "reason of step 15"
    assert list(first.results) == [4] and second.results == {}


def test_the_last_line_of_a_step_counts_and_a_torn_one_does_not(tmp_path: Path) -> None:
    folder = make_refits(tmp_path)
    again = json.dumps(line(10, "kept", [0.5, 1.0], 2))
    with (folder / "history.jsonl").open("a") as file:
        file.write(again + "\n" + again.replace("kept", "adopted")[:-20])
    assert [refit.outcome for refit in read_refits(tmp_path)] == ["adopted", "kept", "failed"]


def test_a_refit_that_is_begun_and_not_settled_is_pending(tmp_path: Path) -> None:
    make_refits(tmp_path)
    begun = {"event": "refit_begun", "step": 20, "snapshot_step": 20, "adopt_step": 24}
    events = [{**begun, "step": 5, "snapshot_step": 5}, begun]
    last = read_refits(tmp_path, events)[-1]
    assert (last.step, last.adopt_step, last.outcome) == (20, 24, "pending")
    # An attempt that resumes from before it begins it again, or not.
    assert read_refits(tmp_path, [*events, {"event": "start", "step": 18}])[-1].step == 15


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (plan(None), "full range"),
        (plan([0.3, 0.8]), "0.3 to 0.8"),
        (plan([1.0, 1.0]), "full masking"),
        (plan([0.0, 0.5], density=[1.0, 2.0]), "0 to 0.5, fitted counts"),
        (plan(None, density=[1.0, 2.0]), "fitted counts"),
        ({"clip_range": ["a", {}]}, "full range"),
        ({}, "full range"),
    ],
)
def test_a_plan_in_words(values: dict, words: str) -> None:
    assert describe_plan(values) == words


def test_the_plot_has_one_series_a_width_over_its_lower_bounds() -> None:
    plot = plot_variance(make_result(), 4)
    assert plot is not None
    wanted = {
        f"width {width:g}": tuple(
            (begin, variance(begin, begin + width), error(begin, begin + width)) for begin in begins
        )
        for width, begins in WIDTHS.items()
    }
    assert {series.name: series.points for series in plot.series} == wanted
    assert plot.levels == (("full range", variance(0, 1), error(0, 1)),)
    spots = {spot.kind: (spot.x, spot.y) for spot in plot.spots}
    assert spots == {"current": (0.0, variance(0, 1)), "winner": (0.5, variance(0.5, 1.0))}
    assert not plot.log


def test_the_plot_of_the_loss_is_over_the_number_of_masked_tokens() -> None:
    plot = plot_losses(make_result(), 4)
    assert plot is not None
    (series,) = plot.series
    counts, losses, errors = zip(*series.points, strict=True)
    assert counts == (1, 2, 3, 4)
    assert losses == pytest.approx((3.9, 3.8, 3.7, 3.6))
    assert errors == pytest.approx((0.02, 0.04, 0.06, 0.08))


def test_plans_of_infinite_variance_are_left_out_and_said() -> None:
    result = make_result()
    infinite = candidate(0.0, 0.5, finite=False)
    plot = plot_variance({**result, "candidates": [infinite, candidate(0.5, 1.0)]}, 4)
    assert plot is not None
    assert [len(series.points) for series in plot.series] == [1]
    assert "1 plans" in plot.notes[0]
    assert plot_variance({**result, "candidates": [infinite]}, 4) is None


def test_independent_draws_are_compared_by_their_own_variance() -> None:
    plot = plot_variance(make_result(strata="independent"), 4)
    assert plot is not None
    ((name, value, bar),) = plot.levels
    assert (name, value, bar) == ("full range", 2 * variance(0, 1), None)


def test_variances_far_apart_are_drawn_over_a_logarithmic_axis() -> None:
    wide = [candidate(0.0, 0.5, variance=100.0, variance_error=200.0), candidate(0.5, 1.0, variance=0.01)]
    plot = plot_variance(make_result(candidates=wide), 4)
    assert plot is not None and plot.log
    page = Page(draw_plot(plot))
    places = [float(a["cy"] or "") for tag, a in page.tags if tag == "circle" and a.get("r") == "2.6"]
    assert len(places) == 2 and all(0 < place < HEIGHT for place in places)
    bars = [a["d"] for tag, a in page.tags if tag == "path" and "V" in (a["d"] or "")]
    numbers = [float(word) for bar in bars for word in re.findall(r"[\d.]+", bar or "")]
    assert all(0 <= word <= WIDTH for word in numbers)


def test_a_picture_is_affine_in_what_it_shows_and_bars_are_one_error_each_way() -> None:
    plot = plot_variance(make_result(), 4)
    assert plot is not None
    page = Page(draw_plot(plot))
    points = [point for series in plot.series for point in series.points]
    dots = [a for tag, a in page.tags if tag == "circle" and a.get("r") == "2.6"]
    places = [(float(dot["cx"] or ""), float(dot["cy"] or "")) for dot in dots]
    assert len(places) == len(points)
    (x0, y0, _), (x1, y1, _) = points[0], points[2]
    slope = (places[2][0] - places[0][0]) / (x1 - x0), (places[2][1] - places[0][1]) / (y1 - y0)
    assert slope[0] > 0 > slope[1]
    bars = [
        a["d"] or "" for tag, a in page.tags if tag == "path" and re.fullmatch(r"M\S+ \S+V\S+", a["d"] or "")
    ]
    for (x, y, bar), (left, top), path in zip(points, places, bars, strict=True):
        assert left == pytest.approx(places[0][0] + slope[0] * (x - x0), abs=0.11)
        assert top == pytest.approx(places[0][1] + slope[1] * (y - y0), abs=0.11)
        high, low = map(float, re.fullmatch(r"M\S+ (\S+)V(\S+)", path).groups())  # type: ignore[union-attr]
        assert bar is not None
        assert low - high == pytest.approx(-2 * bar * slope[1], abs=0.25)
    spots = {a["class"]: (float(a["cx"] or ""), float(a["cy"] or "")) for tag, a in page.tags
             if tag == "circle" and (a.get("class") or "").startswith("spot-")}  # fmt: skip
    assert spots["spot-winner"] == places[2]
    assert spots["spot-current"][0] == places[0][0]


def test_a_picture_of_its_own_is_one_svg_that_needs_nothing_else() -> None:
    for result in (make_result(), make_result(winner="<script>alert(1)</script>")):
        for plot in (plot_variance(result, 4), plot_losses(result, 4)):
            assert plot is not None
            text = standalone(plot)
            page = Page(text)
            assert page.tags[0][0] == "svg" and text.endswith("</svg>\n")
            assert "script" not in page.texts
            links = [value for _, given in page.tags for name, value in given.items() if name != "xmlns"]
            assert not [value for value in links if "http" in str(value)]


# -- The page ------------------------------------------------------------------------------------------------


def run_with_refits(folder: Path) -> Path:
    make_run(folder, end=None)
    make_refits(folder)
    config = folder / "config.yaml"
    config.write_text(
        config.read_text().replace("block_size: 4}", "block_size: 4, plan: {clip_range: null}}")
    )
    lines: list[dict] = [
        {"step": 9, "sched/version": 1, "sched/beta": 0.5, "sched/omega": 1.0, **search_metrics()}
    ]
    for step, outcome in ((9, "adopted"), (14, "late"), (19, "failed")):
        event = {
            "event": "refit",
            "snapshot_step": step - 4,
            "outcome": outcome,
            "reason": "why",
            "version": 1,
        }
        lines.append({"step": step, **event})
    lines.append({"step": 20, "event": "end", "reason": "finished"})
    with (folder / "metrics.jsonl").open("a") as file:
        for entry in lines:
            file.write(json.dumps({"attempt": 1, "time": time.time(), **entry}) + "\n")
    return folder


def test_the_page_tells_of_every_refit_with_its_errors(tmp_path: Path) -> None:
    page, _ = read_page(run_with_refits(tmp_path))
    cells = page.texts["td"]
    at = cells.index("adopted")
    gain = variance(0, 1) / variance(0.5, 1) - 1
    # variance(0, 1) = 0.033 and an error of a thirtieth of it; variance(0.5, 1) = 0.024.
    assert cells[at - 2 : at + 9] == [
        "5", "9", "adopted", "full range", "0.5 to 1", "1", "0.033 ± 0.0011", "0.024 ± 0.0008",
        f"{gain:.1%}", "0.93", "narrowest, highest start",
    ]  # fmt: skip
    assert "reason of step 10" in page.texts["div"]
    heading = " ".join(page.texts["h2"] + page.texts["span"])
    assert "3 re-fits, 1 adopted, 1 late, 1 failed; in force: 0.5 to 1" in heading
    faults = [
        given for tag, given in page.tags if tag == "tr" and (given.get("class") or "").startswith("fault")
    ]
    # Two rows for each of two re-fits without a result, and the two events.
    assert len(faults) == 6
    assert "2 re-fits without a result" in heading


def test_the_page_draws_the_range_in_steps_over_every_axis(tmp_path: Path) -> None:
    page, content = read_page(run_with_refits(tmp_path))
    assert content.count("Clip range in force") == 1 + 4  # the title, and what each of four axes is called
    lines = [
        given["points"] or ""
        for tag, given in page.tags
        if tag == "polyline" and given.get("class") == "beta"
    ]
    assert len(lines) == 4
    corners = [tuple(map(float, pair.split(","))) for pair in lines[0].split()]
    # Over 20 steps: 0 until step 9, then 0.5.
    (begin, bottom), (change, same), (again, top), (end, _) = corners
    assert (bottom, change) == (same, again) and top < bottom
    assert (change - begin) / (end - begin) == pytest.approx(9 / 20, abs=0.002)
    assert "sched/beta" not in page.plotted()


def test_a_run_without_refits_says_nothing_of_them(tmp_path: Path) -> None:
    _, content = read_page(make_run(tmp_path))
    assert "Noise schedule" not in content and "Clip range in force" not in content


NASTY = [
    b"",
    b"{",
    b"[1, 2]",
    b"null",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    json.dumps({"results": {"4": []}}).encode(),
    json.dumps({"results": {"4": {"candidates": [1, {}, {"variance": "x"}], "losses": {"a": 1}}}}).encode(),
    json.dumps({"results": {"x": make_result(), "-4": make_result(), "0": make_result()}}).encode(),
    json.dumps({"results": {"4": make_result(candidates=[candidate(0, 1, variance=1e308)])}}).encode(),
    json.dumps({"results": {"4": make_result(candidates=[candidate(0.5, 1, variance=0.0)])}}).encode(),
    json.dumps({"results": {"4": make_result(candidates=[candidate(0, 0.5, variance=-1.0)])}}).encode(),
    (b'{"results": {"4": {"candidates": [{"variance": ' + b"9" * 400 + b', "clip_range": [NaN, 1]}]}}}'),
    json.dumps({"results": {"4": make_result(at_edge=5, winner=[1], strata={})}}).encode(),
]


@pytest.mark.parametrize("content", NASTY, ids=range(len(NASTY)))
def test_a_report_of_any_content_breaks_no_page(tmp_path: Path, content: bytes) -> None:
    run = run_with_refits(tmp_path)
    (run / "refit" / "step-000000005" / "report.json").write_bytes(content)
    _, text = read_page(run)
    assert "Noise schedule" in text
    assert not re.search(
        r'"[^"]*\b(nan|inf)\b[^"]*"', "".join(re.findall(r"<(?:path|circle|rect)[^>]*>", text))
    )
    # What is shipped is read from the same files.
    assert read_files(run, 5)["outcome"]["outcome"] == "adopted"
    for plot in list_plots(read_refit(run, 5)):  # type: ignore[arg-type]
        standalone(plot)


LINES = [
    {"snapshot_step": 5},
    {"snapshot_step": "5", "outcome": "kept"},
    {"snapshot_step": math.inf, "outcome": "kept"},
    {"snapshot_step": 7, "outcome": ["kept"]},
    {"snapshot_step": 7, "outcome": "<b>kept</b>", "plan": 3, "metrics": [], "reason": None, "version": "x"},
    {"snapshot_step": 1e300, "outcome": "kept"},
]


@pytest.mark.parametrize("entry", LINES, ids=range(len(LINES)))
def test_a_history_of_any_content_breaks_no_page(tmp_path: Path, entry: dict) -> None:
    run = run_with_refits(tmp_path)
    (run / "refit" / "history.jsonl").write_text(json.dumps(entry) + "\n")
    _, text = read_page(run)
    assert "<b>kept" not in text


def test_folders_in_place_of_files_break_no_page(tmp_path: Path) -> None:
    run = run_with_refits(tmp_path)
    (run / "refit" / "step-000000005" / "report.json").unlink()
    (run / "refit" / "step-000000005" / "report.json").mkdir()
    (run / "refit" / "history.jsonl").unlink()
    (run / "refit" / "history.jsonl").mkdir()
    read_page(run)
