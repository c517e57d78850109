from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtrain.data import text as text_module
from bdtrain.data.text import (
    Piece,
    TextOptions,
    describe_inputs,
    find_inputs,
    plan_tasks,
    read_documents,
    sample_texts,
)
from bdtrain.errors import DataError

PLAIN = TextOptions()


def read_tasks(paths: list[Path], options: TextOptions, task_bytes: int | None) -> list[str]:
    tasks = plan_tasks(describe_inputs(paths), task_bytes)
    return [
        document.text or f"!{document.fault}"
        for task in tasks
        for piece in task
        for document in read_documents(piece, options)
    ]


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), max_size=12),
    task_bytes=st.integers(1, 200),
    final_newline=st.booleans(),
)
def test_ranges_of_any_size_give_every_line_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], task_bytes: int, final_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.jsonl"
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_bytes(content.encode() + b"\n" * final_newline)
    assert read_tasks([path], PLAIN, task_bytes) == texts


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.text("abé\n-", max_size=8), min_size=1, max_size=8), block=st.integers(1, 9))
def test_separated_documents_do_not_depend_on_how_the_file_is_read(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], block: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.txt"
    content = "<--->".join(parts)
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "_READ_BYTES", block)
        found = read_tasks([path], TextOptions(document_separator="<--->"), None)
    assert found == [part for part in content.split("<--->") if part]


def test_compressed_and_plain_lines_are_the_same_documents(tmp_path: Path) -> None:
    lines = b'{"text": "one"}\n\n{"text": ""}\n{"text": "two\\n"}'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert read_tasks([tmp_path / name], PLAIN, None) == ["one", "two\n"]


def test_a_plain_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    content = "\ufeffa\r\nb\n\n\n c \n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert read_tasks([tmp_path / "a.txt"], PLAIN, None) == [content]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"text": "\xff"}', "not_utf8"),
        (b'{"text": ', "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b"[1]", "missing_field"),
        (b'{"body": "x"}', "missing_field"),
        (b'{"text": 3}', "missing_field"),
        (b'{"text": "\\ud800"}', "lone_surrogate"),
    ],
)
def test_a_faulty_line_has_its_kind_and_place(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + line + b'\n{"text": "after"}\n')
    documents = list(read_documents(Piece(str(path), 0, path.stat().st_size), PLAIN))
    assert [document.fault for document in documents] == [None, fault, None]
    assert documents[1].place.startswith(f"{path}, line 2")
    assert documents[2].text == "after"


def test_a_plain_file_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n--\nab\xe9cd")
    piece = Piece(str(path), 0, 13)
    whole = list(read_documents(piece, PLAIN))
    parts = list(read_documents(piece, TextOptions(document_separator="--\n")))
    assert [document.place for document in (whole[0], parts[1])] == [f"{path}, byte 10"] * 2


def test_a_damaged_gz_and_a_vanished_file_are_errors_not_documents(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "abcdefgh"}\n' * 500)
    for name, content in (
        ("cut", whole[:-20]),
        ("flip", whole[:30] + b"\0\0\0" + whole[33:]),
        ("no", b"plain"),
    ):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.jsonl.gz is damaged"):
            list(read_documents(Piece(str(path), 0, len(content)), PLAIN))
    with pytest.raises(DataError, match=r"cannot read .*gone.txt"):
        list(read_documents(Piece(str(tmp_path / "gone.txt"), 0, 5), PLAIN))


def test_folders_patterns_and_files_are_found_once_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.jsonl.gz", "skip.csv", "sub/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(patterns: list[str], options: TextOptions = PLAIN) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_inputs(patterns, options)]

    assert names([str(tmp_path)]) == ["a.jsonl", "b.txt", "sub/c.jsonl.gz"]
    assert names([str(tmp_path / "*.txt"), str(tmp_path)]) == ["b.txt", "a.jsonl", "sub/c.jsonl.gz"]
    assert names([str(tmp_path / "skip.csv")]) == ["skip.csv"]
    assert "sub/d.py" in names([str(tmp_path)], TextOptions(text_suffixes=(".py",)))
    with pytest.raises(DataError, match=r"--input .*nothing\*: no such file"):
        find_inputs([str(tmp_path / "nothing*")], PLAIN)
    (tmp_path / "x.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x.parquet cannot be read; allowed are"):
        find_inputs([str(tmp_path / "x.parquet")], PLAIN)


def test_the_plan_groups_small_files_cuts_lines_and_leaves_gz_alone() -> None:
    inputs = [
        ("a.txt", 40, ""),
        ("b.txt", 50, ""),
        ("c.txt", 30, ""),
        ("d.jsonl", 250, ""),
        ("e.jsonl.gz", 10, ""),
    ]
    tasks = plan_tasks(inputs, 100)
    assert [[(piece.path, piece.start, piece.end) for piece in task] for task in tasks] == [
        [("a.txt", 0, 40), ("b.txt", 0, 50)],
        [("c.txt", 0, 30)],
        [("d.jsonl", 0, 100)],
        [("d.jsonl", 100, 200)],
        [("d.jsonl", 200, 250)],
        [("e.jsonl.gz", 0, 10)],
    ]
    assert plan_tasks([("a.txt", 0, "")], 100) == []


def test_progress_counts_every_byte_of_the_input(tmp_path: Path) -> None:
    lines = b'{"text": "abc"}\n' * 1000
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt").write_bytes(lines)
    for path in sorted(tmp_path.iterdir()):
        counts: list[int] = []
        size = path.stat().st_size
        list(read_documents(Piece(str(path), 0, size), PLAIN, counts.append))
        assert sum(counts) == size


def test_a_sample_of_a_large_input_is_a_share_of_it_and_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(4000)))
    size = path.stat().st_size
    everything = list(sample_texts([str(path)], PLAIN, max_bytes=size))
    some = list(sample_texts([str(path)], PLAIN, max_bytes=size // 4))
    assert len(everything) == 4000
    # Binomial with n 4000 and p 1/4: sd 27, so 6 sd are 164.
    assert abs(len(some) - 1000) < 164
    assert some == list(sample_texts([str(path)], PLAIN, max_bytes=size // 4))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="the corpus is empty"):
        list(sample_texts([str(tmp_path / "empty.txt")], PLAIN, max_bytes=100))
