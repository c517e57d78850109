"""A corpus as text, for a person."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bdtrain.data.shards import CorpusIndex
from bdtrain.data.source import TokenSource
from bdtrain.errors import DataError

_LINE_CHARS = 400


def describe_corpus(folder: Path) -> list[str]:
    """Totals of every split."""
    index = CorpusIndex.load(folder)
    lines = [
        f"{folder}: fingerprint {index.fingerprint[:12]}, packing {index.packing}, "
        f"{np.dtype(index.dtype).name}, rows of {index.row_length}, {index.vocab_size} ids, tokenizer "
        f"{index.tokenizer_sha256[:12]}{', documents begin with BOS' if index.bos else ''}"
    ]
    for name, split in index.splits.items():
        lines.append(
            f"{name}: {len(split.shards)} shards, {split.rows} rows, {split.documents} documents, "
            f"{split.tokens} tokens, {split.text_bytes} bytes of text ({split.text_bytes / split.tokens:.2f} "
            f"bytes per token)"
        )
    return lines


def show_rows(folder: Path, split: str, seq_len: int | None, rows: int) -> list[str]:
    """The first rows of a split, decoded; a bar marks the end of a document."""
    source = _open(folder, split, seq_len)
    lines = []
    for number in range(min(rows, source.num_samples)):
        tokens = source.row(number)
        ends = np.flatnonzero(tokens == source.tokenizer_info.eos_id)
        parts = [source.tokenizer.decode(part) for part in np.split(tokens, ends)]
        lines.append(f"row {number}: {' | '.join(repr(part) for part in parts)}"[:_LINE_CHARS])
    return lines


def frequent_tokens(folder: Path, split: str, count: int) -> list[str]:
    """The most frequent tokens of a split, padding left out."""
    source = _open(folder, split, None)
    totals = np.zeros(source.tokenizer_info.vocab_size, dtype=np.int64)
    for number in range(source.num_samples):
        totals += np.bincount(source.row(number), minlength=len(totals))
    totals[source.tokenizer_info.pad_id] = 0
    order = np.argsort(-totals, kind="stable")[:count]
    lines = [
        f"{totals[token]:>10} {totals[token] / totals.sum():7.3%} {source.tokenizer.piece(token)!r}"
        for token in order
    ]
    return [*lines, f"{np.count_nonzero(totals == 0)} of {len(totals)} ids do not occur"]


def preview_order(
    folder: Path,
    split: str,
    seq_len: int | None,
    *,
    seed: int,
    dp_size: int,
    steps: int,
    global_batch_size: int,
) -> list[str]:
    """Shard, member and sample that each rank reads in the first steps.

    Raises:
        DataError: if ``dp_size`` does not divide ``global_batch_size``.
    """
    if dp_size < 1 or global_batch_size % dp_size:
        raise DataError(f"--dp {dp_size} must divide --global-batch-size {global_batch_size}")
    source = _open(folder, split, seq_len, seed)
    lines = []
    for step in range(steps):
        for rank in range(dp_size):
            places = [
                source.order.locate(step * global_batch_size + index)
                for index in range(rank, global_batch_size, dp_size)
            ]
            lines.append(
                f"step {step} rank {rank}: {' '.join(':'.join(map(str, place)) for place in places)}"
            )
    return lines


def _open(folder: Path, split: str, seq_len: int | None, seed: int = 0) -> TokenSource:
    return TokenSource(folder, split=split, seq_len=seq_len or CorpusIndex.load(folder).row_length, seed=seed)
