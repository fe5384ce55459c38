"""Random numbers as pure functions of (key, position): keyed hashes and keyed permutations.

Nothing here keeps state, needs memory that grows with the number of samples, or uses a library's
generator, whose streams may change between versions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.uint64]
Unsigned = NDArray[Any]
"""Of uint32 or uint64."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# MurmurHash3's.
_FACTORS_32 = (0x85EBCA6B, 0xC2B2AE35)
_ROUNDS = 6  # even, so that the halves end where they began


def mix(values: Integers) -> Integers:
    """Hash 64-bit integers by SplitMix64's finalizer, a bijection that looks random.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    values = values + np.uint64(_GOLDEN)  # arrays wrap around without a word
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTORS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return values ^ (values >> np.uint64(31))


def mix32(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Hash 32-bit integers by MurmurHash3's finalizer: like :func:`mix`, for half the memory.

    Appleby, https://github.com/aappleby/smhasher.
    """
    values = (values ^ (values >> np.uint32(16))) * np.uint32(_FACTORS_32[0])
    values = (values ^ (values >> np.uint32(13))) * np.uint32(_FACTORS_32[1])
    return values ^ (values >> np.uint32(16))


def key(*parts: int) -> int:
    """Make one 64-bit key of several integers, whose order counts."""
    state = 0
    for part in parts:  # mix() on Python's integers, which are quicker one at a time
        state = ((state ^ (part & _MASK)) + _GOLDEN) & _MASK
        state = (state ^ (state >> 30)) * _FACTORS[0] & _MASK
        state = (state ^ (state >> 27)) * _FACTORS[1] & _MASK
        state ^= state >> 31
    return state


def permute(positions: Unsigned, n: int, secret: int | Unsigned) -> Unsigned:
    """Return where a keyed permutation of ``0 .. n-1`` takes each position.

    A Feistel network over the fewest bits that hold ``n``, walked on until the value is below ``n``
    again (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Takes the same
    time at any position, for any ``n``; least where ``n`` is a power of two.

    Args:
        positions: Shape (m,), uint32 or uint64, each below ``n``.
        n: Size of the domain, from 1 to 2**63.
        secret: Chooses the permutation; of shape (m,), one for each position.

    Returns:
        Of the positions' shape and type.

    Example:
        >>> sorted(permute(np.arange(10, dtype=np.uint64), 10, key(0)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    network = _Feistel(max(2, (n - 1).bit_length()))
    secrets: NDArray[Any]
    if isinstance(secret, int):
        folded = secret >> 32 ^ secret if network.kind is np.uint32 else secret
        secrets = np.array([folded & network.largest], dtype=network.kind)
    else:
        secrets = secret.astype(network.kind, copy=False)
    result = network.encrypt(positions.astype(network.kind, copy=False), secrets)
    walking = np.flatnonzero(result >= n)
    while walking.size:
        walked = secrets[walking] if len(secrets) > 1 else secrets
        moved = network.encrypt(result[walking], walked)
        result[walking] = moved
        walking = walking[moved >= n]
    return result.astype(positions.dtype, copy=False)


class _Feistel:
    """A permutation of the integers of so many bits."""

    def __init__(self, bits: int) -> None:
        # Vector units multiply 32-bit integers several times as fast as 64-bit ones.
        self.kind = np.uint32 if bits <= 32 else np.uint64
        width = 8 * np.dtype(self.kind).itemsize
        self.largest = (1 << width) - 1
        low, high = bits // 2, bits - bits // 2
        self.low, self.mask = self.kind(low), self.kind((1 << low) - 1)
        # The halves change places every round, and with them the bits that a round has to give.
        self.keep = (self.kind(width - high), self.kind(width - low))
        self.fold = self.kind(width // 2 - 1)
        self.step = self.kind(_GOLDEN & ((1 << width) - 1))
        self.factors = [self.kind(f) for f in (_FACTORS if width == 64 else _FACTORS_32)]

    def encrypt(self, values: NDArray[Any], secrets: NDArray[Any]) -> NDArray[Any]:
        left, right = values >> self.low, values & self.mask
        state = secrets
        for number in range(_ROUNDS):
            state = state + self.step
            hashed = (right ^ state) * self.factors[0]
            hashed ^= hashed >> self.fold
            hashed *= self.factors[1]
            hashed >>= self.keep[number % 2]
            hashed ^= left
            left, right = right, hashed
        return (left << self.low) | right


def uniform(positions: Integers, count: int, secret: int) -> NDArray[np.float32]:
    """Draw numbers in [0, 1) that belong to positions: the same whichever rank draws them.

    Args:
        positions: Shape (n,).
        count: Draws per position.
        secret: Chooses the numbers.

    Returns:
        Shape (n, count).
    """
    columns = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)
    values = mix(mix(positions ^ np.uint64(secret))[:, None] + columns[None, :])
    return (values >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
