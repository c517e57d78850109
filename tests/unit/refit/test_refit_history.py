"""The history of a run's re-fits: every line survives, a crash costs one, and what is damaged is told."""

import json

import pytest

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import RefitError
from bdtrain.refit.history import HISTORY_FILE, OUTCOMES, RefitOutcome, append_outcome, read_history


def outcome(step=10, **changes):
    values = {
        "snapshot_step": step,
        "adopt_step": step + 4,
        "outcome": "adopted",
        "reason": "better",
        "version": 1,
        "plan": NoisePlan(4, clip_range=(0.3, 0.8)),
        "metrics": {"sched/gain": 0.1 + 0.2},
    }
    return RefitOutcome(**{**values, **changes})


def test_lines_come_back_bit_for_bit(tmp_path):
    folder = tmp_path / "refit"
    assert read_history(folder) == {}
    written = [outcome(10 * n, outcome=name, version=n) for n, name in enumerate(OUTCOMES, start=1)]
    for one in written:
        append_outcome(folder, one)
    found = read_history(folder)
    assert list(found.values()) == written and list(found) == [10, 20, 30, 40, 50]
    # Metrics are compared bit for bit after a restart.
    assert found[10].metrics["sched/gain"].hex() == (0.1 + 0.2).hex()


def test_the_last_outcome_of_a_snapshot_counts(tmp_path):
    first, last = outcome(outcome="late", version=0), outcome(version=1)
    for one in (first, outcome(20), last):
        append_outcome(tmp_path, one)
    assert read_history(tmp_path)[10] == last


@pytest.mark.parametrize("kept", [0, 1, 25, -1])
def test_a_line_that_a_crash_tore_costs_itself_only(tmp_path, kept):
    append_outcome(tmp_path, outcome(10))
    path = tmp_path / HISTORY_FILE
    line = path.read_bytes()
    path.write_bytes(line + line[: kept if kept >= 0 else len(line) - 2])
    assert list(read_history(tmp_path)) == [10]
    append_outcome(tmp_path, outcome(20))
    append_outcome(tmp_path, outcome(30))
    assert read_history(tmp_path) == {step: outcome(step) for step in (10, 20, 30)}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(outcome="perhaps"),
        lambda record: record.pop("plan"),
        lambda record: record.pop("adopt_step"),
        lambda record: record.update(metrics=[1]),
        lambda record: record.update(metrics={"sched/gain": None}),
        lambda record: record.update(version="one"),
        lambda record: record.update(version=1e999),
        lambda record: record["plan"].update(clip_range=[0.9, 0.1]),
        lambda record: record["plan"].update(algo="another generator"),
        lambda record: record.update(plan=None),
    ],
)
def test_a_whole_line_that_is_none_of_ours_is_told(tmp_path, change):
    record = outcome().to_dict()
    change(record)
    (tmp_path / HISTORY_FILE).write_text(json.dumps(record) + "\n")
    with pytest.raises(RefitError, match=r"a line of history\.jsonl is no outcome"):
        read_history(tmp_path)


@pytest.mark.parametrize("line", ["7", "null", "[1]", '"text"'])
def test_a_line_of_something_else_is_told(tmp_path, line):
    append_outcome(tmp_path, outcome())
    with (tmp_path / HISTORY_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RefitError):
        read_history(tmp_path)


def test_a_disk_that_refuses_is_heard(tmp_path):
    (tmp_path / "refit").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        append_outcome(tmp_path / "refit", outcome())
