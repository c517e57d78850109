from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bdtrain.data.build import build_loader, build_source, build_validation, iter_validation
from bdtrain.data.loader import FILLER_INDEX, Batch, Loader, ValidationSet
from bdtrain.data.shards import CorpusIndex
from bdtrain.data.source import TokenSource, check_fingerprint
from bdtrain.data.tokenizer import Tokenizer
from bdtrain.errors import ConfigError, DataError

GLOBAL_BATCH = 16
STEPS = 12


@dataclass(frozen=True)
class Settings:
    path: str | None
    kind: str = "corpus"
    seq_len: int = 32
    window_shards: int = 3
    lanes: int = 8
    epoch_tokens: int | None = None
    prefetch_batches: int = 2
    synthetic_vocab_size: int = 64
    synthetic_tokens: int = 32 * 100


@pytest.fixture
def settings(corpus: Path) -> Settings:
    return Settings(str(corpus))


def digest(batches: list[Batch]) -> str:
    """Of a global batch, from the parts of its ranks, in the order of ``batch_index``."""
    index = torch.cat([batch.batch_index for batch in batches])
    order = torch.argsort(index)
    assert index[order].tolist() == list(range(len(index)))
    hashed = hashlib.sha256()
    for name in ("tokens", "documents", "counted", "sample_index"):
        hashed.update(torch.cat([getattr(batch, name) for batch in batches])[order].numpy().tobytes())
    return hashed.hexdigest()


def run(settings: Settings, dp: int, cursors: list[int], batch: int = GLOBAL_BATCH) -> list[str]:
    loaders = [
        build_loader(settings, seed=7, global_batch_size=batch, dp_rank=rank, dp_size=dp)
        for rank in range(dp)
    ]
    try:
        return [digest([loader.batch(cursor) for loader in loaders]) for cursor in cursors]
    finally:
        for loader in loaders:
            loader.close()


CURSORS = [step * GLOBAL_BATCH for step in range(STEPS)]


@pytest.mark.parametrize("kind", ["corpus", "synthetic"])
def test_dp_1_2_4_8_and_16_see_identical_global_batches(settings: Settings, kind: str) -> None:
    settings = replace(settings, kind=kind)
    expected = run(settings, 1, CURSORS)
    assert len(set(expected)) == STEPS
    for dp in (2, 4, 8, 16):
        assert run(settings, dp, CURSORS) == expected


def test_a_batch_is_the_rows_that_the_source_has_at_its_positions(settings: Settings) -> None:
    source = build_source(settings, split="train", seed=7)
    with build_loader(settings, seed=7, global_batch_size=8, dp_rank=1, dp_size=2) as loader:
        batch = loader.batch(24)
    assert batch.batch_index.tolist() == [1, 3, 5, 7]
    assert batch.sample_index.tolist() == [25, 27, 29, 31]
    expected = np.stack([source.sample(position) for position in (25, 27, 29, 31)])
    assert np.array_equal(batch.tokens.numpy(), expected)
    assert batch.tokens.dtype == torch.int64 and batch.documents.dtype == torch.int32
    assert batch.counted.dtype == torch.bool


def test_a_resume_at_every_step_continues_the_uninterrupted_run(settings: Settings) -> None:
    expected = run(settings, 2, CURSORS)
    for start in range(STEPS):
        assert run(settings, 4, CURSORS[start:]) == expected[start:]


def test_prefetching_and_jumps_of_the_cursor_change_nothing(settings: Settings) -> None:
    cursors = [0, 16, 32, 160, 176, 0, 0, 48, 16]
    expected = run(replace(settings, prefetch_batches=0), 1, cursors)
    for ahead in (1, 2, 5):
        assert run(replace(settings, prefetch_batches=ahead), 1, cursors) == expected


def test_another_batch_size_cuts_the_same_stream(settings: Settings) -> None:
    def stream(batch: int) -> list[list[int]]:
        with build_loader(settings, seed=7, global_batch_size=batch) as loader:
            return [row for cursor in range(0, 48, batch) for row in loader.batch(cursor).tokens.tolist()]

    assert stream(4) == stream(16) == stream(48)


def test_a_pass_shows_every_stored_row_once_and_the_next_in_another_order(settings: Settings) -> None:
    source = build_source(settings, split="train", seed=7)
    stored = Counter(source.row(number).tobytes() for number in range(source.num_samples))
    passes = [
        [source.sample(number * source.num_samples + index).tobytes() for index in range(source.num_samples)]
        for number in range(2)
    ]
    assert Counter(passes[0]) == Counter(passes[1]) == stored
    assert passes[0] != passes[1]


