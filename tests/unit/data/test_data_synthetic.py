from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from bdtrain.data.synthetic import END_CHANCE, SUCCESSOR_CHANCES, SyntheticSource
from bdtrain.errors import ConfigError


def make(**changes: object) -> SyntheticSource:
    settings = {"split": "train", "seq_len": 128, "seed": 3, "vocab_size": 40, "tokens": 128 * 400, **changes}
    return SyntheticSource(**settings)


def test_a_row_is_a_pure_function_of_seed_and_number() -> None:
    first, second = make(), make()
    backwards = [second.row(number) for number in reversed(range(20))][::-1]
    assert all(np.array_equal(first.row(number), backwards[number]) for number in range(20))
    assert np.array_equal(first.sample(405), first.row(5))
    assert not np.array_equal(first.row(0), first.row(1))
    assert not np.array_equal(first.row(0), make(seed=4).row(0))


def test_the_splits_share_the_language_and_no_row() -> None:
    train, valid = make(), make(split="valid")
    assert train.num_samples == 400 and valid.num_samples == 20
    rows = {train.row(number).tobytes() for number in range(400)}
    assert rows.isdisjoint(valid.row(number).tobytes() for number in range(20))
    assert train._successors == valid._successors


def test_tokens_follow_the_stated_chain() -> None:
    source = make()
    after: dict[int, Counter] = defaultdict(Counter)
    total = ends = 0
    for number in range(400):
        row = source.row(number)
        assert set(row.tolist()) <= {2, *range(6, 40)}
        for token, following in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            if token != 2:
                total += 1
                ends += following == 2
                after[token][following] += following != 2
    # Binomial: 5 standard deviations.
    assert abs(ends / total - END_CHANCE) < 5 * (END_CHANCE / total) ** 0.5
    shares = np.zeros(4)
    for counts in after.values():
        ranked = [count for _, count in sorted(counts.items(), key=lambda item: -item[1]) if count]
        assert len(ranked) == 4
        shares += ranked
    shares /= shares.sum()
    assert np.abs(shares - np.array(SUCCESSOR_CHANCES)).max() < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 9}, "at least 10"),
        ({"tokens": 100}, "data.synthetic_tokens=100"),
        ({"split": "test"}, "allowed: train, valid"),
    ],
)
def test_wrong_sizes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)
