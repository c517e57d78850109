"""Philox and Feistel against published vectors and an implementation in plain Python integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtrain.diffusion.keyed import (
    NoiseKey,
    Purpose,
    permute,
    philox4x32,
    uniform_pair,
    uniforms,
)
from bdtrain.errors import ConfigError, ShapeError

WORD = 0xFFFFFFFF

# Known-answer vectors of philox4x32, 10 rounds, from the Random123 distribution: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


# Made by the integer implementations below; a change of these numbers is a change of `philox/1`.
FROZEN_PERMUTATION = [6, 3, 7, 0, 1, 9, 2, 8, 4, 5]
FROZEN_UNIFORMS = [0.3859384194935811, 0.6058360900844666, 0.1433456383031677]


def philox_of_integers(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in unbounded Python integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * a, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return a, b, c, d


def words_of_integers(
    seed: int, purpose: int, step: int, sample: int, copy: int, token: int, draw: int
) -> tuple[int, int, int, int]:
    """The documented packing, in Python integers."""
    last = (step >> 32) << 24 | purpose << 20 | copy << 8 | draw >> 1
    return philox_of_integers((token, sample & WORD, sample >> 32, last), (seed, step & WORD))


def permutation_of_integers(index: int, n: int, seed: int, purpose: int, step: int, stream: int) -> int:
    """The documented Feistel network with cycle walking, in Python integers."""
    keys = [words_of_integers(seed, purpose, step, stream, 0, number, 511)[0] for number in range(8)]
    bits = (n - 1).bit_length()
    rows = 2 ** math.ceil(bits / 2)
    columns = -(-n // rows)

    def scramble(value: int, key: int) -> int:
        value = (value ^ key) & WORD
        value = ((value ^ value >> 16) * 0x85EBCA6B) & WORD
        value = ((value ^ value >> 13) * 0xC2B2AE35) & WORD
        return value ^ value >> 16

    while True:
        right, left = divmod(index, rows)
        for number, key in enumerate(keys):
            if number % 2:
                right = (right + scramble(left, key)) % columns
            else:
                left = (left + scramble(right, key)) % rows
        index = right * rows + left
        if index < n:
            return index


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert philox_of_integers(counter, key) == expected
    # Several lengths: vectorised loops treat their tails apart.
    for length in (1, 3, 4, 17):
        words = philox4x32([torch.full((length,), value) for value in counter], key)
        for word, value in zip(words, expected, strict=True):
            assert word.tolist() == [value] * length


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    purpose=st.sampled_from(list(Purpose)),
    step=st.integers(0, 2**40 - 1),
    sample=st.integers(0, 2**63 - 1),
    copy=st.integers(0, 2**12 - 1),
    token=st.integers(0, 2**32 - 1),
    draw=st.integers(0, 510),
)
def test_uniforms_are_the_documented_words_of_philox(seed, purpose, step, sample, copy, token, draw):
    words = words_of_integers(seed, int(purpose), step, sample, copy, token, draw)
    high, low = words[2 * (draw % 2)], words[2 * (draw % 2) + 1]
    expected = (high * 2**21 + low // 2**11) / 2**53
    got = uniforms(NoiseKey(seed, purpose, step), torch.tensor(sample), copy, token, draw)
    assert got.dtype == torch.float64
    assert got.item() == expected


def test_each_part_of_the_key_changes_the_draw_at_every_bit():
    base = dict(seed=0, purpose=Purpose.TRAIN, step=0, sample=0, copy=0, token=0, draw=0)
    variants = [base]
    for name, bits in (("seed", 32), ("step", 40), ("sample", 63), ("copy", 12), ("token", 32), ("draw", 8)):
        variants += [{**base, name: 1 << bit} for bit in range(bits)]
    variants += [{**base, "purpose": purpose} for purpose in Purpose if purpose]
    seen = set()
    for v in variants:
        key = NoiseKey(v["seed"], v["purpose"], v["step"])
        seen.add(uniforms(key, torch.tensor(v["sample"]), v["copy"], v["token"], v["draw"]).item())
    assert len(seen) == len(variants)


def test_uniforms_broadcast_and_do_not_depend_on_company():
    key = NoiseKey(7, Purpose.TRAIN, 3)
    sample = torch.tensor([5, 2**40 + 1])[:, None, None]
    copy, token = torch.arange(3)[None, :, None], torch.arange(11)[None, None]
    u = uniforms(key, sample, copy, token, 1)
    assert u.shape == (2, 3, 11)
    for i in range(2):
        for c in range(3):
            for t in range(11):
                alone = uniforms(key, sample[i, 0, 0], c, t, 1)
                assert alone.item() == u[i, c, t].item()


def test_a_pair_is_the_even_and_the_odd_draw():
    key = NoiseKey(7, Purpose.SAMPLE)
    sample = torch.arange(5)
    first, second = uniform_pair(key, sample, 0, 9, 4)
    assert torch.equal(first, uniforms(key, sample, 0, 9, 4))
    assert torch.equal(second, uniforms(key, sample, 0, 9, 5))


def test_uniforms_look_uniform_and_uncorrelated():
    u = uniforms(NoiseKey(1, Purpose.TRAIN), torch.arange(200)[:, None], 0, torch.arange(500)[None], 0)
    counts = torch.histc(u, bins=100, min=0.0, max=1.0)
    chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum().item()
    assert 50.0 < chi_square < 160.0  # 99 degrees of freedom
    for other in (u.roll(1, 0), u.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack((u.flatten(), other.flatten())))[0, 1].item()
        assert abs(correlation) < 5.0 / math.sqrt(u.numel())


def test_keys_that_do_not_fit_the_packing_are_refused():
    for seed, step in ((-1, 0), (2**32, 0), (0, -1), (0, 2**40)):
        with pytest.raises(ConfigError):
            NoiseKey(seed, Purpose.TRAIN, step)
    key, sample = NoiseKey(0, Purpose.TRAIN), torch.arange(2)
    for copy, token, draw in ((2**12, 0, 0), (0, 2**32, 0), (0, 0, 511), (0, 0, -1)):
        with pytest.raises(ShapeError):
            uniforms(key, sample, copy, token, draw)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**40 - 1),
    stream=st.integers(0, 2**63 - 1),
)
def test_permute_is_a_bijection_for_every_size(n, seed, step, stream):
    image = permute(torch.arange(n), n, NoiseKey(seed, Purpose.TRAIN, step), stream=stream)
    assert torch.equal(image.sort().values, torch.arange(n))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2**59),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**63 - 1),
)
def test_permute_is_the_documented_network(n, fraction, seed, stream):
    index = min(int(fraction * n), n - 1)
    expected = permutation_of_integers(index, n, seed, int(Purpose.DATA_ORDER), 9, stream)
    key = NoiseKey(seed, Purpose.DATA_ORDER, 9)
    assert permute(index, n, key, stream=stream) == expected
    assert permute(torch.tensor([[index]]), n, key, stream=stream).item() == expected
    assert permute(np.array([index]), n, key, stream=stream).tolist() == [expected]


def test_permutations_are_frozen():
    key = NoiseKey(1234, Purpose.TRAIN, 7)
    expected = [permutation_of_integers(i, 10, 1234, 0, 7, 0) for i in range(10)]
    assert permute(torch.arange(10), 10, key).tolist() == expected == FROZEN_PERMUTATION
    assert uniforms(key, torch.arange(3), 1, 2, 0).tolist() == FROZEN_UNIFORMS


def test_a_tensor_of_streams_gives_each_element_its_own_permutation():
    key = NoiseKey(3, Purpose.EVALUATE)
    n = 37  # not a full grid: some elements walk
    streams = torch.tensor([0, 5, 2**40])[:, None]
    image = permute(torch.arange(n).expand(3, n), n, key, stream=streams)
    for row, stream in enumerate((0, 5, 2**40)):
        assert torch.equal(image[row], permute(torch.arange(n), n, key, stream=stream))
    assert len({tuple(row.tolist()) for row in image}) == 3


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_each_element_goes_everywhere_equally_often(n):
    trials = 3000
    key = NoiseKey(11, Purpose.TRAIN)
    image = permute(torch.arange(n).expand(trials, n), n, key, stream=torch.arange(trials)[:, None])
    for element in range(n):
        counts = torch.bincount(image[:, element], minlength=n).double()
        chi_square = ((counts - trials / n) ** 2 / (trials / n)).sum().item()
        assert chi_square < (n - 1) + 6.0 * math.sqrt(2.0 * (n - 1)) + 6.0


def test_permute_refuses_impossible_sizes():
    key = NoiseKey(0, Purpose.TRAIN)
    for n, stream in ((0, 0), (1 << 60, 0), (4, -1)):
        with pytest.raises(ShapeError):
            permute(0, n, key, stream=stream)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits():
    key = NoiseKey(1, Purpose.TRAIN, 2)
    sample, token = torch.arange(40)[:, None], torch.arange(33)[None]
    here = uniforms(key, sample, 3, token, 1)
    there = uniforms(key, sample.cuda(), 3, token.cuda(), 1)
    assert torch.equal(here, there.cpu())
    index = torch.arange(1000)
    assert torch.equal(permute(index, 1000, key), permute(index.cuda(), 1000, key).cpu())
