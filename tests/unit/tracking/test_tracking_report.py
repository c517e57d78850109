"""The report of a run: its curves are the numbers of the metrics file, and its texts stay texts."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdtrain.tracking.jsonl import MetricsLog, read_metrics
from bdtrain.tracking.report.columns import read_columns
from bdtrain.tracking.report.curves import format_error, format_value
from bdtrain.tracking.report.read import read_run
from tests.unit.tracking.report_run import live_lock, make_run, read_page, train_line, validation_line


def test_every_drawn_value_is_that_of_the_metrics_file(tmp_path: Path) -> None:
    page, _ = read_page(make_run(tmp_path))
    reports = read_metrics(tmp_path / "metrics.jsonl")
    for name, curve in page.plotted().items():
        expected = [(line["step"], line[name]) for line in reports if name in line]
        assert list(zip(curve["steps"], curve["values"], strict=True)) == expected, name
        corners = page.lines(name)
        assert len(corners) == len(expected)
        # Both coordinates are affine in what they stand for; the vertical one points down.
        for picked, number in ((0, 0), (1, 1)):
            places = [corner[picked] for corner in corners]
            wanted = [float(pair[number]) for pair in expected]
            spread = max(wanted) - min(wanted)
            if spread == 0:
                assert len(set(places)) == 1
                continue
            low, high = places[wanted.index(min(wanted))], places[wanted.index(max(wanted))]
            assert (high > low) == (number == 0)
            for place, value in zip(places, wanted, strict=True):
                share = (value - min(wanted)) / spread
                assert place == pytest.approx(low + share * (high - low), abs=0.11)


def test_axes_are_steps_tokens_cpu_and_wall_time(tmp_path: Path) -> None:
    page, _ = read_page(make_run(tmp_path))
    ids = [attributes.get("id") for tag, attributes in page.tags if tag == "input"]
    assert ids == ["pick-steps", "pick-tokens", "pick-cpu", "pick-wall"]
    # 100 tokens a step: the curve over tokens is the one over steps, where steps begin at 0.
    over_steps, over_tokens = page.lines("val/nelbo"), page.lines("val/nelbo", "tokens")
    assert over_steps == over_tokens
    assert len(page.lines("train/loss", "cpu")) == 20


def test_key_numbers_have_their_errors(tmp_path: Path) -> None:
    page, _ = read_page(make_run(tmp_path))
    cards = " ".join(page.texts["small"])
    # NELBO: sqrt(0.03^2 + 0.04^2) = 0.05; bits per byte: half of it, as the value; PPL: e^3 times it.
    assert "± 0.05; 5.000 before training" in cards
    assert "± 0.025; 2.500 before training" in cards
    assert "± 1; 148.4 before training" in cards
    assert any(text.startswith("20.09") for text in page.texts["b"])


def test_baselines_of_the_same_text_stand_beside_the_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    other = {"nelbo": 9.0, "tokens": 5000, "manifest": {"checkpoint": "else/other/checkpoint"}}
    (tmp_path / "evaluation-other.json").write_text(json.dumps(other))
    page, content = read_page(run)
    assert "unigram" not in content
    weights = f"elsewhere/{tmp_path.name}/run/checkpoints/step-000000020"  # the run was moved since
    evaluation = {
        "nelbo": 3.0,
        "bpb": 1.5,
        "tokens": 5000,
        "manifest": {"checkpoint": weights, "text": "corpus", "split": "valid", "step": 20},
        "baselines": {"unigram_bpb": 2.125, "bigram_bpb": 1.25, "gzip_bpb": 1.75},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page, content = read_page(run)
    assert [text for text in page.texts["output"] if text] == ["2.500", "2.125", "1.250", "1.750", "1.500"]
    assert "else/other" not in content
    # A text of its own in the run's folder: a row of its own, no baseline of the validation text.
    (run / "evaluation-ptb.json").write_text(json.dumps({"nelbo": 4.5, "manifest": {"text": "ptb.txt"}}))
    page, _ = read_page(run)
    assert {"ptb.txt", "corpus, valid"} <= set(page.texts["td"])


def test_evaluations_of_another_run_are_not_this_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one" / "run")
    twin = tmp_path / "two" / "run" / "checkpoint"
    mine = run / "checkpoint"
    for weights in (twin, mine):
        weights.mkdir(parents=True)

    def evaluate(path: Path, weights: object, text: str) -> None:
        manifest = {"checkpoint": str(weights), "text": text}
        path.write_text(json.dumps({"nelbo": 3.0, "manifest": manifest}))

    evaluate(run.parent / "evaluation-twin.json", twin, "twin")
    # It is there under another name, so the likeness of the names does not count.
    same = tmp_path / "copy" / "one" / "run" / "checkpoint"
    same.mkdir(parents=True)
    evaluate(run.parent / "evaluation-copy.json", same, "copy")
    evaluate(run.parent / "evaluation-gone.json", "/gone/two/run/checkpoint", "gone")
    evaluate(run.parent / "evaluation-none.json", "", "none")
    evaluate(run.parent / "evaluation-mine.json", mine, "mine")
    evaluate(run.parent / "evaluation-moved.json", "/gone/one/run/checkpoint", "moved")
    evaluate(run / "evaluation.json", mine, "inside")
    evaluate(run.parent / "evaluation.json", mine, "beside")
    page, _ = read_page(run)
    texts = {"twin", "copy", "gone", "none", "mine", "moved", "inside", "beside"}
    assert texts & set(page.texts["td"]) == {"mine", "moved", "inside"}


def test_only_a_validation_at_step_zero_is_before_training(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        for step in (10, 20):
            log.write(step, validation_line(5.0 - step / 10))
    _, content = read_page(tmp_path)
    assert "Held-out text at step 20" in content
    assert "before training" not in content


def test_cpu_time_begins_at_zero(tmp_path: Path) -> None:
    # Step 10 of 20 is the first one with a CPU time, of 100 s: step 0 lies at 0 s, not at 100 s.
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        log.write(0, validation_line(5.0))
        for step in (10, 20):
            log.write(step, {"perf/cpu_seconds": 10.0 * step})
            log.write(step, validation_line(4.0))
    page, _ = read_page(tmp_path)
    assert page.lines("val/nelbo", "cpu") == page.lines("val/nelbo", "steps")


def test_metric_that_the_page_does_not_list_is_drawn_folded(tmp_path: Path) -> None:
    start = {"step": 0, "attempt": 1, "time": 1.0, "event": "start"}
    lines = [start]
    for step in range(1, 1001):
        own = {"mine/new": math.sin(step), "perf/mfu": 0.5, "mine/word": "fast", "mine/http://me:sekret@h": 1}
        lines.append({"step": step, "attempt": 1, "time": 1.0 + step, "train/loss": 2.0, **own})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, content = read_page(tmp_path)
    figures = [attributes["data-metric"] for tag, attributes in page.tags if tag == "figure"]
    assert figures == ["train/loss", "mine/http://***@h", "mine/new", "perf/mfu"]
    assert set(page.plotted()) == set(figures)
    assert "sekret" not in content
    own = page.plotted()["mine/new"]
    assert 150 < len(own["steps"]) <= 200
    assert all(value == math.sin(step) for step, value in zip(own["steps"], own["values"], strict=True))
    assert content.index("<summary>other metrics") > content.index('data-metric="train/loss"')
    assert content.index("<summary>other metrics") < content.index('data-metric="mine/new"')
    # The line with a word still counts, and the loss has its every value.
    assert page.plotted()["train/loss"]["steps"] == list(range(1, 1001))


@pytest.mark.parametrize("when", ["1e300", "NaN", "-1e400"])
def test_impossible_times_do_not_keep_the_page_away(tmp_path: Path, when: str) -> None:
    lines = f'{{"step": 0, "attempt": 1, "time": {when}, "event": "start"}}\n'
    lines += "".join(
        f'{{"step": {step}, "attempt": 1, "time": {time}, "train/loss": 2.0}}\n'
        for step, time in ((1, "5.0"), (2, when))
    )
    (tmp_path / "metrics.jsonl").write_text(lines)
    page, _ = read_page(tmp_path)
    assert page.plotted()["train/loss"]["values"][0] == 2.0


def test_live_process_of_another_user_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, end=None)
    live_lock(run, os.getpid())

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert read_run(run).state == "running"


def test_numbers_take_the_form_of_what_is_shown() -> None:
    values = {
        999.97: "1,000",
        999.4: "999.4",
        0.99996: "1.000",
        0.5: "0.5",
        -999.97: "-1,000",
        1228.4: "1,228",
    }
    assert {value: format_value(value) for value in values} == values
    errors = {99.7: "100", 99.4: "99", 0.0512: "0.051", 9.96: "10", 123.4: "123", 1234.5: "1,234"}
    assert {error: format_error(error) for error in errors} == errors


def test_text_of_the_model_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    hostile = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)> &lt;b&gt;"
    hostile += " \x00\x1b[31m\ud800 \u202e"
    secret = "http://me:sekret@host"
    lines = [{"step": 0, "text": "tame"}, {"step": "<b1>", "prompt": "<u>", "text": hostile}]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "te')
    with MetricsLog(run / "metrics.jsonl", 2) as log:
        log.event("start", 20, world_size=1, changed=[["a", "<script>", 2], "odd"])
        log.event("failed", 20, reason="error", error=f"<script>alert(3)</script> </title> {secret} \x1b[2J")
    (run / "EXIT.json").unlink()
    page, content = read_page(run)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "points"}, {}]
    assert not {"img", "b1", "u"} & {tag for tag, _ in page.tags}
    (shown,) = (text for text in page.texts["pre"] if "alert(1)" in text)
    assert shown.startswith("</pre></script><script>alert(1)</script><img src=x onerror=alert(2)> &lt;b&gt;")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", content)
    assert "sekret" not in content
    assert sum("http://***@host" in text for text in page.texts["title"]) > 4
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)


def test_page_loads_nothing_and_holds_no_credentials(tmp_path: Path) -> None:
    page, content = read_page(make_run(tmp_path))
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href", "xlink:href"} & set(attributes) for _, attributes in page.tags)
    assert "@import" not in content
    assert "url(" not in content
    assert "default-src 'none'" in content
    assert "secret-word" not in content
    assert "prefers-color-scheme: dark" in content


def test_header_says_in_words_how_the_run_stands(tmp_path: Path) -> None:
    def state(folder: Path) -> str:
        page, _ = read_page(folder)
        at = [attributes.get("class") for tag, attributes in page.tags if tag == "span"].index
        kinds = ("finished", "stopped", "failed", "running", "killed")
        classes = [attributes.get("class") for tag, attributes in page.tags if tag == "span"]
        (found,) = (name for name in classes if name and name.removeprefix("state ") in kinds)
        return page.texts["span"][at(found)]

    assert state(make_run(tmp_path / "a")) == "Finished at step 20."
    stopped = state(make_run(tmp_path / "b", end="stop"))
    assert stopped == "Stopped by SIGTERM at step 20 and saved; the same command continues the run."
    killed = make_run(tmp_path / "c", end=None)
    assert state(killed).startswith(
        "Killed without notice, last heard of at step 20; the same command begins anew"
    )
    live_lock(killed, os.getpid())
    assert state(killed) == "Running, last heard of at step 20."
    os.utime(killed / ".lock", (time.time() - 300,) * 2)
    (killed / "checkpoints" / "step-000000010").mkdir(parents=True)
    assert state(killed).endswith("the same command continues from step-000000010.")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    live_lock(killed, child.pid)
    assert state(killed).startswith("Killed")
    # The disk was full when EXIT.json was due.
    full = make_run(tmp_path / "d")
    (full / "EXIT.json").unlink()
    assert state(full) == "Finished at step 20."


def test_attempts_and_faults_are_marked_on_the_curves_and_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=10, end=None)
    with MetricsLog(run / "metrics.jsonl", 2) as log:
        log.event("start", 6, world_size=2, checkpoint="step-000000006")
        log.event("skipped", 7, loss=float("nan"), rows=[28, 31])
        for step in range(7, 13):
            log.write(step, train_line(step, 2.0))
        log.event("checkpoint", 12, folder="step-000000012", bytes=1000)
    page, _ = read_page(run)
    figures = sum(tag == "figure" for tag, _ in page.tags)
    marks = [attributes.get("class") for tag, attributes in page.tags if tag == "g"]
    # Six of its own; folded and without marks: tokens, CPU time, skipped steps, PPL, validation tokens.
    assert figures == 6 + 5
    assert marks.count("attempt") == 6 * 4
    assert marks.count("fault") == 6 * 4
    cells = " | ".join(page.texts["td"])
    assert "attempt 2 began from step-000000006, 2 ranks" in cells
    assert "step skipped, not finite: loss nan, rows [28, 31]" in cells
    assert "checkpoint checkpoints/step-000000012, 1kB (deleted since)" in cells
    assert page.plotted()["train/loss"]["steps"] == list(range(1, 13))
    assert page.plotted()["train/loss"]["values"][6:] == [2.0] * 6
    # The second attempt's CPU clock began anew: its seconds come on top of the 20 of the first one.
    last = read_columns(run / "metrics.jsonl")
    assert last.cpu_before == {1: 0.0, 2: 20.0}


def test_clip_range_that_parts_training_from_validation_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert "clip range" not in read_page(folder)[1].split("<details>")[0]
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("block_size: 4}", "block_size: 4, plan: {clip_range: [0.3, 0.8]}}"))
    assert "clip range [0.3, 0.8] of the training loss" in read_page(folder)[1]
