"""A plain text file as a split of its own: for evaluating on a text that was never made into shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bdtrain.data.source import Fingerprint, Row
from bdtrain.data.tokenizer import Tokenizer
from bdtrain.errors import DataError


class TextSource:
    """One document, cut into rows; the last one is filled with padding. A ``Source``."""

    def __init__(self, path: Path, tokenizer: Tokenizer, *, seq_len: int) -> None:
        """Read and encode a file.

        Args:
            path: a UTF-8 text.
            tokenizer: of the model that is to read it.
            seq_len: tokens per row.

        Raises:
            DataError: if the file is missing, empty or not UTF-8.
        """
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); give a text file") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 at byte {error.start}; convert it first, for example with "
                "iconv -f LATIN1 -t UTF-8"
            ) from error
        if not text:
            raise DataError(f"{path} is empty; give a text file with text in it")
        tokens = np.append(tokenizer.encode(text), tokenizer.eos_id).astype(np.int64)
        rows = -(-len(tokens) // seq_len)
        self._rows = np.full((rows, seq_len), tokenizer.pad_id, dtype=np.int64)
        self._rows.reshape(-1)[: len(tokens)] = tokens
        self.seq_len = seq_len
        self.num_samples = rows
        self.tokenizer_info = tokenizer.info
        self.byte_lengths = tokenizer.byte_lengths
        self.fingerprint: Fingerprint = {"order": "text/1", "tokenizer": tokenizer.sha256, "seq_len": seq_len}

    def sample(self, position: int) -> Row:
        """The rows again and again, in their order."""
        return self.row(position % self.num_samples)

    def row(self, number: int) -> Row:
        """Row ``number``, [seq]."""
        if not 0 <= number < self.num_samples:
            raise IndexError(f"row {number} of {self.num_samples}")
        row: Row = self._rows[number]
        return row
