"""A sweep: one table, and nested runs in MLflow."""

import json
import math
import sqlite3
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import bdtrain.refit.sweep_runs as sweep_runs
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import CheckpointError, RefitError
from bdtrain.refit.job import Refit, add_gradients, judge, make_schedule, publish
from bdtrain.refit.request import RefitRequest
from bdtrain.refit.sweep import result_names, run_sweep
from bdtrain.refit.sweep_table import SweepRow, format_note, format_table, read_rows
from bdtrain.tracking.names import METRICS
from tests.unit.refit.sweep_cases import make_records, run_config

SIZES = (4, 8)
SECRET = "a-password"


def measured(step, *, run_uid="u-1", change=None, gradients=None):
    """A re-fit with the search on other records for each step; ``change`` alters its results."""

    def refit(checkpoint, folder):
        records = {size: make_records(size, step + size) for size in SIZES}
        results = judge(records, NoisePlan(block_size=4), run_config())
        if change is not None:
            results = {size: change(result) for size, result in results.items()}
        schedule = make_schedule(
            results, NoisePlan(block_size=4), run_uid=run_uid, step=step, digest="d" * 64, version=1
        )
        report = publish(
            folder,
            schedule,
            results,
            request=RefitRequest(str(checkpoint), SIZES, (40, 40), 4, 0),
            seconds={},
            measurement={},
        )
        if gradients is not None:
            add_gradients(folder, report, lambda: gradients(results))
        return Refit(schedule, results, folder, {})

    return refit


def of_name(checkpoint, folder):
    """The step of a checkpoint is its name."""
    return measured(int(checkpoint.name))(checkpoint, folder)


def read_table(out):
    return json.loads((out / "sweep.json").read_text())


# -- The table -----------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_checkpoint_and_block_size_with_the_numbers_of_its_report(
    tmp_path, capsys
):
    checkpoints = [tmp_path / "run" / "checkpoints" / str(step) for step in (10, 20)]
    assert run_sweep(checkpoints, tmp_path / "out", of_name) == 0
    table = read_table(tmp_path / "out")
    assert table["complete"] and table["failures"] == []
    assert table["checkpoints"] == [str(checkpoint) for checkpoint in checkpoints]
    found = [(row["checkpoint"], row["step"], row["block_size"]) for row in table["rows"]]
    assert found == [(str(checkpoints[n]), 10 * (n + 1), size) for n in (0, 1) for size in SIZES]
    for row in table["rows"]:
        folder = tmp_path / "out" / f"run-checkpoints-{row['step']}"
        assert Path(row["folder"]) == folder and (folder / "schedule.json").exists()
        result = json.loads((folder / "report.json").read_text())["results"][str(row["block_size"])]
        (current,) = [one for one in result["candidates"] if one["is_current"]]
        (winner,) = [one for one in result["candidates"] if one["name"] == row["winner"]]
        assert winner["variance"] == min(one["variance"] for one in result["candidates"])
        assert (row["variance"], row["variance_error"]) == (current["variance"], current["variance_error"])
        assert (row["variance_best"], row["variance_best_error"]) == (
            winner["variance"],
            winner["variance_error"],
        )
        assert row["gain"] == pytest.approx(current["variance"] / winner["variance"] - 1, rel=1e-8)
        assert (row["p_best"], row["nelbo"]) == (winner["p_best"], result["nelbo"])
        assert (row["adopt"], row["blocks"], row["sequences"]) == (result["adopt"], 320, 40)
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("checkpoint "))
    columns = [lines[start].index(name) for name in ("step", "L'", "best", "gain", "NELBO")]
    for line, row in zip(lines[start + 1 :], table["rows"], strict=False):
        assert line.startswith(f"checkpoints/{row['step']} ") and f"{row['gain']:.1%}" in line
        assert f"{row['variance']:.4g} +- {row['variance_error']:.2g}" in line
        # Columns stand below each other.
        assert all(line[column - 1] == " " and line[column] != " " for column in columns)
    assert lines[-1] == f"wrote {tmp_path / 'out' / 'sweep.json'}"


def test_a_checkpoint_that_fails_is_told_and_the_others_are_made(tmp_path, capsys):
    def refit(checkpoint, folder):
        if checkpoint.name == "20":
            raise CheckpointError("20 is damaged")
        if checkpoint.name == "30":
            raise OSError(28, "No space left on device", "disk")
        return of_name(checkpoint, folder)

    checkpoints = [tmp_path / "a" / "b" / str(step) for step in (20, 10, 30, 40)]
    # The exit code of the first that failed.
    assert run_sweep(checkpoints, tmp_path / "out", refit) == CheckpointError.exit_code
    said = capsys.readouterr()
    assert said.err.splitlines() == ["error: 20 is damaged", "error: disk: No space left on device"]
    failed = f"2 of 4 checkpoints came to nothing: {checkpoints[0]}, {checkpoints[2]}"
    assert failed in said.out.splitlines()
    table = read_table(tmp_path / "out")
    assert [row["step"] for row in table["rows"]] == [10, 10, 40, 40]
    assert [(one["checkpoint"], one["exit_code"]) for one in table["failures"]] == [
        (str(checkpoints[0]), 7),
        (str(checkpoints[2]), 1),
    ]
    assert table["failures"][0]["error"] == "20 is damaged"


