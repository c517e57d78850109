"""The steps of the evidence on a GPU: what they would run is there, and a limit loses nothing."""

import json
import shlex
import sys

import pytest

from bdtrain.config import load_config
from tools.bench import gpu_evidence, train_step

COMMANDS = [
    text for steps in (gpu_evidence.STEPS, gpu_evidence.TRIAL) for texts in steps.values() for text in texts
]


def run(tmp_path, monkeypatch, *texts, limit_s=60.0):
    monkeypatch.setattr(gpu_evidence, "STEPS", {"step": texts})
    monkeypatch.setattr(gpu_evidence, "GRACE_S", 1.0)
    well = gpu_evidence.run_step("step", tmp_path / "out", corpus=tmp_path, trial=False, limit_s=limit_s)
    result = json.loads((tmp_path / "out" / "step.json").read_text())
    return well, result, (tmp_path / "out" / "step.log").read_text()


def python(code):
    return f"-c {shlex.quote(code)}"


def test_a_trial_has_the_steps_of_the_evidence():
    assert list(gpu_evidence.TRIAL) == list(gpu_evidence.STEPS)


@pytest.mark.parametrize("text", COMMANDS)
def test_what_a_step_runs_is_there_and_takes_its_arguments(repository, monkeypatch, text):
    monkeypatch.chdir(repository)
    words = shlex.split(text.format(out="/out", corpus="/corpus"))
    files = [word for word in words if word.endswith((".py", ".yaml")) and not word.startswith("-")]
    assert files or words[:2] == ["-m", "pytest"]
    assert all((repository / word).is_file() for word in files)
    if words[0] == "tools/bench/train_step.py":
        train_step.parse_options(words[1:])
    if "--config" in words:
        place = words.index("--config") + 1
        config = load_config([words[place]], words[place + 1 :]).config
        assert "profile" not in text or config.profile.steps is not None


def test_the_whole_steps_cover_what_is_claimed_of_them():
    for preset in ("small", "1b"):
        every, again = gpu_evidence.STEPS[preset]
        options = train_step.parse_options(shlex.split(every)[1:])
        assert (options.preset, options.length, options.block_size) == ([preset], [1024, 4096], [4, 16, 64])
        once = train_step.parse_options(shlex.split(again)[1:])
        assert set(once.length) < set(options.length) and set(once.block_size) < set(options.block_size)


def test_all_commands_run_and_leave_what_they_said(tmp_path, monkeypatch):
    well, result, log = run(
        tmp_path,
        monkeypatch,
        python("import bdtrain_kernels, tools.bench; print('first')"),
        python("open('{out}/made', 'w').write('{corpus}')"),
    )
    assert well and [one["code"] for one in result["commands"]] == [0, 0]
    assert "first\n" in log and log.count("$ ") == 2
    assert (tmp_path / "out" / "made").read_text() == str(tmp_path)
    assert result["versions"]["torch"] and result["python"] and not result["trial"]


def test_one_that_fails_ends_its_step(tmp_path, monkeypatch):
    well, result, _ = run(tmp_path, monkeypatch, python("raise SystemExit(3)"), python("print('never')"))
    assert not well and [one["code"] for one in result["commands"]] == [3]


def test_at_the_limit_it_is_told_to_end_and_may_finish_its_work(tmp_path, monkeypatch):
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n    open('{out}/saved', 'w').close()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setattr(gpu_evidence, "GRACE_S", 20.0)
    monkeypatch.setattr(gpu_evidence, "STEPS", {"step": (python(code), python("print('never')"))})
    out = tmp_path / "out"
    assert not gpu_evidence.run_step("step", out, corpus=None, trial=False, limit_s=3.0)
    (one,) = json.loads((out / "step.json").read_text())["commands"]
    assert one["told_to_end"] and one["code"] == 0 and one["seconds"] < 20
    assert (out / "saved").exists()


def test_one_that_does_not_end_is_killed(tmp_path, monkeypatch):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    well, result, _ = run(tmp_path, monkeypatch, python(code), limit_s=2.0)
    (one,) = result["commands"]
    assert not well and one["told_to_end"] and one["code"] == -9


def test_training_needs_a_corpus_before_anything_is_run(tmp_path, capsys):
    for step in ("train", "all"):
        with pytest.raises(SystemExit) as ended:
            gpu_evidence.main([step, "--out", str(tmp_path / "out")])
        assert ended.value.code == 2
        assert "give --corpus, a folder that tools" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_exit_code_says_whether_all_went_well(tmp_path, monkeypatch):
    for code in (0, 4):
        steps = {"good": (python("pass"),), "other": (python(f"raise SystemExit({code})"),)}
        monkeypatch.setattr(gpu_evidence, "STEPS", steps)
        assert gpu_evidence.main(["all", "--out", str(tmp_path / str(code))]) == int(code != 0)
        names = {path.name for path in (tmp_path / str(code)).iterdir()}
        assert names == {"good.log", "good.json", "other.log", "other.json"}
    assert sys.executable in (tmp_path / "0" / "good.log").read_text()
