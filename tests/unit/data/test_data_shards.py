from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from bdtrain.data.shards import (
    CorpusIndex,
    TarShard,
    index_archive,
    load_tokenizer,
    rebuild_index,
    verify_shard,
)
from bdtrain.data.source import TokenSource
from bdtrain.data.tokenizer import Tokenizer, train_tokenizer
from bdtrain.data.writer import INDEX_DTYPE, ShardWriter, index_path
from bdtrain.errors import DataError, TokenizerError


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus, tmp_path / "copy")
    return tmp_path / "copy"


def first_record(folder: Path) -> tuple[CorpusIndex, Path]:
    index = CorpusIndex.load(folder)
    return index, folder / index.splits["train"].shards[0].name


def read_everything(folder: Path) -> None:
    source = TokenSource(folder, split="train", seq_len=32, seed=0)
    for number in range(source.num_samples):
        source.row(number)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_rows_are_what_a_tar_reader_and_numpy_give(corpus: Path) -> None:
    index = CorpusIndex.load(corpus)
    expected = []
    for record in index.splits["train"].shards:
        with tarfile.open(corpus / record.name) as archive:
            for entry in archive:
                member = archive.extractfile(entry)
                assert member is not None
                expected.append(np.load(io.BytesIO(member.read()), allow_pickle=False))
    source = TokenSource(corpus, split="train", seq_len=32, seed=0)
    rows = np.concatenate(expected)
    assert source.num_samples == len(rows) == index.splits["train"].rows
    assert np.array_equal(np.stack([source.row(number) for number in range(len(rows))]), rows)


def test_plain_webdataset_reads_our_shards(corpus: Path) -> None:
    index, path = first_record(corpus)
    record = index.splits["train"].shards[0]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert sum(len(sample["tokens.npy"]) for sample in samples) == record.rows
    assert [sample["__key__"] for sample in samples] == [
        f"train-000000-{number:06d}" for number in range(record.members)
    ]
    assert samples[0]["tokens.npy"].dtype == np.uint16


def test_gnu_tar_lists_our_shards(corpus: Path) -> None:
    index, path = first_record(corpus)
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    assert len(listed.stdout.split()) == index.splits["train"].shards[0].members


def write_foreign(path: Path, arrays: list[np.ndarray], flavour: int, name: str = "part") -> None:
    with tarfile.open(path, "w", format=flavour) as archive:
        for number, array in enumerate(arrays):
            buffer = io.BytesIO()
            np.save(buffer, array)
            entry = tarfile.TarInfo(f"{name}-{number}.tokens.npy")
            entry.size = len(buffer.getvalue())
            buffer.seek(0)
            archive.addfile(entry, buffer)


@pytest.mark.parametrize("flavour", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_other_writers_can_be_indexed(tmp_path: Path, flavour: int) -> None:
    arrays = [np.arange(n * 8, dtype="<u2").reshape(n, 8) for n in (3, 3, 1)]
    path = tmp_path / "foreign.tar"
    # Long names take the extra headers of GNU and PAX.
    write_foreign(path, arrays, flavour, name="k" * (60 if flavour == tarfile.USTAR_FORMAT else 150))
    records = index_archive(path, dtype="<u2", row_length=8)
    content = path.read_bytes()
    for (offset, rows, _), array in zip(records.tolist(), arrays, strict=True):
        assert np.array_equal(np.frombuffer(content, "<u2", rows * 8, offset).reshape(rows, 8), array)


def test_archives_of_webdataset_can_be_indexed(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"k{number}", "tokens.npy": np.full((2, 8), number, dtype="<u2")})
    assert index_archive(tmp_path / "w.tar", dtype="<u2", row_length=8)["rows"].tolist() == [2, 2, 2]


def test_a_shard_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    rows = np.arange(24, dtype="<u2").reshape(3, 8)
    contents = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "train-000000.tar"
        with ShardWriter(path, dtype="<u2", row_length=8, member_rows=3) as writer:
            writer.write(rows)
            record = writer.close(tokens=24, documents=1, text_bytes=5)
        contents.append((path.read_bytes(), index_path(path).read_bytes(), record))
    assert contents[0] == contents[1]
    assert contents[0][2].bytes == len(contents[0][0])


def test_an_exception_while_writing_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError),
        ShardWriter(tmp_path / "train-000000.tar", dtype="<u2", row_length=8, member_rows=3) as writer,
    ):
        writer.write(np.zeros((3, 8), dtype="<u2"))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_side_file_can_be_rebuilt_from_the_archive(copy: Path) -> None:
    index, path = first_record(copy)
    before = index_path(path).read_bytes()
    index_path(path).unlink()
    with pytest.raises(DataError, match=r"idx.npy is missing; rebuild it with tools/index_shards.py"):
        TokenSource(copy, split="train", seq_len=32, seed=0)
    rebuild_index(copy, index, index.splits["train"].shards[0])
    assert index_path(path).read_bytes() == before


def test_an_intact_corpus_passes_the_deep_check(corpus: Path) -> None:
    index = CorpusIndex.load(corpus)
    for split in index.splits.values():
        for record in split.shards:
            verify_shard(corpus, index, record, deep=True)