def test_an_error_of_the_program_is_not_taken_for_one_of_a_checkpoint(tmp_path):
    def refit(checkpoint, folder):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_sweep([tmp_path / "1", tmp_path / "2"], tmp_path / "out", refit)


def test_a_sweep_that_is_interrupted_keeps_the_table_so_far(tmp_path):
    seen = []

    def refit(checkpoint, folder):
        if checkpoint.name == "20":
            seen.append(read_table(tmp_path / "out"))
            raise KeyboardInterrupt
        return of_name(checkpoint, folder)

    with pytest.raises(KeyboardInterrupt):
        run_sweep([tmp_path / "10", tmp_path / "20"], tmp_path / "out", refit)
    for table in (*seen, read_table(tmp_path / "out")):
        assert [row["step"] for row in table["rows"]] == [10, 10] and not table["complete"]


def test_results_of_a_single_checkpoint_lie_in_the_folder_itself_and_a_failure_leaves_none(tmp_path):
    assert run_sweep([tmp_path / "10"], tmp_path / "out", of_name) == 0
    assert (tmp_path / "out" / "schedule.json").exists() and len(read_table(tmp_path / "out")["rows"]) == 2

    def fail(checkpoint, folder):
        raise RefitError("no")

    assert run_sweep([tmp_path / "10"], tmp_path / "none", fail) == 8
    assert not (tmp_path / "none").exists()


def test_numbers_without_a_value_are_null_and_independent_draws_have_their_own_variance(tmp_path):
    def change(result):
        if result.current.block_size == 4:
            rows = [replace(one, variance=math.inf, variance_error=math.nan) for one in result.candidates]
            return replace(result, candidates=tuple(rows), gain=None, nelbo=math.inf)
        return replace(result, strata="independent")

    assert run_sweep([tmp_path / "5"], tmp_path / "out", measured(5, change=change)) == 0
    four, eight = read_table(tmp_path / "out")["rows"]
    assert [four[key] for key in ("variance", "variance_error", "variance_best", "gain", "nelbo")] == [
        None
    ] * 5
    report = json.loads((tmp_path / "out" / "report.json").read_text())["results"]["8"]
    assert eight["variance"] == report["candidates"][0]["independent_variance"]
    # The bootstrap gives errors of the stratified variance only.
    assert eight["variance_error"] is None and eight["variance_best_error"] is None


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["/a/run/checkpoints/1"], ["run-checkpoints-1"]),
        (["/a/run/ck/1", "/b/run/ck/1"], ["a-run-ck-1", "b-run-ck-1"]),
        (["/model", "/a/model"], ["model", "a-model"]),
        (["/a-b/c/d", "/z/a/b-c/d"], ["a-b-c-d", "z-a-b-c-d"]),
    ],
)
def test_results_are_named_by_as_much_of_the_path_as_tells_them_apart(places, names):
    assert result_names([Path(place) for place in places]) == names


def test_a_checkpoint_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "1")
    with pytest.raises(RefitError, match="given twice"):
        run_sweep([tmp_path / "1", tmp_path / "link"], tmp_path / "out", of_name)
    with pytest.raises(RefitError, match="one at a time"):
        result_names([Path("/a-b/c"), Path("/a/b-c")])


# -- MLflow --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A sweep of two checkpoints and a damaged one in a database, and what was printed."""
    folder = tmp_path_factory.mktemp("sweep")

    def refit(checkpoint, place):
        if checkpoint.name == "bad":
            raise CheckpointError("bad is damaged")
        return of_name(checkpoint, place)

    checkpoints = [folder / "run" / "checkpoints" / name for name in ("10", "bad", "20")]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of MLflow's own database code
        (folder / "elsewhere").mkdir()
        patch.chdir(folder / "elsewhere")
        for name in sweep_runs.quiet_environment():
            patch.setenv(name, "")
        code = run_sweep(checkpoints, folder / "out", refit, mlflow_uri=f"sqlite:///{folder / 'mlflow.db'}")
    assert code == 7
    with sqlite3.connect(folder / "mlflow.db") as database:

        def by_run(table, values):
            found = {}
            for run, *rest in database.execute(f"select run_uuid, {values} from {table}"):
                found.setdefault(run, []).append(tuple(rest))
            return found

        runs = {
            name: (run, status)
            for run, name, status in database.execute("select run_uuid, name, status from runs")
        }
        yield SimpleNamespace(
            folder=folder,
            runs=runs,
            params={run: dict(rows) for run, rows in by_run("params", "key, value").items()},
            tags={run: dict(rows) for run, rows in by_run("tags", "key, value").items()},
            metrics=by_run("metrics", "key, step, value"),
        )


