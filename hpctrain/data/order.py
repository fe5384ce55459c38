"""The epoch order and everything else that is a pure function of (seed, epoch, position).

Nothing here knows a rank or a world size, needs memory that grows with the number of samples, or
uses a library's random generator, whose streams may change between versions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ROUNDS = 6


def mix(values: Integers) -> Integers:
    """SplitMix64's finalizer: a bijection of 64-bit integers that looks random.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    values = values + np.uint64(_GOLDEN)  # arrays wrap around without a word
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTORS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return values ^ (values >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key from several integers; their order counts."""
    state = 0
    for part in parts:  # mix() on Python's integers, which are quicker one at a time
        state = ((state ^ (part & _MASK)) + _GOLDEN) & _MASK
        state = (state ^ (state >> 30)) * _FACTORS[0] & _MASK
        state = (state ^ (state >> 27)) * _FACTORS[1] & _MASK
        state ^= state >> 31
    return state


def permute(positions: Integers, n: int, secret: int) -> Integers:
    """Where a keyed permutation of ``0 .. n-1`` takes each position.

    A Feistel network over the smallest even number of bits that holds ``n``, walked on until the
    value is below ``n`` again (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
    2002). Takes the same time at any position, for any ``n``.

    Args:
        positions: Any shape, each below ``n``.
        n: Size of the domain, at least 1.
        secret: Chooses the permutation.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = [np.uint64(key(secret, r)) for r in range(_ROUNDS)]

    def encrypt(values: Integers) -> Integers:
        left, right = values >> half, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        return (left << half) | right

    result = encrypt(positions)
    while (outside := result >= np.uint64(n)).any():
        result[outside] = encrypt(result[outside])
    return result


def uniform(positions: Integers, count: int, secret: int) -> NDArray[np.float32]:
    """Numbers in [0, 1) that belong to positions: the same whichever rank draws them.

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


@dataclass(frozen=True)
class EpochOrder:
    """The order in which one epoch's samples are seen.

    Attributes:
        samples: How many there are.
        seed: Of the run.
        epoch: Counted from 0.
        shuffle: A fresh permutation each epoch; else the samples' own order.
    """

    samples: int
    seed: int
    epoch: int
    shuffle: bool = True

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at positions ``start`` to ``stop - 1`` of the epoch."""
        positions = np.arange(start, stop, dtype=np.uint64)
        if self.shuffle and self.samples > 1:
            positions = permute(positions, self.samples, key(self.seed, self.epoch, 0))
        return positions.astype(np.int64)

    def uniform(self, start: int, stop: int, count: int) -> NDArray[np.float32]:
        """``count`` numbers in [0, 1) for each of these positions, of shape (stop - start, count).

        They depend on what is drawn for, not on who draws, so augmentation does not change with the
        world's size.
        """
        positions = np.arange(start, stop, dtype=np.uint64)
        return uniform(positions, count, key(self.seed, self.epoch, 1))


def share(start: int, stop: int, rank: int, size: int) -> tuple[int, int]:
    """The part of positions ``[start, stop)`` that falls to one rank.

    Parts are contiguous, in rank order and differ by one at most. Some may be empty, but never rank
    0's unless all are.
    """
    count = stop - start
    return start - (-count * rank // size), start - (-count * (rank + 1) // size)