@pytest.mark.parametrize("seq_len", [8, 16, 64, 128])
def test_other_sequence_lengths_are_cut_from_the_same_shards(
    settings: Settings, corpus: Path, seq_len: int
) -> None:
    stored = TokenSource(corpus, split="train", seq_len=32, seed=0)
    source = TokenSource(corpus, split="train", seq_len=seq_len, seed=0)
    rows = [source.row(number) for number in range(source.num_samples)]
    whole = np.concatenate([stored.row(number) for number in range(stored.num_samples)])
    if seq_len <= 32:
        assert np.array_equal(np.concatenate(rows), whole)
    else:
        # What a shard's last member has beyond whole sequences is left, less than one sequence per shard.
        shards = len(CorpusIndex.load(corpus).splits["train"].shards)
        assert len(whole) - shards * seq_len < len(rows) * seq_len <= len(whole)
    with pytest.raises(DataError, match="must divide 128"):
        TokenSource(corpus, split="train", seq_len=24, seed=0)


def test_epochs_are_passes_or_so_many_tokens(settings: Settings) -> None:
    with build_loader(settings, seed=7, global_batch_size=8) as loader:
        rows = CorpusIndex.load(Path(settings.path or "")).splits["train"].rows
        assert [loader.epoch_of(cursor) for cursor in (0, rows - 1, rows, 5 * rows)] == [0, 0, 1, 5]
    with build_loader(replace(settings, epoch_tokens=32 * 10), seed=7, global_batch_size=8) as loader:
        assert [loader.epoch_of(cursor) for cursor in (0, 9, 10, 25)] == [0, 0, 1, 2]


def test_documents_in_a_batch_are_whole_texts(settings: Settings, texts: list[str]) -> None:
    tokenizer = Tokenizer.load(Path(settings.path or "") / "tokenizer.model")
    found = 0
    for batch in iter_validation(settings, "train", None, batch_size=7):
        for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
            for number in range(1, int(documents.max())):
                # Neither the first nor the last document of the row: complete, with its EOS.
                ids = tokens[documents == number].numpy()
                assert ids[-1] == tokenizer.eos_id
                assert tokenizer.decode(ids) in texts
                found += 1
    assert found > 10


def test_bos_begins_documents_and_is_not_counted(
    make_corpus: Callable[..., Path], tmp_path: Path, corpus: Path
) -> None:
    folder = make_corpus(tmp_path, bos=True)
    batches = list(iter_validation(Settings(str(folder)), "train"))
    tokens, counted = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "counted")
    )
    bos = tokens == 1
    documents = CorpusIndex.load(folder).splits["train"].documents
    assert int(bos.sum()) == int((tokens == 2).sum()) == documents
    # Also where BOS is the first token of a row and its document's predecessor lies in the row before.
    assert not counted[bos].any()
    assert counted[(tokens != 0) & ~bos].all() and not counted[tokens == 0].any()
    assert CorpusIndex.load(folder).fingerprint != CorpusIndex.load(corpus).fingerprint