def test_mlflow_has_a_run_with_one_nested_run_for_each_checkpoint_and_block_size(stored):
    parts = {f"run-checkpoints-{step}-L{size}": (step, size) for step in (10, 20) for size in SIZES}
    assert set(stored.runs) == {"sweep", "run-checkpoints-bad", *parts}
    parent, status = stored.runs["sweep"]
    assert status == "FAILED" and stored.params[parent] == {"checkpoints": "3"}
    # The table is the page of the sweep.
    assert "| run" not in stored.tags[parent]["mlflow.note.content"]
    assert "| checkpoints/20 | 20 | 8 |" in stored.tags[parent]["mlflow.note.content"]
    bad, status = stored.runs["run-checkpoints-bad"]
    assert status == "FAILED" and stored.tags[bad]["mlflow.note.content"] == "bad is damaged"
    table = {(row["step"], row["block_size"]): row for row in read_table(stored.folder / "out")["rows"]}
    for name, (step, size) in parts.items():
        run, status = stored.runs[name]
        row = table[step, size]
        assert status == "FINISHED" and stored.tags[run]["mlflow.parentRunId"] == parent
        # Not the tag by which a run finds itself again.
        assert stored.tags[run]["bdtrain.sweep_of"] == "u-1" and "bdtrain.run_uid" not in stored.tags[run]
        params = stored.params[run]
        assert (params["step"], params["block_size"], params["winner"]) == (
            str(step),
            str(size),
            row["winner"],
        )
        points = {key: (at, value) for key, at, value in stored.metrics[run] if key.startswith("sched/")}
        assert set(points) <= set(METRICS) and len(points) == 8
        for key in ("variance", "variance_best", "gain", "p_best", "nelbo", "nelbo_error"):
            assert points[f"sched/{key}"] == (step, row[key])


def test_mlflow_draws_variance_against_range(stored):
    run, _ = stored.runs["run-checkpoints-20-L8"]
    report = json.loads((stored.folder / "out" / "run-checkpoints-20" / "report.json").read_text())
    found = {(key, step): value for key, step, value in stored.metrics[run] if key.startswith("range/")}
    expected = {}
    for one in report["results"]["8"]["candidates"]:
        begin, end = one["clip_range"] or (0.0, 1.0)
        name = "range/full_range" if end - begin == 1 else f"range/width_{round(end - begin, 3):g}"
        expected[name, round(1000 * begin)] = one["variance"]
        expected[f"{name}_error", round(1000 * begin)] = one["variance_error"]
    # Width 0.5 at 11 starts, 0.8 at 5, the full range; each with its error.
    assert found == expected and len(found) == 2 * (11 + 5 + 1)


def test_the_sweep_of_one_run_has_curves_over_its_steps(stored):
    parent, _ = stored.runs["sweep"]
    rows = read_table(stored.folder / "out")["rows"]
    found = {(key, step): value for key, step, value in stored.metrics[parent]}
    for row in rows:
        assert found[f"sched_L{row['block_size']}/gain", row["step"]] == row["gain"]
    assert {step for _, step in found} == {10, 20} and len(found) == 8 * len(rows)
    assert sweep_runs.parent_points([]) == []
    two = [SweepRow(**{**row, "run_uid": row["checkpoint"]}) for row in rows]
    assert sweep_runs.parent_points(two) == []


def test_files_of_the_runs_lie_beside_the_database(stored):
    kept = stored.folder / "mlflow-artifacts"
    for name, (run, _) in stored.runs.items():
        files = {path.name for path in (kept / run).rglob("*") if path.is_file()}
        if name == "sweep":
            assert files == {"sweep.json"}
        elif name.endswith("bad"):
            assert not files
        else:
            size = name[-1]
            assert "report.json" in files and any(file.startswith(f"variance-L{size}") for file in files)
    assert not list((stored.folder / "elsewhere").iterdir())


class FakeRuns:
    """Fails as often as it is told, and keeps what it is given."""

    def __init__(self, failures):
        self.failures, self.names, self.ends, self.made = failures, [], [], 0
        self.run_id = "r"

    def make(self, uri, experiment, name):
        self.fail()
        self.made += 1
        return self

    def fail(self):
        if self.failures:
            self.failures -= 1
            raise ConnectionError(f"nobody at http://me:{SECRET}@server")

    def log(self, run):
        self.fail()
        self.names.append(run.name)

    def finish(self, status, **more):
        self.fail()
        self.ends.append(status)


