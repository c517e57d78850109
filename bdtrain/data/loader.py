"""Batches: the rows that one data-parallel rank takes of each global batch, made ahead of time by one thread.

The trainer owns the cursor. ``batch(consumed)`` is a pure function of it, so a batch that was prepared and
not used is never lost, and a restart, another dp or another micro-batch size sees the same global batches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from bdtrain.data.packing import find_documents
from bdtrain.data.source import Fingerprint, Row, Source
from bdtrain.data.tokenizer import TokenizerInfo
from bdtrain.errors import ConfigError, DataError

FILLER_INDEX = -1
"""``sample_index`` of a row that only makes up the numbers: all padding, nothing counted."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a global batch, on the CPU.

    Attributes:
        tokens: ids, int64 [batch, seq].
        documents: document number within the row, from 0, and -1 at padding, int32 [batch, seq]; EOS belongs
            to the document that it ends.
        counted: tokens that a reported sum is over, bool [batch, seq]; not padding, nor a BOS that begins a
            fragment.
        sample_index: position of each row in the stream of samples (in validation: its number in the split),
            int64 [batch].
        batch_index: index of each row in the global batch, int64 [batch].
    """

    tokens: Tensor
    documents: Tensor
    counted: Tensor
    sample_index: Tensor
    batch_index: Tensor


def make_batch(
    rows: Sequence[Row], info: TokenizerInfo, sample_index: Sequence[int], batch_index: Sequence[int]
) -> Batch:
    """Stack rows and find their documents.

    Args:
        rows: tokens, each [seq].
        info: special ids.
        sample_index: one per row.
        batch_index: one per row.

    Raises:
        DataError: if a token is outside the vocabulary.
    """
    tokens = np.stack(rows).astype(np.int64)
    if tokens.max() >= info.vocab_size:
        raise DataError(
            f"the data hold token {tokens.max()}, the tokenizer has {info.vocab_size} ids: the corpus was "
            f"not made with this tokenizer; run tools/preprocess.py again"
        )
    documents, counted = find_documents(tokens, eos_id=info.eos_id, bos_id=info.bos_id, pad_id=info.pad_id)
    return Batch(
        tokens=torch.from_numpy(tokens),
        documents=torch.from_numpy(documents),
        counted=torch.from_numpy(counted),
        sample_index=torch.tensor(sample_index, dtype=torch.int64),
        batch_index=torch.tensor(batch_index, dtype=torch.int64),
    )


def split_rows(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """Cut a batch into micro-batches of ``micro_batch_size`` rows; the last one may be smaller."""
    fields = ("tokens", "documents", "counted", "sample_index", "batch_index")
    starts = range(0, batch.tokens.shape[0], micro_batch_size)
    return [Batch(**{f: getattr(batch, f)[s : s + micro_batch_size] for f in fields}) for s in starts]


class Loader:
    """Training batches of one data-parallel rank. Close it, or use it as a context manager.

    Rank r takes the indices ``i % dp_size == r`` of the global batch, which keeps it in its own lanes of the
    order.

    Attributes:
        fingerprint: to be stored with a run and compared on resume
            (:func:`~bdtrain.data.source.check_fingerprint`).
        tokenizer_info: size and special ids.
        epoch_samples: samples of one epoch.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch_batches: int = 2,
        epoch_tokens: int | None = None,
    ) -> None:
        """Start reading for one rank.

        Args:
            source: the training split.
            global_batch_size: samples of a step over all ranks.
            dp_rank: this rank, in [0, dp_size).
            dp_size: data-parallel ranks; must divide ``global_batch_size``.
            prefetch_batches: batches made ahead; 0 makes each when it is asked for.
            epoch_tokens: length of an epoch; ``None`` is one pass. It only names a stretch of the stream:
                every pass still shows every sample once before the next begins.

        Raises:
            ConfigError: if a size does not fit.
        """
        if global_batch_size < 1 or dp_size < 1 or global_batch_size % dp_size:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} must be a positive multiple of the {dp_size} "
                f"data-parallel ranks"
            )
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank={dp_rank}; allowed are 0 to {dp_size - 1}")
        if prefetch_batches < 0:
            raise ConfigError(f"data.prefetch_batches={prefetch_batches}; it must be 0 or more")
        if epoch_tokens is not None and epoch_tokens < source.seq_len:
            raise ConfigError(
                f"data.epoch_tokens={epoch_tokens} is less than one sequence of {source.seq_len} tokens"
            )
        self.fingerprint: Fingerprint = source.fingerprint
        self.tokenizer_info: TokenizerInfo = source.tokenizer_info
        self.epoch_samples = source.num_samples if epoch_tokens is None else epoch_tokens // source.seq_len
        self._source = source
        self._global_batch_size, self._dp_rank, self._dp_size = global_batch_size, dp_rank, dp_size
        self._prefetch = prefetch_batches
        # One thread makes every batch: the source need not be thread-safe, and the order of requests is kept.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="bdtrain-loader")
        self._ahead: dict[int, Future[Batch]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def batch(self, consumed: int) -> Batch:
        """This rank's rows of the global batch that begins at a cursor.

        Args:
            consumed: samples of the stream used so far, over all ranks; the trainer's one integer of state.

        Returns:
            ``global_batch_size / dp_size`` rows.

        Raises:
            DataError: if the data are damaged; also where the batch was made ahead.
        """
        if consumed < 0:
            raise ConfigError(f"consumed={consumed}; it must be 0 or more")
        with self._lock:
            if self._closed:
                raise RuntimeError("the loader is closed")
            starts = [consumed + step * self._global_batch_size for step in range(self._prefetch + 1)]
            for start in [start for start in self._ahead if start not in starts]:
                # The cursor jumped (a resume, another phase): what was made ahead is not wanted.
                self._ahead.pop(start).cancel()
            for start in starts:
                if start not in self._ahead:
                    self._ahead[start] = self._executor.submit(self._make, start)
            wanted = self._ahead.pop(consumed)
        return wanted.result()

    def epoch_of(self, consumed: int) -> int:
        """Number of the epoch that the sample at a cursor belongs to."""
        return consumed // self.epoch_samples

    def close(self) -> None:
        """Stop the thread; harmless when repeated."""
        with self._lock:
            self._closed = True
            self._ahead.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _make(self, consumed: int) -> Batch:
        indices = range(self._dp_rank, self._global_batch_size, self._dp_size)
        positions = [consumed + index for index in indices]
        rows = [self._source.sample(position) for position in positions]
        return make_batch(rows, self.tokenizer_info, positions, indices)


class ValidationSet:
    """Held-out rows in stored order, each at most once.

    Attributes:
        numbers: of the rows in the split; where not all are taken they are spread evenly, since neighbours
            are of one text.
    """

    def __init__(
        self, source: Source, *, max_sequences: int | None = None, part: tuple[int, int] | None = None
    ) -> None:
        """Choose the rows.

        Args:
            source: the held-out split.
            max_sequences: only so many; ``None`` is all.
            part: of the rows so chosen only those from the first number up to the second.

        Raises:
            ConfigError: if ``max_sequences`` is below 1.
        """
        if max_sequences is not None and max_sequences < 1:
            raise ConfigError(f"validation.sequences={max_sequences}; it must be at least 1, or null for all")
        self.fingerprint: Fingerprint = source.fingerprint
        self.tokenizer_info: TokenizerInfo = source.tokenizer_info
        chosen = min(source.num_samples, max_sequences or source.num_samples)
        numbers = tuple(place * source.num_samples // chosen for place in range(chosen))
        self.numbers = numbers if part is None else numbers[slice(*part)]
        self.num_sequences = len(self.numbers)
        self._source = source
        self._byte_lengths = torch.from_numpy(source.byte_lengths)

    def batches(self, batch_size: int, *, dp_rank: int = 0, dp_size: int = 1) -> Iterator[Batch]:
        """Batches of one rank, in order.

        All ranks get the same number of batches of the same sizes: what the last one lacks is filled with
        rows of padding (``sample_index`` -1), in which nothing is counted.

        Args:
            batch_size: rows per batch and rank.
            dp_rank: this rank.
            dp_size: ranks that share the rows.
        """
        if batch_size < 1:
            raise ConfigError(f"the validation batch size is {batch_size}; it must be at least 1")
        stride = batch_size * dp_size
        for start in range(0, self.num_sequences, stride):
            count = -(-min(stride, self.num_sequences - start) // dp_size)
            indices = [dp_rank + turn * dp_size for turn in range(count)]
            numbers = [
                self.numbers[start + index] if start + index < self.num_sequences else FILLER_INDEX
                for index in indices
            ]
            padding = np.full(self._source.seq_len, self.tokenizer_info.pad_id, dtype=np.int64)
            rows = [padding if number == FILLER_INDEX else self._source.row(number) for number in numbers]
            yield make_batch(rows, self.tokenizer_info, numbers, indices)

    def utf8_bytes(self, batch: Batch) -> Tensor:
        """UTF-8 bytes of text that the counted tokens of each row decode to, int64 [batch].

        Exact for a document that is cut into several rows, since it is summed token by token; EOS adds none.
        """
        return (self._byte_lengths[batch.tokens] * batch.counted).sum(dim=1)
