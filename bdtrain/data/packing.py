"""From documents to rows, and from rows back to documents.

Packing is "concat": the tokens of every document, then EOS, form one stream that is cut into rows; the last
row of a shard is filled with PAD. Nothing is dropped and no boundary is stored: EOS is a control id that text
cannot produce, so a document starts after each EOS, and the documents of any row can be read off its tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from bdtrain.data.writer import ShardRecord, ShardWriter
from bdtrain.errors import DataError

PACKING = "concat"
PAD_DOCUMENT = -1
"""Document number of padding, as ``diffusion.visibility`` has it."""

MAX_UINT16_VOCAB = 1 << 16


def token_dtype(vocab_size: int, requested: str | None = None) -> np.dtype[np.unsignedinteger]:
    """The array type of a corpus.

    Args:
        vocab_size: number of ids.
        requested: ``uint16`` or ``uint32``; ``None`` takes the smallest that fits.

    Raises:
        DataError: if the type is unknown, or too small for the vocabulary.
    """
    if requested is None:
        requested = "uint16" if vocab_size <= MAX_UINT16_VOCAB else "uint32"
    if requested not in ("uint16", "uint32"):
        raise DataError(f"--dtype {requested} is unknown; allowed: uint16, uint32, or leave it out")
    if requested == "uint16" and vocab_size > MAX_UINT16_VOCAB:
        raise DataError(
            f"a vocabulary of {vocab_size} ids does not fit --dtype uint16, which holds {MAX_UINT16_VOCAB}; "
            f"use --dtype uint32, or leave --dtype out"
        )
    return np.dtype("<u2") if requested == "uint16" else np.dtype("<u4")


class StreamPacker:
    """Packs documents into the members of one shard; the file appears only if there was a document."""

    def __init__(
        self,
        path: Path,
        *,
        dtype: npt.DTypeLike,
        row_length: int,
        member_rows: int,
        eos_id: int,
        pad_id: int,
        bos_id: int | None = None,
    ) -> None:
        """Prepare a shard at ``path``; nothing is written before a member is full.

        Args:
            path: the archive.
            dtype: array type of the corpus.
            row_length: tokens per row.
            member_rows: rows per member.
            eos_id: put after every document.
            pad_id: fills the last row.
            bos_id: put before every document when given.
        """
        self._path = path
        self._dtype, self._row_length, self._member_rows = dtype, row_length, member_rows
        self._eos_id, self._pad_id, self._bos_id = eos_id, pad_id, bos_id
        self._buffer = np.empty(row_length * member_rows, dtype=dtype)
        self._fill = 0
        self._writer: ShardWriter | None = None
        self._tokens = self._documents = self._text_bytes = 0

    def add(self, ids: npt.NDArray[np.integer], text_bytes: int) -> None:
        """Append one document.

        Args:
            ids: its tokens without BOS and EOS.
            text_bytes: size of its text in UTF-8.
        """
        if self._bos_id is not None:
            self._append(np.array([self._bos_id]))
        self._append(ids)
        self._append(np.array([self._eos_id]))
        self._documents += 1
        self._text_bytes += text_bytes

    def close(self) -> ShardRecord | None:
        """Write the rest, filled with PAD to a whole row; ``None`` when there was no document."""
        if self._documents == 0:
            return None
        if self._fill:
            rows = -(-self._fill // self._row_length)
            self._buffer[self._fill : rows * self._row_length] = self._pad_id
            self._flush(rows)
        assert self._writer is not None
        return self._writer.close(tokens=self._tokens, documents=self._documents, text_bytes=self._text_bytes)

    def abort(self) -> None:
        """Leave no file behind."""
        if self._writer is not None:
            self._writer.abort()

    def _append(self, ids: npt.NDArray[np.integer]) -> None:
        self._tokens += len(ids)
        start = 0
        while start < len(ids):
            count = min(len(ids) - start, len(self._buffer) - self._fill)
            self._buffer[self._fill : self._fill + count] = ids[start : start + count]
            self._fill += count
            start += count
            if self._fill == len(self._buffer):
                self._flush(self._member_rows)

    def _flush(self, rows: int) -> None:
        if self._writer is None:
            self._writer = ShardWriter(
                self._path, dtype=self._dtype, row_length=self._row_length, member_rows=self._member_rows
            )
        self._writer.write(self._buffer[: rows * self._row_length].reshape(rows, self._row_length))
        self._fill = 0


def check_seq_len(seq_len: int, *, row_length: int, member_rows: int) -> None:
    """Refuse a sequence length that a full member cannot be cut into without a remainder.

    Raises:
        DataError: if ``seq_len`` does not divide ``row_length * member_rows``; names the allowed lengths near
            it.
    """
    member_tokens = row_length * member_rows
    if seq_len >= 1 and member_tokens % seq_len == 0:
        return
    allowed = [n for n in range(1, member_tokens + 1) if member_tokens % n == 0]
    below = [n for n in allowed if n < seq_len][-2:]
    above = [n for n in allowed if n > seq_len][:2]
    raise DataError(
        f"data.seq_len={seq_len} cannot be cut from members of {member_rows} rows of {row_length} tokens; it "
        f"must divide {member_tokens}: nearest are {', '.join(map(str, below + above))} (or preprocess again "
        f"with another --row-length)"
    )


def samples_in(rows: npt.NDArray[np.integer], *, row_length: int, seq_len: int) -> npt.NDArray[np.int64]:
    """Sequences of ``seq_len`` that members of ``rows`` rows hold, int64 [members].

    Counted per member, since the last member of a shard may hold an odd number of rows; what is left of it
    when ``seq_len`` is larger than a row (less than one sequence per shard) is not served.
    """
    return rows.astype(np.int64) * row_length // seq_len


def find_documents(
    tokens: npt.NDArray[np.integer], *, eos_id: int, bos_id: int, pad_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Number the documents of each row and say which tokens count.

    Args:
        tokens: [batch, seq].
        eos_id: ends its document and belongs to it.
        bos_id: where it begins a fragment it is given, not predicted, so it is not counted.
        pad_id: belongs to no document and is not counted.

    Returns:
        documents, int32 [batch, seq], from 0 within the row and ``PAD_DOCUMENT`` at padding; counted, bool
        [batch, seq].
    """
    ends = tokens == eos_id
    documents = np.cumsum(ends, axis=1, dtype=np.int32) - ends.astype(np.int32)
    pad = tokens == pad_id
    first = np.ones(tokens.shape, dtype=np.bool_)
    first[:, 1:] = ends[:, :-1]
    counted = ~pad & ~((tokens == bos_id) & first)
    documents[pad] = PAD_DOCUMENT
    return documents, counted
