from __future__ import annotations

from collections import Counter
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtrain.data.order import ALGORITHM, LaneOrder
from bdtrain.diffusion.keyed import NoiseKey, Purpose, permute
from bdtrain.errors import ConfigError, DataError

SHARDS = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5), min_size=1, max_size=7).filter(
    lambda shards: sum(map(sum, shards)) > 0
)


def counts_of(shards: list[list[int]]) -> list[np.ndarray]:
    return [np.array(counts) for counts in shards]


def list_pass(shards: list[list[int]], seed: int, number: int, window_shards: int, lanes: int) -> list[tuple]:
    """The definition of the order as plain lists, position by position."""
    key = NoiseKey(seed, Purpose.DATA_ORDER, number)

    def shuffle(items: list, stream: int) -> list:
        return [items[image] for image in permute(np.arange(len(items)), len(items), key, stream=stream)]

    shard_order = shuffle(list(range(len(shards))), 0)
    result = []
    for window in range(ceil(len(shards) / window_shards)):
        chosen = shard_order[window * window_shards : (window + 1) * window_shards]
        members = [(shard, member) for shard in chosen for member in range(len(shards[shard]))]
        members = shuffle(members, (window + 1) << 32)
        rows = [(*place, sample) for place in members for sample in range(shards[place[0]][place[1]])]
        sizes = [len(rows) // lanes + (lane < len(rows) % lanes) for lane in range(lanes)]
        starts = np.cumsum([0, *sizes])
        runs = [rows[starts[lane] : starts[lane + 1]] for lane in range(lanes)]
        runs = [shuffle(run, (window + 1) << 32 | (lane + 1)) if run else [] for lane, run in enumerate(runs)]
        result += [runs[position % lanes][position // lanes] for position in range(len(rows))]
    return result


@settings(max_examples=40, deadline=None)
@given(
    shards=SHARDS, seed=st.integers(0, 2**32 - 1), window_shards=st.integers(1, 8), lanes=st.integers(1, 9)
)
def test_the_order_is_its_definition_and_each_pass_shows_every_sample_once(
    shards: list[list[int]], seed: int, window_shards: int, lanes: int
) -> None:
    order = LaneOrder(counts_of(shards), seed=seed, window_shards=window_shards, lanes=lanes)
    samples = order.pass_samples
    everything = Counter(
        (shard, member, sample)
        for shard, counts in enumerate(shards)
        for member, count in enumerate(counts)
        for sample in range(count)
    )
    for number in range(2):
        places = [tuple(order.locate(number * samples + index)) for index in range(samples)]
        assert places == list_pass(shards, seed, number, window_shards, lanes)
        assert Counter(places) == everything


def test_any_position_can_be_asked_first() -> None:
    shards = counts_of([[5, 3], [4, 4, 2], [6]])
    walked = LaneOrder(shards, seed=3, window_shards=2, lanes=4)
    forwards = [walked.locate(position) for position in range(3 * walked.pass_samples)]
    for position in (50, 0, 71, 24, 25):
        assert LaneOrder(shards, seed=3, window_shards=2, lanes=4).locate(position) == forwards[position]
    far = 320_000_000
    assert LaneOrder(shards, seed=3, lanes=4).locate(far) == LaneOrder(shards, seed=3, lanes=4).locate(far)


def test_lanes_longer_than_a_computed_part_are_still_a_permutation() -> None:
    order = LaneOrder(counts_of([[5000] * 3]), seed=1, lanes=2)
    places = {order.locate(position) for position in range(15000)}
    assert len(places) == 15000


def test_passes_seeds_and_windows_differ() -> None:
    shards = counts_of([[16] * 8] * 4)

    def first(seed: int, start: int) -> list:
        order = LaneOrder(shards, seed=seed, window_shards=2, lanes=8)
        return [order.locate(start + index) for index in range(256)]

    assert first(0, 0) != first(1, 0)
    assert first(0, 0) != first(0, 512)
    within = [[(place.member, place.sample) for place in first(0, start)] for start in (0, 256)]
    assert within[0] != within[1]


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_a_rank_touches_its_share_of_the_members(dp: int) -> None:
    lanes, members, rows = 16, 64, 8
    shards = counts_of([[rows] * members for _ in range(4)])
    order = LaneOrder(shards, seed=5, window_shards=4, lanes=lanes)
    batch = 16
    touched: list[set] = [set() for _ in range(dp)]
    for position in range(order.pass_samples):
        place = order.locate(position)
        touched[position % batch % dp].add((place.shard, place.member))
    # 256 members of 8 rows make 16 lanes of exactly 16 members: no lane's bound cuts one.
    assert [len(one) for one in touched] == [256 // dp] * dp
    assert sum(map(len, touched)) == len(set().union(*touched))


def test_a_lane_bound_inside_a_member_costs_at_most_one_more_per_lane() -> None:
    lanes, dp = 16, 4
    shards = counts_of([[7] * 61, [5] * 50])
    order = LaneOrder(shards, seed=5, window_shards=2, lanes=lanes)
    touched: list[set] = [set() for _ in range(dp)]
    for position in range(order.pass_samples):
        place = order.locate(position)
        touched[position % dp].add((place.shard, place.member))
    assert all(len(one) <= 111 / dp * 1.5 + lanes / dp for one in touched)
    assert sum(map(len, touched)) <= 111 + lanes


def test_the_frozen_order() -> None:
    """A change here is a change of every run's data: it needs another name than lanes/1."""
    assert ALGORITHM == "lanes/1"
    order = LaneOrder(counts_of([[4, 4, 1], [4, 3], [2], [4, 4, 4, 2]]), seed=1234, window_shards=2, lanes=4)
    found = ["".join(map(str, order.locate(position))) for position in (*range(12), 36, 37, 10**6)]
    assert " ".join(found) == GOLDEN


GOLDEN = "103 003 010 112 101 000 011 111 100 001 012 110 101 110 110"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_shards": 0}, "data.window_shards=0"),
        ({"lanes": 0}, "data.lanes=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaneOrder(counts_of([[1]]), **{"seed": 0, **changes})


def test_an_empty_corpus_has_no_order() -> None:
    with pytest.raises(DataError, match="no sample"):
        LaneOrder(counts_of([[0, 0]]), seed=0)
