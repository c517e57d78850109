"""What the quickstart holds out, where it works, and what it does not take away."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bdtrain.data.preprocess import document_hash


@pytest.fixture
def tool(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_tool", repository / "tools" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart_tool", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [2, 3, 5, 400])
def test_some_document_is_held_out_and_some_is_not(tool: ModuleType, tmp_path: Path, count: int) -> None:
    texts = [f"text number {number}, and what it says" for number in range(count)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    train, held_out = tool.choose_held_out(str(tmp_path), tmp_path / "parts")
    option, fraction = held_out.split()
    out = sum(document_hash(text.encode()) < float(fraction) for text in texts)
    assert (shlex.split(train), option) == ([str(tmp_path)], "--valid-fraction")
    assert 1 <= out < count
    # A share of many, one of few.
    assert out == 1 or float(fraction) == pytest.approx(0.04)


def test_single_document_is_cut_and_nothing_of_it_is_lost(tool: ModuleType, tmp_path: Path) -> None:
    text = "abcdefghij" * 100 + "ü"
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    train, held_out = tool.choose_held_out(str(tmp_path / "one.txt"), tmp_path / "my parts")
    (trained,) = shlex.split(train)
    option, rest = shlex.split(held_out)
    assert option == "--valid-input"
    parts = [Path(tool.ROOT, name).read_text(encoding="utf-8") for name in (trained, rest)]
    assert "".join(parts) == text
    assert len(parts[1]) == 101


def test_folder_in_which_a_quickstart_works_is_not_moved_away(tool: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    folder.mkdir()
    (folder / tool.MARKER).touch()
    with (
        tool.held(folder),
        pytest.raises(SystemExit, match=r"another quickstart is at work in .*; wait for it"),
    ):
        tool.make_way(folder)
    assert folder.exists()
    tool.make_way(folder)
    assert not folder.exists()
    assert (tmp_path / "quickstart.1" / tool.MARKER).exists()


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "runs/quickstart"),
        (["--input", "{texts}"], "runs/quickstart-my-texts"),
        (["--input", "{texts}", "--folder", "runs/other"], "runs/other"),
    ],
)
def test_own_text_has_a_folder_of_its_own(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    folder: str,
) -> None:
    texts = tmp_path / "my texts"
    texts.mkdir()
    words = [word.format(texts=texts) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *words])
    assert tool.parse().folder == Path(folder).resolve()
