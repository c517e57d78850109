"""A source without files: documents of a Markov chain, for tests and for runs that need no corpus.

Each ordinary token has four successors, drawn once from the seed, taken with probabilities 0.5, 0.25, 0.15
and 0.1; a document ends after any token with probability 1/64 and the next begins anywhere. A model that has
learnt the table reaches about 1.3 nats per token; one that has learnt nothing has ln(vocab_size).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from bdtrain.data.source import Fingerprint, Row
from bdtrain.data.tokenizer import TokenizerInfo
from bdtrain.errors import ConfigError

ALGORITHM = "markov/1"

SUCCESSOR_CHANCES = (0.5, 0.25, 0.15, 0.1)
END_CHANCE = 1 / 64
_FIRST_ORDINARY = 6
_SPLITS = {"train": 0, "valid": 1}
_VALID_SHARE = 20
"""The held-out split has one row for so many training rows, and at least 8."""

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class SyntheticSource:
    """Rows of a Markov chain, each a pure function of (seed, split, number)."""

    def __init__(self, *, split: str, seq_len: int, seed: int, vocab_size: int, tokens: int) -> None:
        """Draw the successor table.

        Args:
            split: ``train`` or ``valid``; they share the table and no row.
            seq_len: tokens per row.
            seed: of the table and the rows, in [0, 2**32).
            vocab_size: ids, the 6 special ones included.
            tokens: size of one pass over the training split.

        Raises:
            ConfigError: if a size is too small or the split unknown.
        """
        if vocab_size < _FIRST_ORDINARY + len(SUCCESSOR_CHANCES):
            raise ConfigError(
                f"data.synthetic_vocab_size={vocab_size}; at least "
                f"{_FIRST_ORDINARY + len(SUCCESSOR_CHANCES)} are needed (6 special ids and 4 successors)"
            )
        if split not in _SPLITS:
            raise ConfigError(f"split {split!r} is unknown; allowed: {', '.join(_SPLITS)}")
        if tokens < seq_len:
            raise ConfigError(
                f"data.synthetic_tokens={tokens} is less than one row of data.seq_len={seq_len}"
            )
        train_rows = tokens // seq_len
        self.num_samples = train_rows if split == "train" else max(8, train_rows // _VALID_SHARE)
        self.seq_len = seq_len
        self._split = _SPLITS[split]
        self._seed = seed
        self._ordinary = vocab_size - _FIRST_ORDINARY
        name = f"{ALGORITHM}:{seed}:{vocab_size}"
        self.tokenizer_info = TokenizerInfo(vocab_size, hashlib.sha256(name.encode()).hexdigest())
        # There is no text; one byte per ordinary token keeps "bits per byte" a finite, comparable number.
        self.byte_lengths: npt.NDArray[np.int64] = np.ones(vocab_size, dtype=np.int64)
        self.byte_lengths[:_FIRST_ORDINARY] = 0
        self.fingerprint: Fingerprint = {
            "order": ALGORITHM,
            "corpus": name,
            "split": split,
            "tokenizer": self.tokenizer_info.sha256,
            "seq_len": seq_len,
            "seed": seed,
            "synthetic_tokens": tokens,
        }
        # Four neighbours from a drawn start: distinct, however small the vocabulary.
        starts = _hash(np.arange(self._ordinary), seed, 2) % np.uint64(self._ordinary)
        offsets = np.arange(len(SUCCESSOR_CHANCES), dtype=np.uint64)
        table = (starts[:, None] + offsets) % np.uint64(self._ordinary)
        self._successors: list[list[int]] = table.astype(np.int64).tolist()

    def sample(self, position: int) -> Row:
        """The row at a position; passes repeat their rows."""
        return self.row(position % self.num_samples)

    def row(self, number: int) -> Row:
        """Row ``number``, int64 [seq]."""
        draws = _hash(np.arange(2 * self.seq_len), self._seed, 3 + self._split, number)
        units = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
        choices = np.searchsorted(
            np.cumsum(SUCCESSOR_CHANCES)[:-1], units[: self.seq_len], side="right"
        ).tolist()
        starts = (draws[: self.seq_len] % np.uint64(self._ordinary)).astype(np.int64).tolist()
        ends = (units[self.seq_len :] < END_CHANCE).tolist()
        tokens = []
        state: int | None = None
        for place in range(self.seq_len):
            if state is not None and ends[place]:
                tokens.append(self.tokenizer_info.eos_id)
                state = None
                continue
            state = starts[place] if state is None else self._successors[state][choices[place]]
            tokens.append(state + _FIRST_ORDINARY)
        return np.array(tokens, dtype=np.int64)


def _hash(index: npt.NDArray[np.integer], *words: int) -> npt.NDArray[np.uint64]:
    """splitmix64 of each index under key words; uint64 of the shape of ``index``."""
    key = 0
    for word in words:
        key = int(_splitmix(np.array([key ^ (word & _WORD)], dtype=np.uint64))[0])
    return _splitmix(index.astype(np.uint64) * np.uint64(_GOLDEN) ^ np.uint64(key))


def _splitmix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea and Flood, 2014); products wrap."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
