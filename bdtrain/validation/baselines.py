"""What a model has to beat on the same text: unigram and bigram models of its tokens, gzip on its bytes."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bdtrain.errors import DataError

DISCOUNT = 0.75


@dataclass(frozen=True)
class Baselines:
    """Bits per UTF-8 byte of the held-out text; lower is better.

    Attributes:
        unigram_bpb: token frequencies of the training text, add-one smoothing.
        bigram_bpb: token pairs of the training text, absolute discounting, backing off to the unigram model.
        gzip_bpb: gzip at its best level on the bytes of the held-out text as one stream.
    """

    unigram_bpb: float
    bigram_bpb: float
    gzip_bpb: float


def measure_baselines(
    train: Iterable[NDArray[np.integer]],
    held_out: NDArray[np.integer],
    *,
    vocab_size: int,
    eos_id: int,
    text: bytes,
) -> Baselines:
    """Fit the models on the training tokens and score the held-out ones.

    Args:
        train: the training text as pieces of one stream of tokens, padding left out.
        held_out: the held-out text, [tokens], every document ended by EOS, padding left out.
        vocab_size: number of token ids.
        eos_id: what stands before the first token.
        text: UTF-8 bytes of the held-out text; the unit of the result and what gzip sees.

    Raises:
        DataError: if one of the texts is empty.
    """
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    keys: list[NDArray[np.int64]] = []
    previous = eos_id
    for piece in train:
        tokens = piece.astype(np.int64)
        if not len(tokens):
            continue
        unigrams += np.bincount(tokens, minlength=vocab_size)
        keys.append(np.concatenate(([previous], tokens[:-1])) * vocab_size + tokens)
        previous = int(tokens[-1])
    if not keys or not len(held_out) or not text:
        raise DataError("baselines need training and held-out text; one of them is empty")

    # Unigram with add-one smoothing.
    log_unigram = np.log((unigrams + 1) / (unigrams.sum() + vocab_size))
    tokens = held_out.astype(np.int64)
    unigram_nats = -log_unigram[tokens].sum()

    # Bigram: max(c(h, w) - d, 0) / c(h) + d * kinds(h) / c(h) * unigram(w).
    pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
    contexts = pairs // vocab_size
    context_counts = np.bincount(contexts, weights=counts, minlength=vocab_size)
    context_kinds = np.bincount(contexts, minlength=vocab_size)
    history = np.concatenate(([eos_id], tokens[:-1]))
    wanted = history * vocab_size + tokens
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    total = np.maximum(context_counts[history], 1)
    back_off = np.where(context_counts[history] > 0, DISCOUNT * context_kinds[history] / total, 1.0)
    probability = np.maximum(seen - DISCOUNT, 0) / total + back_off * np.exp(log_unigram[tokens])
    bigram_nats = -np.log(probability).sum()

    bits = 1 / (math.log(2) * len(text))
    return Baselines(
        unigram_bpb=float(unigram_nats * bits),
        bigram_bpb=float(bigram_nats * bits),
        gzip_bpb=8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text),
    )
