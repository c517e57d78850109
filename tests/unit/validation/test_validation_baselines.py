"""Unigram, bigram and gzip against a count by hand."""

import gzip
import math

import numpy as np
import pytest

from bdtrain.errors import DataError
from bdtrain.validation.baselines import measure_baselines

VOCAB, EOS = 5, 2


def by_hand(train, held_out):
    """Both models with dictionaries and loops."""
    unigram = {w: (train.count(w) + 1) / (len(train) + VOCAB) for w in range(VOCAB)}
    pairs = list(zip([EOS, *train[:-1]], train, strict=True))
    uni = bi = 0.0
    for h, w in zip([EOS, *held_out[:-1]], held_out, strict=True):
        uni -= math.log2(unigram[w])
        after = [b for a, b in pairs if a == h]
        if after:
            p = max(after.count(w) - 0.75, 0) / len(after) + 0.75 * len(set(after)) / len(after) * unigram[w]
        else:
            p = unigram[w]
        bi -= math.log2(p)
    return uni, bi


def test_models_equal_the_count_by_hand():
    rng = np.random.default_rng(0)
    train = rng.choice([0, 1, 2, 3], size=40, p=[0.5, 0.2, 0.2, 0.1]).tolist()
    held_out = rng.integers(0, VOCAB, size=15).tolist()  # 4 never stands in the training text
    text = b"seven bytes and some"
    pieces = [
        np.array(train[:13], dtype=np.uint16),
        np.array([], dtype=np.uint16),
        np.array(train[13:], dtype=np.uint16),
    ]
    found = measure_baselines(pieces, np.array(held_out), vocab_size=VOCAB, eos_id=EOS, text=text)
    uni, bi = by_hand(train, held_out)
    assert found.unigram_bpb == pytest.approx(uni / len(text), rel=1e-12)
    assert found.bigram_bpb == pytest.approx(bi / len(text), rel=1e-12)
    assert found.gzip_bpb == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)


def test_bigram_probabilities_sum_to_one():
    train = [1, 3, 1, 3, 1, 2]
    total = 0.0
    for w in range(VOCAB):
        found = measure_baselines(
            [np.array(train)], np.array([1, w]), vocab_size=VOCAB, eos_id=EOS, text=b"x"
        ).bigram_bpb
        first = measure_baselines(
            [np.array(train)], np.array([1]), vocab_size=VOCAB, eos_id=EOS, text=b"x"
        ).bigram_bpb
        total += 2 ** -(found - first)
    assert total == pytest.approx(1.0, rel=1e-12)


def test_empty_text_is_refused():
    with pytest.raises(DataError, match="empty"):
        measure_baselines([], np.array([1]), vocab_size=VOCAB, eos_id=EOS, text=b"x")
