"""The committed runs fit the machines that their headers name, with the numbers that --check gives."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bdtrain.config import load_config, parse_command_line
from bdtrain.errors import ConfigError

RUNS = sorted((Path(__file__).parents[3] / "configs" / "run").glob("*.yaml"))
WORDS = ("What", "Hardware", "Time", "Reaches", "Command")
LONG = ("small-1gpu", "small-8gpu", "1b-8gpu", "7b-64gpu")
ON_GPUS = (*LONG, "books-1gpu")
GPU_GIB = 80e9 / 2**30


@pytest.fixture(autouse=True)
def _from_the_root(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def header(path: Path) -> dict[str, str]:
    """The comment above ``base:``: each word with its text, lines joined by newlines."""
    parts: dict[str, str] = {}
    word = ""
    for line in path.read_text(encoding="utf-8").split("\nbase:")[0].splitlines()[2:]:
        found = re.match(r"# ([A-Z]\w+) +(.*)", line)
        if found:
            word = found[1]
            parts[word] = found[2]
        else:
            parts[word] += "\n" + line.removeprefix("#").strip()
    return parts


def start_command(path: Path) -> list[str]:
    """The words of the command of the header that starts the run."""
    lines = header(path)["Command"].replace("\\\n", " ").splitlines()
    (command,) = [line for line in lines if "launchers/pretrain.py" in line]
    return shlex.split(command)


def size(command: list[str]) -> tuple[int, int]:
    """Nodes and ranks per node of a start command."""

    def option(name: str) -> int:
        return int(command[command.index(name) + 1]) if name in command else 1

    return option("--num_nodes"), option("--num_gpus")


def check_arguments(path: Path) -> list[str]:
    """What the start command gives to the launcher, and the size it starts, as a --check."""
    command = start_command(path)
    nodes, gpus = size(command)
    given = command[command.index("launchers/pretrain.py") + 1 :]
    return [*given, "--check", "--nodes", str(nodes), "--gpus", str(gpus)]


def gib(text: str, label: str) -> float:
    found = re.search(rf"  {label} +([\d.]+) (GiB|MiB|KiB)", text)
    assert found is not None
    return float(found[1]) / {"GiB": 1, "MiB": 1024, "KiB": 1024**2}[found[2]]


def preset(name: str) -> Path:
    return next(path for path in RUNS if path.stem == name)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_header_has_its_five_lines_and_starts_its_own_file(path: Path) -> None:
    parts = header(path)
    assert tuple(parts) == WORDS
    assert all(text.strip() for text in parts.values())
    command = start_command(path)
    assert command[command.index("--config") + 1] == f"configs/run/{path.name}"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_run_passes_check_on_the_machines_of_its_command(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = parse_command_line(check_arguments(path), "Train.")
    assert command.finished
    text = capsys.readouterr().out
    nodes, gpus = size(start_command(path))
    assert f"{nodes * gpus} rank" in text
    assert len(text.splitlines()) <= 24, "a plan is one screen"
    # CORPUS stands for the reader's folder.
    if "data.path=CORPUS" in start_command(path):
        assert "data.path=CORPUS is not on this machine: not checked" in text


def test_the_launcher_itself_plans_for_another_machine(repository: Path) -> None:
    path = preset("7b-64gpu")
    done = subprocess.run(
        [sys.executable, "launchers/pretrain.py", *check_arguments(path)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "64 ranks = tp 2 x pp 1 x dp 32, ZeRO 1, sequence parallel" in done.stdout
    assert "not on this machine" in done.stdout


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_run_on_gpus_says_what_check_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = preset(name)
    nodes, gpus = size(start_command(path))
    assert name.endswith(f"-{nodes * gpus}gpu")
    parts = header(path)
    assert f"--check --nodes {nodes} --gpus {gpus} " in parts["Command"]
    assert int(re.match(r"(\d+) GPU", parts["Hardware"])[1]) == nodes * gpus
    parse_command_line(check_arguments(path), "")
    text = capsys.readouterr().out

    peak = gib(text, "peak")
    assert int(re.search(r"about (\d+) GiB", parts["Hardware"])[1]) == round(peak)
    assert peak < 0.9 * GPU_GIB, "communication buffers and fragmentation need room too"

    time, unit, operations, count = re.search(
        r"about ([\d.]+) (days|minutes) of steps: (\S+) operations on (\d+) GPUs? at 200 TFLOP/s",
        parts["Time"],
    ).groups()
    assert int(count) == nodes * gpus
    assert float(operations) == pytest.approx(
        float(re.search(r"compute +(\S+) operations", text)[1]), rel=0.02
    )
    seconds = float(time) * {"days": 86400, "minutes": 60}[unit]
    assert seconds == pytest.approx(float(operations) / (int(count) * 200e12), rel=0.02)
    assert f"{time} {unit} at 200" in text
    assert "not run by us" in parts["Time"]
    assert "Not run by us" in parts["Reaches"]


@pytest.mark.parametrize("name", LONG)
def test_a_run_on_gpus_reads_enough_text_and_is_safe_to_leave_alone(name: str) -> None:
    config = load_config([preset(name)]).config
    from bdtrain.config import count_parameters

    assert config.model.vocab_size is not None, "without it --check leaves out embedding and head"
    total = count_parameters(config.model, config.model.vocab_size).total
    assert config.tokens_per_step * config.train.steps >= 20 * total
    assert config.train.precision == "bf16"
    assert config.run.name == name
    assert config.checkpoint.every_steps and config.validation.every_steps
    # Table 8 of the paper.
    best = {4: (0.45, 0.95), 16: (0.3, 0.8)}[config.diffusion.block_size]
    assert config.diffusion.plan.clip_range == best


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nodes", "3", "--gpus", "8"], "dp=12 does not divide global_batch_size=1024; choose dp from"),
        (["--nodes", "1", "--gpus", "7"], "world_size=7 is not a multiple of tp*pp=2"),
        (["--nodes", "8", "--gpus", "8", "parallel.tp=16"], "tp=16 does not divide num_kv_heads=8"),
        (["--nodes", "8", "--gpus", "8", "parallel.pp=5"], "pp=5 does not divide num_layers=36"),
    ],
)
def test_a_layout_that_cannot_be_is_one_clear_error(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(["--config", str(preset("7b-64gpu")), "--check", *arguments], "")
    assert expected in str(caught.value)
    assert caught.value.exit_code == 3


def test_only_a_plan_passes_over_a_corpus_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--config", str(preset("small-1gpu")), "--check"]
    absent = f"data.path={tmp_path / 'absent'}"
    with pytest.raises(ConfigError, match="does not exist"):
        parse_command_line([*run, absent], "")
    for plan in (["--nodes", "1"], ["--gpus", "1"]):
        assert parse_command_line([*run, absent, *plan], "").finished
        assert f"note       {absent} is not on this machine: not checked" in capsys.readouterr().out
    # What is here must be right, also in a plan.
    with pytest.raises(ConfigError, match=r"holds no index\.json"):
        parse_command_line([*run, f"data.path={tmp_path}", "--gpus", "1"], "")
    (tmp_path / "index.json").write_text("{}")
    parse_command_line([*run, f"data.path={tmp_path}", "--gpus", "1"], "")
    assert "note" not in capsys.readouterr().out
