"""Some samples of a source, and which: by fractions, folds, classes or groups.

All is a pure function of a seed and the data, so every rank, and every later run, finds the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.order import EpochOrder, Order, Shuffle
from hpctrain.data.random import key, permute
from hpctrain.data.source import Arrays, Empty, Source
from hpctrain.errors import Error, nearest

AT_A_TIME = 4096
"""Samples read at a time, of a source that gives no field alone."""

_PURPOSE = 7
"""Of random numbers, beside those of the epoch order."""


class Subset(Source):
    """Some samples of a source, each once an epoch, in an order as the source has it.

    They are numbered anew, from 0, in the order of their numbers in the source: neighbours stay
    neighbours, and what is read together is still mostly used together.

    Args:
        source: Of the samples.
        numbers: Which, each once.

    Raises:
        Error: A number is there twice, or is none of a sample; or the source has an order of its
            own, such as a mixture's, of which a part means nothing.

    Example:
        >>> from hpctrain.data.source import ArraySource
        >>> some = Subset(ArraySource({"x": [10, 11, 12, 13]}), [3, 1])
        >>> len(some), some[0]["x"].item()
        (2, 11)
    """

    def __init__(self, source: Source, numbers: Sequence[int] | NDArray[np.int64]) -> None:
        self._source = source
        self.numbers = np.sort(np.asarray(numbers, dtype=np.int64))
        if len(self.numbers) and not 0 <= self.numbers[0] <= self.numbers[-1] < len(source):
            wrong = self.numbers[0] if self.numbers[0] < 0 else self.numbers[-1]
            raise Error(
                f"there is no sample {wrong}: they are numbered from 0 to {len(source) - 1}.",
                hint="check the list.",
            )
        twice = self.numbers[1:][np.diff(self.numbers) == 0]
        if len(twice):
            raise Error(f"sample {twice[0]} is in a split twice.", hint="list each once.")
        if not isinstance(source.order(0, 0, "full", 1), EpochOrder):
            raise Error(
                f"a {type(source).__name__} has an order of its own, and cannot be split.",
                hint="split the data that it is made of, before it is mixed or weighted.",
            )

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def digest(self) -> str:
        """A digest of the source's digest, and of which samples they are."""
        digest = hashlib.sha256(f"subset {self._source.digest} ".encode())
        digest.update(self.numbers.tobytes())
        return digest.hexdigest()

    def order(self, seed: int, epoch: int, shuffle: Shuffle, lanes: int) -> Order:
        """Return the source's order for an epoch of fewer samples: in blocks of the same size.

        Args:
            seed: Of the run.
            epoch: Counted from 0.
            shuffle: How samples are shuffled.
            lanes: Samples of a global batch.
        """
        whole = self._source.order(seed, epoch, shuffle, lanes)
        assert isinstance(whole, EpochOrder)
        return replace(whole, samples=len(self))

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Return rows of every field, in the order of ``indices``, from the source.

        Args:
            indices: Shape (n,): numbers within the subset, from 0 to ``len(self) - 1``.
            empty: Gives the memory for them.
        """
        return self._source.take(self.numbers[indices], empty)

    def readable(self, indices: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Ask the source which of these samples are not known to be lost; None: all are left."""
        return self._source.readable(self.numbers[indices])

    def nothing_left(self) -> bool:
        """Whether every sample is lost."""
        if self._source.nothing_left():
            return True
        there = self._source.readable(self.numbers)
        return there is not None and not there.any()


def values_of(source: Source, name: str) -> NDArray[Any]:
    """Return one field of all samples, of one value each.

    Args:
        source: Of the samples.
        name: Of the field.

    Returns:
        Shape (samples,).

    Raises:
        Error: There is no such field, or it has more than one value a sample.
    """
    column = getattr(source, "column", None)
    if column is not None:
        values = column(name)
    else:
        parts = []
        for start in range(0, len(source), AT_A_TIME):
            rows = source.take(np.arange(start, min(start + AT_A_TIME, len(source))))
            if name not in rows:
                raise Error(f"samples have no field '{name}'.", hint=nearest(name, rows))
            parts.append(rows[name])
        values = np.concatenate(parts) if parts else np.empty(0)
    values = np.asarray(values)
    if values.size != len(source):
        raise Error(
            f"field '{name}' has {values.size // max(1, len(source))} values a sample.",
            hint="name one that has a single value, such as a label or a patient.",
        )
    return values.reshape(-1)


