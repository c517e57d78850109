"""Keyed noise: every draw is a pure function of (seed, purpose, step, sample, copy, token, draw).

No generator is carried anywhere, so every tensor- and pipeline-parallel rank, any data-parallel size, a
resumed run and a restarted worker draw the same bits, on CPU and on CUDA. Two parts:

* ``uniforms``: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), float64
  from 53 bits;
* ``permute``: a keyed Feistel permutation of ``range(n)``, so that a rank computes the strata of its own rows
  only.

How a key is packed (algorithm name ``philox/1``; a change of this table is a new name). One Philox call takes
two key words and four counter words of 32 bits and returns four, which are two draws. The packing is
injective: no two keys share a draw.

    key 0      seed (32 bits)
    key 1      step, low 32 bits
    counter 0  token (32 bits)
    counter 1  sample, low 32 bits
    counter 2  sample, high 32 bits
    counter 3  step, high 8 bits << 24 | purpose (4 bits) << 20 | copy (12 bits) << 8 | draw >> 1 (8 bits)

``draw`` even takes output words 0 and 1, odd takes 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdtrain.errors import ConfigError, ShapeError

ALGORITHM = "philox/1"
"""Name of the generator and of the packing; stored with every state that depends on it."""

PHILOX_ROUNDS = 10
FEISTEL_ROUNDS = 8
PERMUTATION_DRAW = 511
"""The last draw number is the round keys' of ``permute``; ``uniforms`` refuses it."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SEED_BITS, _STEP_BITS, _COPY_BITS, _TOKEN_BITS = 32, 40, 12, 32


class Purpose(IntEnum):
    """What a draw is for. Purposes never share a stream; the numbers are part of the packing."""

    TRAIN = 0
    EVALUATE = 1
    REFIT = 2
    SAMPLE = 3
    DATA_ORDER = 4
    INIT = 5


@dataclass(frozen=True)
class NoiseKey:
    """The part of a key that the host knows.

    Attributes:
        seed: the run's seed, in [0, 2**32).
        purpose: what the draws are for.
        step: batches taken so far, skipped ones included, in [0, 2**40); 0 for evaluation and re-fit, which
            have no step (a replicate of an evaluation is a ``copy``).

    Raises:
        ConfigError: at construction, if seed or step is out of range.
    """

    seed: int
    purpose: Purpose
    step: int = 0

    def __post_init__(self) -> None:
        """Refuse what the packing cannot hold: it would silently alias another key."""
        if not 0 <= self.seed < 1 << _SEED_BITS:
            raise ConfigError(f"seed={self.seed}; allowed are 0 to 2**32 - 1; choose a seed in that range")
        if not 0 <= self.step < 1 << _STEP_BITS:
            raise ConfigError(f"step={self.step}; allowed are 0 to 2**40 - 1")


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on tensors.

    Args:
        counter: four int64 tensors of 32-bit values, shapes that broadcast.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit values, all of the broadcast shape.

    Source: Salmon et al. 2011; the published known-answer vectors are frozen in the tests.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # 32 x 32 bits can pass 2**63: int64 products wrap, and the masks read the wrapped bits as unsigned.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(_MASK) ^ c1 ^ k0
        c2 = (product0 >> 32).bitwise_and_(_MASK) ^ c3 ^ k1
        c1 = product1.bitwise_and_(_MASK)
        c3 = product0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    # Every output word depends on every input word by now, so all four have the broadcast shape.
    return c0, c1, c2, c3


def uniforms(key: NoiseKey, sample: Tensor, copy: Tensor | int, token: Tensor | int, draw: int) -> Tensor:
    """Keyed uniform draws.

    Args:
        key: seed, purpose and step.
        sample: global position of the sequence, int64 in [0, 2**63), any shape.
        copy: noise copy or replicate, in [0, 2**12); broadcasts with ``sample``.
        token: position in the row, in [0, 2**32); broadcasts with ``sample``.
        draw: which draw of this token, in [0, 511).

    Returns:
        float64 in [0, 1) with 53 random bits, of the broadcast shape, on the device of ``sample``.

    Raises:
        ShapeError: if ``draw`` or an integer ``copy`` or ``token`` is out of range.
    """
    pair = uniform_pair(key, sample, copy, token, draw)
    return pair[draw & 1]


def uniform_pair(
    key: NoiseKey, sample: Tensor, copy: Tensor | int, token: Tensor | int, draw: int
) -> tuple[Tensor, Tensor]:
    """The draws ``draw`` with its lowest bit cleared and set: both at the cost of one.

    Arguments and errors as for ``uniforms``.
    """
    if not 0 <= draw < PERMUTATION_DRAW:
        raise ShapeError(f"draw={draw}; allowed are 0 to {PERMUTATION_DRAW - 1}")
    w0, w1, w2, w3 = _words(key, sample, copy, token, draw)
    return _to_unit(w0, w1), _to_unit(w2, w3)


