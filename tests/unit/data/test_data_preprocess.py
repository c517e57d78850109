from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from bdtrain.data.preprocess import PreprocessOptions, document_hash, preprocess
from bdtrain.data.progress import ProgressLine
from bdtrain.data.shards import CorpusIndex
from bdtrain.data.source import TokenSource
from bdtrain.data.text import TextOptions
from bdtrain.data.tokenizer import Tokenizer, train_tokenizer
from bdtrain.errors import DataError, TokenizerError

SMALL = PreprocessOptions(valid_fraction=0.15, row_length=32, member_rows=4, task_bytes=4000)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def read_split(folder: Path, split: str) -> list[str]:
    """Documents of a split, by decoding all rows end to end shard by shard."""
    index = CorpusIndex.load(folder)
    source = TokenSource(folder, split=split, seq_len=index.row_length, seed=0)
    tokens = np.concatenate([source.row(number) for number in range(source.num_samples)])
    tokens = tokens[tokens != index.pad_id]
    parts = np.split(tokens, np.flatnonzero(tokens == index.eos_id) + 1)
    return [source.tokenizer.decode(part) for part in parts[:-1]]


@pytest.fixture
def source(tmp_path: Path, texts: list[str], write_jsonl: Callable[[Path, list[str]], Path]) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", texts)


def test_every_document_is_in_one_split_in_order_by_the_hash_of_its_text(
    source: Path, tokenizer_path: Path, tmp_path: Path, texts: list[str]
) -> None:
    summary = preprocess([str(source)], tokenizer_path, tmp_path / "c", options=SMALL)
    held = [text for text in texts if document_hash(text.encode()) < 0.15]
    assert read_split(tmp_path / "c", "valid") == held
    assert read_split(tmp_path / "c", "train") == [text for text in texts if text not in held]
    assert 0 < len(held) < len(texts) and summary.tasks > 3
    for split, expected in (("valid", held), ("train", [text for text in texts if text not in held])):
        totals = summary.index.splits[split]
        assert totals.documents == len(expected)
        assert totals.text_bytes == sum(len(text.encode()) for text in expected)
    assert "left out" not in summary.describe()