def test_validation_reads_each_row_once_in_order_and_its_bytes_are_the_texts(
    settings: Settings, corpus: Path
) -> None:
    split = CorpusIndex.load(corpus).splits["valid"]
    held = build_validation(settings, seed=7)
    batches = list(held.batches(4))
    assert torch.cat([batch.sample_index for batch in batches]).tolist() == list(range(split.rows))
    assert sum(int(held.utf8_bytes(batch).sum()) for batch in batches) == split.text_bytes
    assert sum(int(batch.counted.sum()) for batch in batches) == split.tokens
    three = build_validation(settings, seed=7, max_sequences=3)
    assert [len(batch.tokens) for batch in three.batches(2)] == [2, 1]
    chosen = torch.cat([batch.sample_index for batch in three.batches(2)]).tolist()
    assert chosen == list(three.numbers) == [0, split.rows // 3, 2 * split.rows // 3]


def test_validation_over_ranks_reads_the_same_rows_in_equal_numbers(settings: Settings) -> None:
    held = build_validation(settings, seed=7, max_sequences=7)
    whole = torch.cat([batch.tokens for batch in held.batches(100)])
    parts = [list(held.batches(2, dp_rank=rank, dp_size=3)) for rank in range(3)]
    assert [[len(batch.tokens) for batch in part] for part in parts] == [[2, 1]] * 3
    rows = {}
    for part in parts:
        for batch in part:
            for number, tokens, counted, documents in zip(
                batch.sample_index.tolist(), batch.tokens, batch.counted, batch.documents, strict=True
            ):
                if number == FILLER_INDEX:
                    assert not counted.any() and (documents == -1).all()
                else:
                    rows[number] = tokens
    assert torch.equal(torch.stack([rows[number] for number in held.numbers]), whole)


def test_a_fingerprint_survives_json_and_other_data_are_refused_by_name(
    settings: Settings, make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    def fingerprint(changed: Settings, seed: int = 7) -> dict[str, str | int]:
        with build_loader(changed, seed=seed, global_batch_size=8) as loader:
            return json.loads(json.dumps(dict(loader.fingerprint)))

    saved = fingerprint(settings)
    check_fingerprint(saved, fingerprint(replace(settings, prefetch_batches=0, epoch_tokens=640)))
    for name, changed in (
        ("seq_len", replace(settings, seq_len=16)),
        ("lanes", replace(settings, lanes=4)),
        ("window_shards", replace(settings, window_shards=2)),
        ("order", replace(settings, kind="synthetic")),
    ):
        with pytest.raises(DataError, match=rf"{name}: the run has .*or start a new run"):
            check_fingerprint(saved, fingerprint(changed))
    with pytest.raises(DataError, match="seed: the run has 7, the data now 8"):
        check_fingerprint(saved, fingerprint(settings, seed=8))
    other = make_corpus(tmp_path, valid_fraction=0.2)
    with pytest.raises(DataError, match=r"corpus: .*point data.path at the corpus of the first run"):
        check_fingerprint(saved, fingerprint(replace(settings, path=str(other))))


def test_damage_met_by_the_prefetching_thread_reaches_the_step_that_needs_it(
    corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    settings = Settings(str(tmp_path / "copy"))
    source = build_source(settings, split="train", seed=7)
    assert isinstance(source, TokenSource)
    victim = source.order.locate(40)
    record = source.index.splits["train"].shards[victim.shard]
    path = tmp_path / "copy" / record.name
    records = np.load(path.with_name(path.name.replace(".tar", ".idx.npy")))
    content = bytearray(path.read_bytes())
    content[int(records[victim.member]["offset"]) + 5] ^= 4
    path.write_bytes(content)

    def damaged(position: int) -> bool:
        place = source.order.locate(position)
        return place.shard == victim.shard and place.member == victim.member

    with build_loader(settings, seed=7, global_batch_size=4) as loader:
        for cursor in range(0, 48, 4):
            if any(damaged(position) for position in range(cursor, cursor + 4)):
                with pytest.raises(DataError, match=rf"{record.name}, member {victim.member}: checksum"):
                    loader.batch(cursor)
            else:
                assert len(loader.batch(cursor).tokens) == 4


def test_closing_twice_is_harmless_and_a_closed_loader_says_so(settings: Settings) -> None:
    loader = build_loader(settings, seed=7, global_batch_size=4)
    loader.batch(0)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.batch(4)


def test_wrong_settings_are_refused_with_their_key(settings: Settings, corpus: Path) -> None:
    source = build_source(settings, split="train", seed=7)
    for changes, message in (
        (
            {"global_batch_size": 6, "dp_size": 4},
            "train.global_batch_size=6 must be a positive multiple of the 4",
        ),
        ({"global_batch_size": 4, "dp_rank": 4, "dp_size": 4}, "dp_rank=4; allowed are 0 to 3"),
        ({"global_batch_size": 4, "prefetch_batches": -1}, "data.prefetch_batches=-1"),
        ({"global_batch_size": 4, "epoch_tokens": 5}, "data.epoch_tokens=5"),
    ):
        with pytest.raises(ConfigError, match=message):
            Loader(source, **changes)
    with pytest.raises(ConfigError, match=r"validation.sequences=0"):
        ValidationSet(source, max_sequences=0)
    with pytest.raises(ConfigError, match=r"data.kind='hdf5'; allowed: corpus, synthetic"):
        build_source(replace(settings, kind="hdf5"), split="train", seed=7)
    with pytest.raises(ConfigError, match=r"data.path is not set"):
        build_source(replace(settings, path=None), split="train", seed=7)
    with pytest.raises(DataError, match="does not exist"):
        build_source(replace(settings, path="/no/such/corpus"), split="train", seed=7)
    with pytest.raises(DataError, match="no split 'test', only train, valid"):
        build_source(settings, split="test", seed=7)