def _words(
    key: NoiseKey, sample: Tensor, copy: Tensor | int, token: Tensor | int, draw: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack the key as the module's table says and run Philox."""
    copies = _as_words(copy, _COPY_BITS, "copy", sample.device)
    tokens = _as_words(token, _TOKEN_BITS, "token", sample.device)
    sample = sample.to(torch.int64)
    high = (key.step >> 32) << 24 | int(key.purpose) << 20 | draw >> 1
    counter = (tokens, sample & _MASK, (sample >> 32) & _MASK, copies << 8 | high)
    return philox4x32(counter, (key.seed, key.step & _MASK))


def _as_words(value: Tensor | int, bits: int, name: str, device: torch.device) -> Tensor:
    """``value`` as an int64 tensor; a tensor's values are trusted, a check would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(torch.int64)
    if not 0 <= value < 1 << bits:
        raise ShapeError(f"{name}={value}; allowed are 0 to 2**{bits} - 1")
    return torch.tensor(value, dtype=torch.int64, device=device)


def _to_unit(high: Tensor, low: Tensor) -> Tensor:
    """53 bits of two words as float64 in [0, 1): exact, so the same on every device."""
    return ((high << 21) | (low >> 11)).to(torch.float64) * 2.0**-53


@overload
def permute(index: Tensor, n: int, key: NoiseKey, *, stream: int | Tensor = 0) -> Tensor: ...
@overload
def permute(index: NDArray[np.int64], n: int, key: NoiseKey, *, stream: int = 0) -> NDArray[np.int64]: ...
@overload
def permute(index: int, n: int, key: NoiseKey, *, stream: int = 0) -> int: ...
def permute(
    index: Tensor | NDArray[np.int64] | int, n: int, key: NoiseKey, *, stream: int | Tensor = 0
) -> Tensor | NDArray[np.int64] | int:
    """Where a keyed permutation of ``range(n)`` sends ``index``: O(1) per index, nothing of size n is made.

    A Feistel network on pairs (left, right) of a grid of 2**ceil(bits/2) by ceil(n / 2**ceil(bits/2)) cells,
    with modular addition in place of xor so that the grid is barely larger than n; a value outside
    ``range(n)`` is sent through again (cycle walking), which keeps a bijection. When n fills the grid, as
    every power of two does, nothing walks and no host waits for a device.

    Args:
        index: int64 in [0, n), any shape; a tensor, a numpy array or an int.
        n: size of the permuted range, at least 1 and below 2**60.
        key: seed, purpose and step.
        stream: which permutation of this key, in [0, 2**63); for a tensor ``index`` also an int64 tensor that
            broadcasts to its shape, one permutation per element.

    Returns:
        The images, in the type and shape of ``index`` (int64).

    Raises:
        ShapeError: if ``n`` or an integer ``stream`` is out of range (the values of ``index`` are trusted).
    """
    if not 1 <= n < 1 << 60:
        raise ShapeError(f"permutation of {n} elements; allowed are 1 to 2**60 - 1")
    if isinstance(stream, int) and not 0 <= stream < 1 << 63:
        raise ShapeError(f"stream={stream}; allowed are 0 to 2**63 - 1")
    if isinstance(index, Tensor):
        return _permute_tensor(index, n, key, stream)
    if isinstance(index, int):
        return int(_permute_tensor(torch.tensor(index), n, key, stream))
    flat = torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64))
    return np.asarray(_permute_tensor(flat, n, key, stream).numpy(), dtype=np.int64)


def _permute_tensor(index: Tensor, n: int, key: NoiseKey, stream: int | Tensor) -> Tensor:
    """``permute`` on a tensor."""
    left_bits = ((n - 1).bit_length() + 1) // 2
    columns = -(-n // (1 << left_bits))
    keys = _round_keys(key, stream)
    value = _feistel(index.to(torch.int64), left_bits, columns, keys)
    if columns << left_bits == n:
        return value
    flat = value.reshape(-1).clone()
    outside = (flat >= n).nonzero().squeeze(1)
    while outside.numel():
        own_keys = [k if isinstance(k, int) else k.expand(value.shape).reshape(-1)[outside] for k in keys]
        walked = _feistel(flat[outside], left_bits, columns, own_keys)
        flat[outside] = walked
        outside = outside[walked >= n]
    return flat.view(value.shape)


def _round_keys(key: NoiseKey, stream: int | Tensor) -> list[int] | list[Tensor]:
    """One 32-bit key per Feistel round, from a draw number that ``uniforms`` never uses."""
    if isinstance(stream, Tensor):
        return [_words(key, stream, 0, number, PERMUTATION_DRAW)[0] for number in range(FEISTEL_ROUNDS)]
    words = _words(key, torch.tensor(stream), 0, torch.arange(FEISTEL_ROUNDS), PERMUTATION_DRAW)
    return [int(word) for word in words[0]]


def _feistel(value: Tensor, left_bits: int, columns: int, keys: Sequence[int | Tensor]) -> Tensor:
    """One pass of the network over the grid of 2**left_bits by ``columns`` cells."""
    left_mask = (1 << left_bits) - 1
    left, right = value & left_mask, value >> left_bits
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right, key)) & left_mask
        else:
            right = (right + _mix(left, key)) % columns
    return right << left_bits | left


def _mix(value: Tensor, key: int | Tensor) -> Tensor:
    """Hash 32 bits to 32 under a key: xor with it, then multiply and shift (MurmurHash3's finaliser)."""
    value = (value ^ key) & _MASK
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)