@pytest.mark.parametrize("failures", [0, 1, 2, 99])
def test_a_server_that_fails_costs_a_line_and_gets_the_rest_later(tmp_path, monkeypatch, capsys, failures):
    server = FakeRuns(failures)
    monkeypatch.setattr(sweep_runs, "NestedRuns", server.make)
    monkeypatch.setattr(sweep_runs, "quiet_environment", dict)
    checkpoints = [tmp_path / str(step) for step in (10, 20)]
    uri = f"http://me:{SECRET}@server"
    assert run_sweep(checkpoints, tmp_path / "out", of_name, mlflow_uri=uri) == 0
    assert len(read_table(tmp_path / "out")["rows"]) == 4
    said = capsys.readouterr().out
    assert SECRET not in said
    told = [line for line in said.splitlines() if line.startswith("MLflow: ")]
    names = [f"{name}-L{size}" for name in result_names(checkpoints) for size in SIZES]
    if failures == 99:
        assert server.names == [] and len(told) == 2
        assert told[0].startswith("MLflow: http://***@server takes nothing now: ConnectionError")
        assert told[1].startswith("MLflow: 4 runs and the end of the sweep could not be stored (Connection")
    else:
        assert (server.names, server.ends, server.made) == (names, ["FINISHED"], 1)
        assert len(told) == 1 + bool(failures) and told[-1] == "MLflow: run r in http://***@server"


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path, monkeypatch, capsys):
    server = FakeRuns(0)
    monkeypatch.setattr(sweep_runs, "NestedRuns", server.make)
    monkeypatch.setattr(sweep_runs, "quiet_environment", dict)
    monkeypatch.setattr(sweep_runs, "draw_refit", lambda *_: 1 / 0)
    drawn = []
    monkeypatch.setattr(server, "log", lambda run: drawn.extend(run.draw(tmp_path)))
    assert run_sweep([tmp_path / "10"], tmp_path / "out", of_name, mlflow_uri="http://server") == 0
    said = capsys.readouterr().out
    assert drawn == [] and said.count("no picture of ") == 2 and "division by zero" in said


def test_gradients_of_a_checkpoint_are_among_the_numbers_and_pictures_of_its_runs(tmp_path, monkeypatch):
    def gradients(results):
        # Of block size 8 none: a re-fit may leave one out.
        result = results[4]
        plans = [
            {"name": result.candidates[0].name, "gradient": 0.5, "gradient_error": 0.25, "loss": 3.0},
            {"name": result.winner, "gradient": 0.125, "gradient_error": 0.0625, "loss": 2.0},
        ]
        return {"4": {"plans": plans, "pearson": 0.75, "pearson_error": 0.1, "spearman": 0.5, "excess": 0.0}}

    logged, drawn = {}, {}
    server = FakeRuns(0)
    monkeypatch.setattr(sweep_runs, "NestedRuns", server.make)
    monkeypatch.setattr(sweep_runs, "quiet_environment", dict)
    monkeypatch.setattr(sweep_runs, "draw_refit", lambda shown, base: drawn.update({base.name: shown}) or [])
    monkeypatch.setattr(server, "log", lambda run: logged.update({run.name: run}) or run.draw(tmp_path))
    refit = measured(10, gradients=gradients)
    assert run_sweep([tmp_path / "10"], tmp_path / "out", refit, mlflow_uri="http://server") == 0
    four, eight = (
        {point.name: (point.step, point.value) for point in run.metrics if "gradient" in point.name}
        for run in logged.values()
    )
    values = {"variance": 0.5, "variance_error": 0.25, "variance_best": 0.125, "correlation": 0.75}
    values.update(excess=0.0, correlation_error=0.1, rank_correlation=0.5)
    assert four == {f"sched/gradient_{name}": (10, value) for name, value in values.items()} and not eight
    assert set(four) <= set(METRICS)
    assert drawn["variance-L4"].gradients[4]["pearson"] == 0.75 and drawn["variance-L4"].results.keys() == {4}
    assert drawn["variance-L8"].gradients == {} and drawn["variance-L8"].results.keys() == {8}


def test_a_long_table_is_cut_where_mlflow_shows_it_and_whole_where_it_is_printed(tmp_path):
    of_name(tmp_path / "10", tmp_path)
    (row, _), _ = read_rows(tmp_path / "10", tmp_path)
    rows = [replace(row, step=step) for step in range(60)]
    note = format_note(rows)
    assert note.count("\n| ") == 1 + 25 and note.endswith("and 35 more in sweep.json") and len(note) < 5000
    assert len(format_table(rows).splitlines()) == 61