@pytest.mark.parametrize("where", ["member bound", "header", "data", "end blocks", "everything"])
def test_a_truncated_shard_is_named_when_the_corpus_is_opened(copy: Path, where: str) -> None:
    index, path = first_record(copy)
    records = np.load(index_path(path))
    second = int(records[1]["offset"]) - 128 - 512
    sizes = {
        "member bound": second,
        "header": second + 100,
        "data": second + 700,
        "end blocks": path.stat().st_size - 1024,
        "everything": 0,
    }
    with open(path, "r+b") as file:
        file.truncate(sizes[where])
    with pytest.raises(
        DataError, match=r"train-000000.tar has \d+ bytes, the index says \d+: it is truncated"
    ):
        TokenSource(copy, split="train", seq_len=32, seed=0)
    if where != "end blocks":
        with pytest.raises(DataError):
            index_archive(path, dtype=index.dtype, row_length=32)


def test_every_flipped_bit_of_a_shard_is_found(copy: Path) -> None:
    index, path = first_record(copy)
    record = index.splits["train"].shards[0]
    records = np.load(index_path(path))
    intact = path.read_bytes()
    data = int(records[1]["offset"])
    for position in (data, data + 255, int(records[-1]["offset"]) + 3):
        flip(path, position)
        with pytest.raises(DataError, match=r"train-000000.tar, member \d+: checksum mismatch"):
            read_everything(copy)
        with pytest.raises(DataError, match="another sha256"):
            verify_shard(copy, index, record, deep=True)
        path.write_bytes(intact)
    # Headers are not read in training; the deep check and the rebuilding of the side file see them.
    for position in (3, data - 128 - 512 + 130, data - 128 + 1, data - 100):
        flip(path, position)
        with pytest.raises(DataError):
            verify_shard(copy, index, record, deep=True)
        with pytest.raises(DataError):
            found = index_archive(path, dtype=index.dtype, row_length=32)
            if np.array_equal(found, records):
                raise DataError("a member's name may change without harm to the data")
        path.write_bytes(intact)


def test_every_flipped_bit_of_the_side_file_and_of_the_index_is_found(copy: Path) -> None:
    _, path = first_record(copy)
    side = index_path(path)
    intact = side.read_bytes()
    for position in (0, 20, 128, 136, 140, len(intact) - 1):
        flip(side, position)
        with pytest.raises(DataError, match=r"train-000000.idx.npy"):
            TokenSource(copy, split="train", seq_len=32, seed=0)
    side.write_bytes(intact)
    document = copy / "index.json"
    intact = document.read_bytes()
    for position in range(3, len(intact) - 2, 97):
        if intact[position : position + 1].isspace():
            continue
        flip(document, position)
        with pytest.raises(DataError, match=r"index.json"):
            CorpusIndex.load(copy)
        document.write_bytes(intact)


def test_a_missing_a_swapped_and_an_emptied_shard_are_found(copy: Path) -> None:
    index, path = first_record(copy)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"train-000000.tar is missing"):
        TokenSource(copy, split="train", seq_len=32, seed=0)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match="checksum mismatch"):
        read_everything(copy)
    path.write_bytes(content)
    sizes: dict[int, list[Path]] = {}
    for record in index.splits["train"].shards:
        sizes.setdefault(record.bytes, []).append(copy / record.name)
    first, second = next(paths for paths in sizes.values() if len(paths) > 1)[:2]
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)
    with pytest.raises(DataError, match=r"checksum mismatch|idx.npy"):
        read_everything(copy)


def test_members_that_are_no_plain_token_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for array in (np.array([[None] * 8]), np.zeros((2, 8)), np.zeros((2, 7), "<u2"), np.zeros(8, "<u2")):
        write_foreign(path, [array], tarfile.USTAR_FORMAT)
        with pytest.raises(DataError, match=r"x.tar: member part-0.tokens.npy"):
            index_archive(path, dtype="<u2", row_length=8)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("code.pyd"))
    with pytest.raises(DataError, match=r"code.pyd is not a token array"):
        index_archive(path, dtype="<u2", row_length=8)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.tokens.npy"))
    with pytest.raises(DataError, match="uncompressed tar"):
        index_archive(path, dtype="<u2", row_length=8)


def test_an_index_that_points_outside_is_refused(copy: Path) -> None:
    index, path = first_record(copy)
    record = index.splits["train"].shards[0]
    records = np.array([(record.bytes, 4, 0)] * record.members, dtype=INDEX_DTYPE)
    np.save(index_path(path), records)
    with pytest.raises(DataError, match=r"idx.npy does not match index.json"):
        TarShard(copy, record, dtype=index.dtype, row_length=32)


def test_missing_unfinished_and_foreign_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data path .*nowhere does not exist; .*tools/preprocess.py"):
        CorpusIndex.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a corpus"):
        CorpusIndex.load(tmp_path)
    (tmp_path / "manifest").mkdir()
    with pytest.raises(DataError, match="is unfinished"):
        CorpusIndex.load(tmp_path)
    for content in ("[]", '{"format": "bdtrain-tokens/9"}'):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(DataError, match="this version reads 'bdtrain-tokens/1'"):
            CorpusIndex.load(tmp_path)
    (tmp_path / "index.json").write_bytes(b"\xff{")
    with pytest.raises(DataError, match=r"index.json cannot be read"):
        CorpusIndex.load(tmp_path)


def test_the_wrong_tokenizer_in_a_corpus_is_refused(
    copy: Path, tokenizer: Tokenizer, make_corpus: Callable[..., Path]
) -> None:
    index = CorpusIndex.load(copy)
    assert load_tokenizer(copy, index).sha256 == tokenizer.sha256
    train_tokenizer(["another text altogether " * 20], vocab_size=280).save(copy / "tokenizer.model")
    with pytest.raises(TokenizerError, match="is not the tokenizer that made this corpus"):
        TokenSource(copy, split="train", seq_len=32, seed=0)
    (copy / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        TokenSource(copy, split="train", seq_len=32, seed=0)