def test_the_same_documents_in_other_files_fall_on_the_same_sides(
    source: Path, tokenizer_path: Path, tmp_path: Path, texts: list[str]
) -> None:
    preprocess([str(source)], tokenizer_path, tmp_path / "a", options=SMALL)
    with gzip.open(tmp_path / "z.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in reversed(texts))
    options = replace(SMALL, text=TextOptions(text_field="body"))
    preprocess([str(tmp_path / "z.jsonl.gz")], tokenizer_path, tmp_path / "b", options=options)
    assert sorted(read_split(tmp_path / "a", "valid")) == sorted(read_split(tmp_path / "b", "valid"))


def test_a_second_run_does_nothing_and_a_lost_shard_or_manifest_is_made_again(
    source: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    preprocess([str(source)], tokenizer_path, out, options=SMALL)
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    again = preprocess([str(source)], tokenizer_path, out, options=SMALL)
    assert again.tasks_done_before == again.tasks
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == stamps
    (out / "train-000001.tar").unlink()
    (out / "train-000002.tar").write_bytes(b"cut")
    (out / "manifest" / "000000.json").write_bytes(b"{")
    (out / "index.json").unlink()
    (out / ".tmp.99999.train-000001.tar").write_bytes(b"left by a killed run")
    repaired = preprocess([str(source)], tokenizer_path, out, options=SMALL)
    assert repaired.tasks_done_before == repaired.tasks - 3
    assert contents(out) == before


def test_a_run_stopped_after_any_write_resumes_to_the_same_bytes(
    source: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess([str(source)], tokenizer_path, tmp_path / "whole", options=SMALL)
    expected = contents(tmp_path / "whole")
    original, out = os.replace, tmp_path / "c"
    for limit in (0, 1, 2, 3, 5, 8, 13, 21):
        left = [limit]

        def stop_at_a_rename(old: Path, new: Path, left: list[int] = left) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            original(old, new)

        monkeypatch.setattr(os, "replace", stop_at_a_rename)
        try:
            preprocess([str(source)], tokenizer_path, out, options=SMALL)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", original)
    preprocess([str(source)], tokenizer_path, out, options=SMALL)
    assert contents(out) == expected


def test_a_folder_of_another_run_is_not_touched(
    source: Path, tokenizer_path: Path, tmp_path: Path, texts: list[str]
) -> None:
    out = tmp_path / "c"
    preprocess([str(source)], tokenizer_path, out, options=SMALL)
    before = contents(out)
    train_tokenizer(texts, vocab_size=340).save(tmp_path / "other.model")
    with pytest.raises(DataError, match="begun with other tokenizer; choose another --out"):
        preprocess([str(source)], tmp_path / "other.model", out, options=SMALL)
    with pytest.raises(DataError, match="begun with other options"):
        preprocess([str(source)], tokenizer_path, out, options=replace(SMALL, bos=True))
    source.write_text(source.read_text().replace("cat", "cow"))
    with pytest.raises(DataError, match="begun with other inputs"):
        preprocess([str(source)], tokenizer_path, out, options=SMALL)
    assert contents(out) == before
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "photos.tar").touch()
    with pytest.raises(DataError, match=r"holds photos.tar of something else"):
        preprocess([str(source)], tokenizer_path, tmp_path / "d", options=SMALL)


def test_two_runs_in_one_folder_are_refused(source: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with open(tmp_path / "c" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another preprocess run is writing to"):
            preprocess([str(source)], tokenizer_path, tmp_path / "c", options=SMALL)
    preprocess([str(source)], tokenizer_path, tmp_path / "c", options=SMALL)


def test_one_faulty_document_stops_the_run_with_its_place(tokenizer_path: Path, tmp_path: Path) -> None:
    for name, content, message in (
        ("a.txt", b"fine \xff", r"a.txt, byte 5: is not UTF-8; .*--max-bad-fraction"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            r"a.jsonl, line 2: is not a line of JSON; .*--max-bad-fraction",
        ),
        ("b.jsonl", b'{"body": "x"}\n', r"b.jsonl, line 1: has no text in the field that --text-field names"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            preprocess([str(tmp_path / name)], tokenizer_path, tmp_path / f"c-{name}")
        assert not list((tmp_path / f"c-{name}").glob("*.tar"))


def test_a_tolerated_share_of_faults_is_counted_by_kind(
    source: Path, tokenizer_path: Path, tmp_path: Path, texts: list[str]
) -> None:
    with open(source, "ab") as file:
        file.write(b'{"text": "\xff"}\n{"text": \n[]\n{"text": "\\ud800"}\n{"text": "\xfe"}\n')
    tolerant = replace(SMALL, max_bad_fraction=0.05)
    summary = preprocess([str(source)], tokenizer_path, tmp_path / "c", options=tolerant)
    assert summary.bad == {"not_utf8": 2, "broken_json": 1, "missing_field": 1, "lone_surrogate": 1}
    assert "left out: 2 not_utf8, 1 broken_json" in summary.describe()
    assert sum(split.documents for split in summary.index.splits.values()) == len(texts)
    strict = replace(SMALL, max_bad_fraction=0.01)
    with pytest.raises(
        DataError, match=r"5 of 155 documents are faulty .*allows 0.01; the first: .*in.jsonl"
    ):
        preprocess([str(source)], tokenizer_path, tmp_path / "d", options=strict)


def test_an_empty_corpus_is_one_clear_error(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "zero.txt").touch()
    (tmp_path / "blank.jsonl").write_text('\n\n{"text": ""}\n')
    for name in ("zero.txt", "blank.jsonl"):
        with pytest.raises(DataError, match="the corpus is empty"):
            preprocess([str(tmp_path / name)], tokenizer_path, tmp_path / f"c-{name}")
    with pytest.raises(DataError, match="no such file"):
        preprocess([str(tmp_path / "gone.txt")], tokenizer_path, tmp_path / "c")


def test_a_split_without_documents_is_refused_with_a_fraction_that_works(
    tmp_path: Path, tokenizer_path: Path, write_jsonl: Callable[[Path, list[str]], Path]
) -> None:
    texts = ["one text", "two texts", "three texts"]
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    hashes = sorted(document_hash(text.encode()) for text in texts)
    with pytest.raises(DataError, match=r"holds out none of 3 documents; choose at least (0.\d+)") as caught:
        preprocess([source], tokenizer_path, tmp_path / "a", options=PreprocessOptions(valid_fraction=1e-9))
    named = float(str(caught.value).split("at least ")[1].split(",")[0])
    assert hashes[0] < named < hashes[1]
    summary = preprocess(
        [source], tokenizer_path, tmp_path / "b", options=PreprocessOptions(valid_fraction=named)
    )
    assert summary.index.splits["valid"].documents == 1
    with pytest.raises(
        DataError, match="holds out all 3 documents and leaves none to train on; choose at most"
    ):
        preprocess(
            [source], tokenizer_path, tmp_path / "d", options=PreprocessOptions(valid_fraction=0.9999999)
        )
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(DataError, match="one document cannot be split: cut it with --document-separator"):
        preprocess([str(tmp_path / "one.txt")], tokenizer_path, tmp_path / "e", options=PreprocessOptions())
    none = preprocess([source], tokenizer_path, tmp_path / "f", options=PreprocessOptions(valid_fraction=0))
    assert list(none.index.splits) == ["train"]


def test_held_out_files_of_their_own_are_the_valid_split_and_nothing_else_is(
    source: Path, tokenizer_path: Path, tmp_path: Path, texts: list[str], write_jsonl: Callable[..., Path]
) -> None:
    held_out = [f"held out {number} of the texts" for number in range(300)]
    other = write_jsonl(tmp_path / "valid.jsonl", held_out)
    options = replace(SMALL, valid_fraction=0)
    for folder, workers in (("one", 1), ("two", 2)):
        preprocess(
            [str(source)],
            tokenizer_path,
            tmp_path / folder,
            valid_inputs=[str(other)],
            options=options,
            workers=workers,
        )
    assert read_split(tmp_path / "one", "train") == texts
    assert read_split(tmp_path / "one", "valid") == held_out
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    # The held-out files are part of what the corpus is.
    other.write_text(json.dumps({"text": "something else"}) + "\n")
    with pytest.raises(DataError, match="was begun with other valid_inputs"):
        preprocess(
            [str(source)], tokenizer_path, tmp_path / "one", valid_inputs=[str(other)], options=options
        )


def test_held_out_files_that_cannot_be_held_out_are_refused(
    source: Path, tokenizer_path: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    same = tmp_path / "copy.jsonl"
    same.write_bytes(source.read_bytes())
    other = write_jsonl(tmp_path / "valid.jsonl", ["another text"])
    blank = write_jsonl(tmp_path / "blank.jsonl", [""])
    (tmp_path / "empty.jsonl").touch()
    zero = replace(SMALL, valid_fraction=0)
    for valid, options, message in (
        (same, zero, r"copy.jsonl of --valid-input is \S*in.jsonl of --input; leave it out"),
        (other, SMALL, "--valid-fraction 0.15 and --valid-input both say what is held out; give one"),
        (tmp_path / "none.jsonl", zero, r"--valid-input \S*none.jsonl: no such file"),
        (tmp_path / "empty.jsonl", zero, "every file of --valid-input .* has 0 bytes"),
        (blank, zero, "--valid-input holds no document with any text"),
    ):
        with pytest.raises(DataError, match=message):
            preprocess(
                [str(source)], tokenizer_path, tmp_path / "out", valid_inputs=[str(valid)], options=options
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_fraction": 1.0}, "--valid-fraction 1.0"),
        ({"max_bad_fraction": -0.1}, "--max-bad-fraction -0.1"),
        ({"row_length": 0}, "--row-length 0"),
        ({"member_rows": 0}, "--member-rows 0"),
        ({"task_bytes": 0}, "--task-mib"),
        ({"text": TextOptions(document_separator="")}, "--document-separator is empty"),
        ({"dtype": "float"}, "--dtype float is unknown"),
    ],
)
def test_options_out_of_range_are_refused_by_name(
    source: Path, tokenizer_path: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        preprocess([str(source)], tokenizer_path, tmp_path / "c", options=replace(SMALL, **changes))
    assert not (tmp_path / "c").exists()
    with pytest.raises(DataError, match="--workers 0"):
        preprocess([str(source)], tokenizer_path, tmp_path / "c", workers=0)
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        preprocess([str(source)], tmp_path / "no.model", tmp_path / "c")


def enlarge(model: bytes, pieces: int) -> bytes:
    """Append pieces to a serialised model: parts of a protobuf message may simply follow each other."""
    parts = [model]
    for number in range(pieces):
        name = f"zq{number:06d}".encode()
        body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", -10.0 - number)
        parts.append(b"\x0a" + bytes([len(body)]) + body)
    return b"".join(parts)


def test_a_vocabulary_beyond_uint16_takes_uint32_or_is_refused(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, texts: list[str]
) -> None:
    path = tmp_path / "large.model"
    path.write_bytes(enlarge(tokenizer._model, 65537 - tokenizer.vocab_size))
    assert Tokenizer.load(path).vocab_size == 65537
    with pytest.raises(DataError, match="65537 ids does not fit --dtype uint16"):
        preprocess([str(source)], path, tmp_path / "a", options=replace(SMALL, dtype="uint16"))
    summary = preprocess([str(source)], path, tmp_path / "b", options=SMALL)
    assert summary.index.dtype == "<u4"
    held = [text for text in texts if document_hash(text.encode()) < 0.15]
    assert read_split(tmp_path / "b", "valid") == held


def test_a_full_disk_keeps_what_is_finished_and_leaves_no_half_shard(
    source: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess([str(source)], tokenizer_path, tmp_path / "whole", options=SMALL)
    original, out, calls = os.fsync, tmp_path / "c", [0]

    def fill_up(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    with pytest.raises(DataError, match=r"cannot write to .*No space left.*run the same command again"):
        preprocess([str(source)], tokenizer_path, out, options=SMALL)
    monkeypatch.setattr(os, "fsync", original)
    assert not list(out.rglob(".tmp.*")) and (out / "manifest" / "000000.json").exists()
    resumed = preprocess([str(source)], tokenizer_path, out, options=SMALL)
    assert 0 < resumed.tasks_done_before < resumed.tasks
    assert contents(out) == contents(tmp_path / "whole")


def test_the_corpus_does_not_depend_on_where_its_inputs_lie(
    source: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "renamed.jsonl"
    moved.write_bytes(source.read_bytes())
    first = preprocess([str(source)], tokenizer_path, tmp_path / "a", options=SMALL)
    second = preprocess([str(moved)], tokenizer_path, tmp_path / "b", options=SMALL)
    assert first.index.fingerprint == second.index.fingerprint


def test_the_progress_line_has_rate_and_time_left() -> None:
    stream = StringIO()
    line = ProgressLine(stream=stream)
    line.start(10_000_000, 2_000_000)
    line.advance(4_000_000)
    assert line.text(2.0) == "preprocess: 6.0 of 10.0 MB of input, 2.00 MB/s, 2s left"
    assert stream.getvalue() == ""
    line.advance(4_000_000)
    assert line.text(4000.0).endswith("0.00 MB/s, done in 1h 06m")
    line.finish()
    assert stream.getvalue().count("\n") == 1 and "\r" not in stream.getvalue()
