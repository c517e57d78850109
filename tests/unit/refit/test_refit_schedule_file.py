"""schedule.json: what is written comes back, and whatever else lies there gives one clear error."""

import hashlib
import json
import math

import pytest

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import RefitError
from bdtrain.refit.schedule_file import (
    FORMAT,
    MAX_BYTES,
    SCHEDULE_FILE,
    Decision,
    Schedule,
    check_schedule,
    plan_digest,
    read_schedule,
    write_schedule,
)

CURRENT = NoisePlan(4, clip_range=(0.3, 0.8))
NEW = NoisePlan(4, clip_range=(0.45, 0.95))


def schedule(**changes):
    values = {
        "run_uid": "run-1",
        "snapshot_step": 40,
        "snapshot_sha256": "ab" * 32,
        "based_on": plan_digest(CURRENT),
        "version": 3,
        "decisions": {4: Decision(NEW, True, "better by 7.0%")},
    }
    return Schedule(**{**values, **changes})


def awaited(found, **changes):
    values = {
        "run_uid": "run-1",
        "snapshot_step": 40,
        "snapshot_sha256": "ab" * 32,
        "version": 3,
        "current": CURRENT,
    }
    return check_schedule(found, **{**values, **changes})


def signed(body):
    """A record with the digest that it should have, computed here."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def altered(change, *, sign=True):
    """A schedule's text after somebody's change of its record."""
    record = schedule().to_dict()
    digest = record.pop("sha256")
    change(record)
    return json.dumps(signed(record) if sign else {**record, "sha256": digest})


def refusal(tmp_path, content):
    path = tmp_path / SCHEDULE_FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RefitError) as found:
        read_schedule(path)
    text = str(found.value)
    assert str(path) in text and "\n" not in text.strip()
    return text


def plan_of(record):
    return record["decisions"]["4"]["plan"]


def test_what_is_written_comes_back(tmp_path):
    other = Decision(NoisePlan(16, density=(0.5, 1.5)), True, "of another block size")
    kept = Decision(CURRENT, False, "kept")
    for made in (schedule(), schedule(snapshot_sha256="", decisions={16: other, 4: kept})):
        path = write_schedule(tmp_path, made)
        assert path == tmp_path / SCHEDULE_FILE
        assert read_schedule(path) == made
        record = json.loads(path.read_text())
        assert record["format"] == FORMAT
        digest = record.pop("sha256")
        assert signed(record)["sha256"] == digest


def test_the_same_decision_has_the_same_bytes(tmp_path):
    two = {4: Decision(NEW, True, "a"), 16: Decision(NEW.with_block_size(16), False, "b")}
    texts = []
    for decisions in (two, dict(reversed(two.items()))):
        texts.append(write_schedule(tmp_path, schedule(decisions=decisions)).read_bytes())
    assert texts[0] == texts[1]
    assert write_schedule(tmp_path, schedule(version=4)).read_bytes() != texts[0]


def test_plans_that_draw_differently_have_different_digests():
    plans = [
        CURRENT,
        NEW,
        NoisePlan(4),
        NoisePlan(16),
        NoisePlan(4, kind="bernoulli"),
        NoisePlan(4, density=(1.0,)),
    ]
    assert len({plan_digest(plan) for plan in plans}) == len(plans)
    assert plan_digest(CURRENT) == plan_digest(NoisePlan.from_dict(CURRENT.to_dict()))


def test_every_torn_file_is_refused(tmp_path):
    whole = write_schedule(tmp_path, schedule()).read_bytes()
    for length in range(0, len(whole.rstrip()), 37):
        assert "is no schedule" in refusal(tmp_path, whole[:length])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "is no schedule", id="empty"),
        pytest.param("[]", "is no schedule", id="a list"),
        pytest.param("7", "is no schedule", id="a number"),
        pytest.param("null", "is no schedule", id="null"),
        pytest.param(b"\xff\xfe{}", "is no schedule", id="no text"),
        pytest.param("[" * 200_000, "is no schedule", id="deep"),
        pytest.param("{}", "has format None", id="no format"),
        pytest.param('{"format": "bdtrain-schedule/2"}', "this version reads", id="another format"),
        pytest.param('{"format": ["x"]}', "has format", id="a list for a format"),
        pytest.param(json.dumps({"format": FORMAT}), "is no schedule", id="no digest"),
        pytest.param(b" " * (MAX_BYTES + 1), f"larger than {MAX_BYTES}", id="huge"),
    ],
)
def test_what_is_no_schedule_is_refused(tmp_path, content, message):
    assert message in refusal(tmp_path, content)


def test_what_was_altered_without_its_digest_is_refused(tmp_path):
    def wider(record):
        plan_of(record)["clip_range"] = [0.3, 0.9]

    assert "altered or torn" in refusal(tmp_path, altered(wider, sign=False))
    assert "altered or torn" in refusal(tmp_path, altered(lambda r: r.update(version=4), sign=False))
    assert "altered or torn" in refusal(tmp_path, altered(lambda r: r.update(more=1), sign=False))
    swapped = altered(lambda r: r).replace("0.45", "0.46", 1)
    assert "altered or torn" in refusal(tmp_path, swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda r: plan_of(r).update(clip_range=[0.8, 0.3]), "0 <= beta < omega", id="range turned"
        ),
        pytest.param(lambda r: plan_of(r).update(clip_range=[0.3, 1.7]), "0 <= beta < omega", id="above 1"),
        pytest.param(lambda r: plan_of(r).update(clip_range=[0.3]), "two numbers", id="one bound"),
        pytest.param(
            lambda r: plan_of(r).update(clip_range=[0.3, 0.31], resample=True), "no k has", id="infeasible"
        ),
        pytest.param(lambda r: plan_of(r).update(density=[1.0, -1.0]), "density", id="negative density"),
        pytest.param(lambda r: plan_of(r).update(kind="guess"), "kind='guess'", id="unknown kind"),
        pytest.param(lambda r: plan_of(r).update(version=2), "version 2", id="plan of another version"),
        pytest.param(lambda r: plan_of(r).update(algo="other"), "algo='other'", id="another generator"),
        pytest.param(lambda r: plan_of(r).update(surplus=1), "unknown keys surplus", id="unknown key"),
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused_though_its_digest_is_right(tmp_path, change, message):
    text = refusal(tmp_path, altered(change))
    assert "holds a plan that cannot be drawn" in text and message in text


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda r: r.pop("decisions"), id="no decisions"),
        pytest.param(lambda r: r.pop("based_on"), id="no plan in use"),
        pytest.param(lambda r: r["decisions"]["4"].pop("adopt"), id="no adopt"),
        pytest.param(lambda r: r["decisions"]["4"].update(adopt="yes"), id="adopt is a word"),
        pytest.param(lambda r: r["decisions"]["4"].update(reason=None), id="no reason"),
        pytest.param(lambda r: r["decisions"]["4"].update(reason="two\nlines"), id="reason of two lines"),
        pytest.param(
            lambda r: r["decisions"]["4"].update(reason="\ud800"), id="reason that no console prints"
        ),
        pytest.param(lambda r: r["decisions"]["4"].update(reason="x" * 5000), id="reason without an end"),
        pytest.param(lambda r: r["decisions"].update(four=r["decisions"]["4"]), id="block size is a word"),
        pytest.param(lambda r: r.update(decisions=[1]), id="decisions are a list"),
        pytest.param(lambda r: r.update(version=True), id="version is true"),
        pytest.param(lambda r: r.update(version=-1), id="version below 0"),
        pytest.param(lambda r: r.update(snapshot_step=4.5), id="step is no whole number"),
        pytest.param(lambda r: plan_of(r).update(block_size=4.0), id="block size is no whole number"),
        pytest.param(lambda r: plan_of(r).update(resample="no"), id="resample is a word"),
        pytest.param(lambda r: plan_of(r).update(clip_range=[0, 10**400]), id="bound beyond floats"),
        pytest.param(lambda r: plan_of(r).update(clip_range="0.3"), id="range is a word"),
        pytest.param(lambda r: plan_of(r).update(schedule=["linear"]), id="schedule is a list"),
        pytest.param(lambda r: plan_of(r).pop("block_size"), id="plan without block size"),
    ],
)
def test_a_record_of_wrong_parts_is_refused_though_its_digest_is_right(tmp_path, change):
    refusal(tmp_path, altered(change))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_refused(tmp_path, number):
    text = altered(lambda r: r).replace("0.45", number, 1)
    assert f"{number} is no number of a schedule" in refusal(tmp_path, text)


def test_an_infinite_bound_is_refused(tmp_path):
    # JSON's own way to write it; the digest is of the number that was read.
    assert json.loads("1e999") == math.inf
    refusal(tmp_path, altered(lambda r: r).replace("0.45", "1e999", 1))


def test_a_missing_file_and_a_folder_in_its_place_are_told(tmp_path):
    with pytest.raises(RefitError, match="cannot be read: No such file"):
        read_schedule(tmp_path / SCHEDULE_FILE)
    with pytest.raises(RefitError, match="cannot be read: Is a directory"):
        read_schedule(tmp_path)


def test_the_awaited_schedule_gives_its_decision():
    assert awaited(schedule()) == Decision(NEW, True, "better by 7.0%")
    kept = Decision(CURRENT, False, "kept")
    assert awaited(schedule(decisions={16: Decision(NEW.with_block_size(16), True, ""), 4: kept})) == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_uid": "run-2"}, "run 'run-2', expected 'run-1'"),
        ({"snapshot_step": 39}, "snapshot step 39, expected 40"),
        ({"snapshot_sha256": ""}, "snapshot digest '', expected 'abab"),
        ({"version": 2}, "version 2, expected 3"),
        ({"based_on": plan_digest(NEW)}, "plan in use"),
        (
            {"decisions": {16: Decision(NEW.with_block_size(16), True, "")}},
            "no plan for block size 4 (it has 16)",
        ),
        ({"decisions": {}}, "it has none"),
        ({"decisions": {4: Decision(NEW.with_block_size(16), True, "")}}, "block size 16 under 4"),
        ({"decisions": {4: Decision(NEW, False, "")}}, "not the one in use, and yet not new"),
    ],
)
def test_a_schedule_of_something_else_is_refused(changes, message):
    with pytest.raises(RefitError) as found:
        awaited(schedule(**changes))
    assert str(found.value).startswith("a schedule of another re-fit: ") and message in str(found.value)


def test_all_that_differs_is_told_at_once():
    with pytest.raises(RefitError) as found:
        awaited(schedule(run_uid="x", snapshot_step=1, version=9, decisions={}))
    assert all(word in str(found.value) for word in ("run 'x'", "step 1", "version 9", "no plan"))


@pytest.mark.parametrize("change", [{"weighting": "flat"}, {"kind": "bernoulli"}, {"strata": "independent"}])
def test_a_plan_that_would_change_the_objective_is_refused(change):
    other = NoisePlan(4, clip_range=(0.45, 0.95), **change)
    with pytest.raises(RefitError, match="more than its range and its density"):
        awaited(schedule(decisions={4: Decision(other, True, "better")}))
