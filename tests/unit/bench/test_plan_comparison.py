"""The comparison of noise plans: paired by seed, errors of least squares, runs that can be made."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bdtrain.config import load_config
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.refit.history import RefitOutcome, append_outcome
from bdtrain.refit.snapshot import refit_folder
from tools.bench.plan_comparison import (
    PLANS,
    ComparisonError,
    check_same,
    compare,
    describe,
    main,
    measured_name,
    read_run,
    run_command,
    run_folder,
)


def by_seed(table, first=1):
    return {f"p{i}": {first + j: float(v) for j, v in enumerate(row)} for i, row in enumerate(table)}


def test_the_error_is_that_of_a_least_squares_fit_of_plans_and_seeds():
    table = np.random.default_rng(3).normal(5.0, 0.1, (4, 3))
    columns = [
        [float(i == p) for i in range(4)] + [float(j == s) for j in range(3)]
        for p in range(4)
        for s in range(3)
    ]
    design = np.array(columns)
    fitted, *_ = np.linalg.lstsq(design, table.ravel(), rcond=None)
    rest = table.ravel() - design @ fitted
    degrees = table.size - np.linalg.matrix_rank(design)
    result = compare(by_seed(table))
    assert result.degrees == degrees == 6
    assert result.error == pytest.approx(math.sqrt(rest @ rest / degrees), rel=1e-12)


def test_what_a_seed_does_to_all_plans_alike_is_no_error():
    seeds = np.array([0.0, 3.0, -2.0])
    result = compare(by_seed(np.array([[5.0], [5.5], [4.0]]) + seeds))
    assert result.error == pytest.approx(0.0, abs=1e-12)
    assert result.seed_spread == pytest.approx(seeds.std(ddof=1))
    np.testing.assert_allclose(result.differences(), [0.0, 0.5, -1.0])


def test_the_detectable_difference_is_seen_in_four_of_five_experiments():
    # Two plans that differ by just that much, errors known: how often is the difference above 1.96 errors?
    generator = np.random.default_rng(0)
    result = compare(by_seed(generator.normal(size=(8, 4))))
    error = result.error * math.sqrt(1 / 4 + 1 / 4)
    seen = generator.normal(result.detectable, error, 100_000) > 1.96 * error
    assert seen.mean() == pytest.approx(0.8, abs=0.01)


def test_only_seeds_that_all_plans_have_are_compared():
    values = {"a": {1: 5.0, 2: 6.0, 3: 9.0}, "b": {2: 6.5, 3: 9.5, 4: 1.0}}
    result = compare(values)
    assert result.seeds == (2, 3)
    np.testing.assert_allclose(result.differences(), [0.0, 0.5])
    with pytest.raises(ComparisonError, match="no seed has a run of every plan"):
        compare({"a": {1: 5.0}, "b": {2: 5.0}})
    with pytest.raises(ComparisonError, match="two or more"):
        compare({"a": {1: 5.0}})


@pytest.mark.parametrize("name", PLANS)
def test_every_run_of_the_comparison_is_one_that_the_trainer_takes(name, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "MANIFEST.json").write_text("{}")
    options = SimpleNamespace(
        out=tmp_path, corpus=tmp_path, base=base, block_size=16, steps=1000, sequences=1024
    )
    words = run_command(options, name, seed=7)
    loaded = load_config([Path(words[3])], words[4:]).config
    assert loaded.run.seed == 7 and loaded.train.steps == 1000 and loaded.optim.decay_steps == 500
    plan = loaded.diffusion.plan
    kind, _, interval = name.partition("-")
    if kind == "refit":
        assert loaded.refit.mode == interval and loaded.refit.placement == "inline"
        assert plan.kind == "count" and plan.clip_range is None
    else:
        assert loaded.refit.mode == "off" and plan.kind == kind
        expected = None if interval == "full" else tuple(float(part) for part in interval.split("-"))
        assert plan.clip_range == expected


def write_run(folder, nelbo, outcomes=(), interval=None):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"after": {"nelbo": nelbo, "nelbo_noise_error": 0.01}}))
    for number, outcome in enumerate(outcomes, 1):
        made = RefitOutcome(number, number + 1, outcome, "because", number, NoisePlan(4, clip_range=interval))
        append_outcome(refit_folder(folder), made)


def test_the_table_is_read_from_the_runs_that_are_there(tmp_path, capsys):
    for seed, shift in ((1, 0.0), (2, 0.25)):
        write_run(run_folder(tmp_path, "count-full", seed), 5.0 + shift)
        outcomes = ("adopted", "kept", "adopted") if seed == 1 else ("late", "kept")
        write_run(run_folder(tmp_path, "refit-counts", seed), 4.5 + shift, outcomes)
    assert main(["table", "--out", str(tmp_path), "--json", str(tmp_path / "t.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["refit-counts", "count-full"]
    assert rows[1][1:3] == ["4.6250", "-0.5000"] and rows[1][4] == "2 of 3, 0 of 2"
    stored = json.loads((tmp_path / "t.json").read_text())
    assert stored["seeds"] == [1, 2] and stored["nelbo"] == [[5.0, 5.25], [4.5, 4.75]]


def test_plans_that_cannot_be_told_from_the_best_are_named(tmp_path, capsys):
    values = {"count-full": (5.0, 5.101), "count-0.3-0.8": (4.5, 4.6), "bernoulli-0.3-0.8": (4.5005, 4.6)}
    for name, (first, second) in values.items():
        write_run(run_folder(tmp_path, name, 1), first)
        write_run(run_folder(tmp_path, name, 2), second)
    assert main(["table", "--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "within 2 standard errors of the least: count-0.3-0.8, bernoulli-0.3-0.8"


@pytest.fixture
def variances(tmp_path):
    """As tools/measure_variance.py writes them, but for what is not read."""

    def part(total):
        return {"total": total, "total_error": total / 10, "given_data": total / 2}

    plans = [
        {"name": name, "scale": scale, "loss_variance": part(loss), "gradient": part(gradient)}
        for name, scale, loss, gradient in (
            ("full range", 1.0, 0.03, 0.7),
            ("full range, bernoulli", 1.0, 0.12, 0.9),
            ("clip 0.3-0.8", 2.0, 0.005, 0.1),
            ("clip 0.5-1", 2.0, 0.002, 0.1),
        )
    ]
    path = tmp_path / "variances.json"
    path.write_text(json.dumps({"plans": plans}))
    return path


def test_variances_stand_beside_the_plans_that_they_are_of(tmp_path, capsys, variances):
    for seed in (1, 2):
        for name in ("bernoulli-full", "count-full", "count-0.3-0.8", "count-0.45-0.95"):
            write_run(run_folder(tmp_path, name, seed), 5.0 + seed)
        write_run(run_folder(tmp_path, "refit-clip", seed), 5.0, ("adopted", "kept"), (0.5, 1.0))
    assert main(["table", "--out", str(tmp_path), "--variances", str(variances)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {
        line.split(" | ")[0].strip("| "): line.rstrip(" |").split(" | ")[5:] for line in lines if "|" in line
    }
    assert rows["bernoulli-full"] == ["0.1200", "0.0600", "0.900 +- 0.090", "0.450"]
    assert rows["count-full"][0] == "0.0300"
    # Of a loss that carries the width of its range: at the scale of the others.
    assert rows["count-0.3-0.8"] == ["0.0200", "0.0100", "0.400 +- 0.040", "0.200"]
    assert rows["refit-clip"][0] == "0.0080"
    assert rows["count-0.45-0.95"] == ["not measured"]


def test_runs_that_adopted_different_plans_are_none_that_was_measured(tmp_path):
    for seed, interval in ((1, (0.5, 1.0)), (2, (0.3, 0.8))):
        write_run(run_folder(tmp_path, "refit-clip", seed), 5.0, ("adopted",), interval)
    runs = {seed: read_run(run_folder(tmp_path, "refit-clip", seed)) for seed in (1, 2)}
    assert measured_name("refit-clip", {1: runs[1]}) == "clip 0.5-1"
    assert measured_name("refit-clip", runs) is None


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"plans": [{"name": "full range"}]}'])
def test_a_file_without_variances_is_named(tmp_path, capsys, text):
    for name in ("count-full", "count-0.3-0.8"):
        write_run(run_folder(tmp_path, name, 1), 5.0)
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["table", "--out", str(tmp_path), "--variances", str(path)]) == 1
    assert f"{path} holds no variances" in capsys.readouterr().err


def test_one_seed_ranks_nothing(tmp_path):
    write_run(run_folder(tmp_path, "count-full", 1), 5.0)
    write_run(run_folder(tmp_path, "refit-clip", 1), 4.0)
    runs = {name: {1: read_run(run_folder(tmp_path, name, 1))} for name in ("count-full", "refit-clip")}
    text = describe(compare({name: {1: run[1]["nelbo"]} for name, run in runs.items()}), runs)
    assert text.startswith("one seed (1): no errors, so nothing is ranked") and "nan" not in text


def test_a_run_without_a_result_is_named(tmp_path, capsys):
    folder = run_folder(tmp_path, "count-full", 1)
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"after": None}))
    assert main(["table", "--out", str(tmp_path)]) == 1
    assert f"{folder} has no result" in capsys.readouterr().err


def test_runs_of_different_experiments_are_not_mixed(tmp_path):
    facts = {"base": tmp_path, "corpus": tmp_path, "block_size": 4, "steps": 1000, "sequences": 64}
    check_same(SimpleNamespace(out=tmp_path, **facts))
    check_same(SimpleNamespace(out=tmp_path, **facts))
    with pytest.raises(ComparisonError, match="steps: 1000 there, 500 now"):
        check_same(SimpleNamespace(out=tmp_path, **{**facts, "steps": 500}))
