from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtrain.data.packing import StreamPacker, check_seq_len, find_documents, samples_in, token_dtype
from bdtrain.data.shards import index_archive
from bdtrain.data.writer import ShardRecord
from bdtrain.errors import DataError

EOS, BOS, PAD = 2, 1, 0


def read_all(path: Path, dtype: str, row_length: int) -> list[np.ndarray]:
    content = path.read_bytes()
    records = index_archive(path, dtype=dtype, row_length=row_length)
    return [
        np.frombuffer(content, dtype, count=int(rows) * row_length, offset=int(offset))
        for offset, rows, _ in records.tolist()
    ]


def pack(path: Path, documents: list[list[int]], *, bos: bool, row_length: int = 8) -> ShardRecord | None:
    packer = StreamPacker(
        path,
        dtype="<u2",
        row_length=row_length,
        member_rows=3,
        eos_id=EOS,
        pad_id=PAD,
        bos_id=BOS if bos else None,
    )
    for number, document in enumerate(documents):
        packer.add(np.array(document, dtype=np.int32), text_bytes=10 + number)
    return packer.close()


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(6, 999), max_size=40), min_size=1, max_size=8), bos=st.booleans()
)
def test_members_are_the_stream_of_documents_and_padding(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], bos: bool
) -> None:
    path = tmp_path_factory.mktemp("pack") / "train-000000.tar"
    record = pack(path, documents, bos=bos)
    stream = [token for document in documents for token in [*([BOS] if bos else []), *document, EOS]]
    members = read_all(path, "<u2", 8)
    flat = np.concatenate(members).tolist()
    assert flat[: len(stream)] == stream
    assert flat[len(stream) :] == [PAD] * (-len(stream) % 8)
    assert [len(member) for member in members[:-1]] == [24] * (len(members) - 1)
    assert record is not None
    assert (record.tokens, record.documents) == (len(stream), len(documents))
    assert (record.rows, record.members) == (len(flat) // 8, len(members))
    assert record.text_bytes == sum(range(10, 10 + len(documents)))


def test_no_document_makes_no_file(tmp_path: Path) -> None:
    assert pack(tmp_path / "train-000000.tar", [], bos=False) is None
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=100, deadline=None)
@given(row=st.lists(st.sampled_from([PAD, BOS, EOS, 7, 8]), min_size=1, max_size=20))
def test_documents_and_counted_tokens_by_walking_along_the_row(row: list[int]) -> None:
    documents, counted = find_documents(np.array([row]), eos_id=EOS, bos_id=BOS, pad_id=PAD)
    number, starts = 0, True
    for place, token in enumerate(row):
        if token == PAD:
            assert documents[0, place] == -1 and not counted[0, place]
            starts = False
            continue
        assert documents[0, place] == number
        assert counted[0, place] == (not (token == BOS and starts))
        starts = token == EOS
        number += token == EOS
    assert documents.dtype == np.int32 and counted.dtype == np.bool_


def test_eos_belongs_to_its_document_and_rows_start_at_zero() -> None:
    tokens = np.array([[9, EOS, BOS, 9, EOS, PAD], [9, 9, 9, 9, 9, EOS]])
    documents, counted = find_documents(tokens, eos_id=EOS, bos_id=BOS, pad_id=PAD)
    assert documents.tolist() == [[0, 0, 1, 1, 1, -1], [0] * 6]
    assert counted.tolist() == [[True, True, False, True, True, False], [True] * 6]


def test_the_dtype_follows_the_vocabulary_and_a_small_one_is_refused() -> None:
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")
    assert token_dtype(300, "uint32") == np.dtype("<u4")
    with pytest.raises(DataError, match=r"65537 ids does not fit --dtype uint16.*use --dtype uint32"):
        token_dtype(65537, "uint16")
    with pytest.raises(DataError, match="int8 is unknown; allowed: uint16, uint32"):
        token_dtype(300, "int8")


def test_seq_len_must_divide_a_full_member() -> None:
    for seq_len in (1, 512, 1024, 2048, 262144):
        check_seq_len(seq_len, row_length=1024, member_rows=256)
    for seq_len in (0, 1000, 3072, 524288):
        with pytest.raises(DataError, match="must divide 262144"):
            check_seq_len(seq_len, row_length=1024, member_rows=256)
    with pytest.raises(DataError, match=r"nearest are 512, 1024, 2048, 4096 "):
        check_seq_len(1500, row_length=1024, member_rows=256)


def test_samples_are_counted_per_member() -> None:
    rows = np.array([4, 4, 3])
    assert samples_in(rows, row_length=8, seq_len=16).tolist() == [2, 2, 1]
    assert samples_in(rows, row_length=8, seq_len=4).tolist() == [8, 8, 6]
    assert samples_in(rows, row_length=8, seq_len=32).tolist() == [1, 1, 0]