def random_parts(samples: int, fractions: Sequence[float], seed: int) -> list[NDArray[np.int64]]:
    """Divide samples at random.

    Args:
        samples: How many there are.
        fractions: Of each part; what they leave out is in none.
        seed: Of the choice.

    Returns:
        The samples of each part; its size is within one of its fraction.

    Example:
        >>> [len(part) for part in random_parts(10, [0.7, 0.3], seed=0)]
        [7, 3]
    """
    return stratified_parts(np.zeros(samples, dtype=np.int64), fractions, seed)


def stratified_parts(
    values: NDArray[Any], fractions: Sequence[float], seed: int
) -> list[NDArray[np.int64]]:
    """Divide samples at random, the samples of each class in the same proportions.

    Args:
        values: Of each sample, its class.
        fractions: Of each part; what they leave out is in none.
        seed: Of the choice.

    Returns:
        The samples of each part. Of each class it has its fraction, but for less than one sample;
        those that are over go where most are missing so far, so that small classes add up.
    """
    shares = _shares(fractions)
    _, classes = np.unique(values, return_inverse=True)
    drawn = np.argsort(_drawn(len(values), seed))
    ordered = drawn[np.argsort(classes.reshape(-1)[drawn], kind="stable")]
    sizes = np.bincount(classes.reshape(-1))
    parts: list[list[NDArray[np.int64]]] = [[] for _ in shares]
    missing = np.zeros(len(shares))
    begin = 0
    for size in sizes.tolist():
        exact = shares * size
        counts = np.floor(exact + 1e-9).astype(np.int64)
        missing += exact - counts
        # What is over goes to parts that are to have a fraction of this class, one each.
        rank = np.where(exact - counts > 1e-9, missing, -np.inf)
        more = np.argsort(-rank, kind="stable")[: size - counts.sum()]
        counts[more] += 1
        missing[more] -= 1
        for part, count in zip(parts, counts.tolist(), strict=True):
            part.append(ordered[begin : begin + count])
            begin += count
    found = [np.sort(np.concatenate(part)) if part else np.empty(0, np.int64) for part in parts]
    return found[: len(fractions)]


def grouped_parts(
    values: NDArray[Any], fractions: Sequence[float], seed: int
) -> list[NDArray[np.int64]]:
    """Divide samples at random, those of a group (a patient, a site) all into the same part.

    Args:
        values: Of each sample, its group.
        fractions: Of each part; what they leave out is in none.
        seed: Of the choice.

    Returns:
        The samples of each part: groups in random order go where most samples are missing.
    """
    shares = _shares(fractions)
    _, groups = np.unique(values, return_inverse=True)
    groups = groups.reshape(-1)
    sizes = np.bincount(groups)
    part_of = np.zeros(len(sizes), dtype=np.int64)
    missing = shares * len(values)
    for group in np.argsort(_drawn(len(sizes), seed)).tolist():
        part_of[group] = chosen = int(np.argmax(missing))
        missing[chosen] -= sizes[group]
    return [np.flatnonzero(part_of[groups] == number) for number in range(len(fractions))]


def _shares(fractions: Sequence[float]) -> NDArray[np.float64]:
    """Return the fractions, and what they leave of 1, if anything."""
    rest = 1.0 - sum(fractions)
    return np.array([*fractions, rest] if rest > 1e-9 else [*fractions], dtype=np.float64)


def _drawn(count: int, seed: int) -> NDArray[np.int64]:
    """Draw a permutation of the numbers from 0 to ``count - 1``."""
    numbers = np.arange(count, dtype=np.uint64)
    return permute(numbers, max(1, count), key(seed, _PURPOSE)).astype(np.int64)
