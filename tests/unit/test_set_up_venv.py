"""The set-up tool: when it does nothing, what it pins, and what it says."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def tool(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, on an empty folder with the repository's three files."""
    spec = importlib.util.spec_from_file_location("set_up_venv", repository / "tools" / "set_up_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "set_up_venv", module)
    spec.loader.exec_module(module)
    for name in module.SOURCES:
        (tmp_path / name).write_bytes((repository / name).read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / ".stamp")
    monkeypatch.setattr(module, "LOG", tmp_path / ".venv" / "install.log")
    return module


def test_a_stamp_fits_until_a_file_or_a_choice_changes(tool: ModuleType, tmp_path: Path) -> None:
    stamp = tool.Stamp(tool.digest_of_sources(), "3.11", "cpu", ("dev", "ray"))
    assert tool.fits(stamp, stamp)
    assert tool.fits(stamp, replace(stamp, extras=()))
    assert tool.fits(stamp, replace(stamp, extras=("ray",)))
    for change in ({"extras": ("dev", "mlflow")}, {"torch": "cuda"}, {"python": "3.12"}):
        assert not tool.fits(stamp, replace(stamp, **change)), change
    for name in tool.SOURCES:
        before = tool.digest_of_sources()
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert tool.digest_of_sources() != before, name


def test_a_fresh_environment_is_left_alone(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def set_up(wanted: object, recorded: object) -> None:
        calls.append(wanted)

    monkeypatch.setattr(tool, "set_up", set_up)
    assert tool.main(["--torch", "cpu", "--extras", "dev"]) == 0
    assert [stamp.extras for stamp in calls] == [("dev",)]
    python = tool.VENV / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    tool.STAMP.write_text(tool.json.dumps(tool.asdict(calls[0])))
    assert tool.main(["--torch", "cpu"]) == 0
    assert tool.main(["--extras", "dev"]) == 0
    assert len(calls) == 1
    # More extras: what was there stays.
    assert tool.main(["--extras", "ray"]) == 0
    assert calls[1].extras == ("dev", "ray")
    tool.STAMP.write_text("{")
    assert tool.main(["--extras", "dev"]) == 0
    assert len(calls) == 3


def test_the_default_torch_follows_the_machine(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    assert tool.choose_torch("auto", None) == "cpu"
    monkeypatch.setattr(tool.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert tool.choose_torch("auto", None) == "cuda"
    assert tool.choose_torch("installed", None) == "installed"
    assert tool.choose_torch("auto", tool.Stamp("", "3.11", "cpu", ())) == "cpu"


def test_pins_of_what_the_machine_decides_are_left_out(tool: ModuleType) -> None:
    text = tool.constraints_without({"torch", "mlflow-skinny"})
    assert "torch==" not in text
    assert "mlflow_skinny" not in text
    assert "mlflow-skinny==" not in text
    assert "mlflow==" in text


def test_sizes_are_said_before_anything_is_fetched(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise tool.SetUpError("stopped")

    monkeypatch.setattr(tool, "make_venv", stop)
    assert tool.main(["--torch", "cpu", "--extras", "dev,ray"]) == 2
    printed = capsys.readouterr()
    together = sum(tool.SIZES_MB[part] for part in ("cpu", "base", "dev", "ray"))
    assert f"{together} MB" in printed.out
    assert "set-up failed: stopped" in printed.err


def test_a_full_disk_is_refused_with_the_numbers(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e9})())
    assert tool.main(["--torch", "cuda"]) == 2
    assert "1.0 GB are free" in capsys.readouterr().err
    assert not tool.VENV.exists()


def test_ci_runs_the_checks_and_the_test_command(repository: Path) -> None:
    script = repository / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make test")


def test_only_what_is_missing_is_announced(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tool.Stamp("d", "3.11", "cpu", ())
    more = replace(base, extras=("dev", "mlflow"))
    everything = sum(tool.SIZES_MB[name] for name in ("cpu", "base", "dev", "mlflow"))
    changed = [replace(more, **change) for change in ({"torch": "cuda"}, {"python": "3.12"}, {"digest": "e"})]
    # Without its interpreter a recorded .venv is made anew.
    for recorded, exists in ((None, True), *((stamp, True) for stamp in changed), (more, False)):
        monkeypatch.setattr(tool, "works", lambda exists=exists: exists)
        tool.announce(more, recorded)
        assert f"together {everything:>43} MB".split() == capsys.readouterr().out.splitlines()[-1].split()
    monkeypatch.setattr(tool, "works", lambda: True)
    tool.announce(more, replace(base, extras=("dev",)))
    said = capsys.readouterr().out
    assert f"{tool.SIZES_MB['mlflow']} MB" in said
    assert "torch 2" not in said and "[dev]" not in said and "together" not in said
    tool.announce(more, more)
    said = capsys.readouterr().out
    assert " MB" not in said and "The rest is there" in said
