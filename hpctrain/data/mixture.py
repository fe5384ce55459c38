"""Sources made of sources: mixtures in given proportions, and sampling by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.order import VERSION, Order, Positions, Shuffle, of_version
from hpctrain.data.random import key, mix, uniform
from hpctrain.data.source import OFFSETS, Arrays, Empty, Source
from hpctrain.errors import Error

PERIOD = 1024


class Mixture(Source):
    """A source that draws from several sources in given proportions.

    Within any 1,024 positions each source has its exact part, spread evenly; which position belongs
    to which source never changes. Each source goes through epochs of its own, every sample of it
    once in each, however often it comes round while the mixture's epoch lasts.

    Args:
        sources: With the same fields.
        weights: Proportions, of any sum; rounded to 1/1,024. None: by the sources' lengths.
        samples: Positions in an epoch; None: as many as all sources have together.

    Raises:
        Error: There is none, a weight is not positive, or one is too small to be drawn.

    Example:
        >>> from hpctrain.data.source import ArraySource
        >>> small, large = ArraySource({"x": np.arange(4)}), ArraySource({"x": np.arange(100, 200)})
        >>> source = Mixture([small, large], [3, 1], samples=8)
        >>> order = source.order(seed=0, epoch=0, shuffle="none", lanes=4)
        >>> source.take(order.indices(np.arange(8, dtype=np.uint64)))["x"].tolist()
        [0, 1, 100, 2, 3, 0, 101, 1]
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        samples: int | None = None,
    ) -> None:
        self.sources = list(sources)
        lengths = [len(source) for source in self.sources]
        weights = list(map(float, lengths if weights is None else weights))
        if not self.sources or len(weights) != len(self.sources):
            raise Error(
                f"{len(self.sources)} sources with {len(weights)} weights.", hint="one each."
            )
        if min(weights) <= 0 or min(lengths) == 0:
            raise Error("a source of a mixture is empty or has no weight.", hint="leave it out.")
        self._weights = weights
        self._samples = sum(lengths) if samples is None else samples
        self._firsts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.pattern = _pattern(weights)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @cached_property
    def digest(self) -> str:
        """A digest of the sources' digests, the pattern, and the epoch's length."""
        text = " ".join(source.digest for source in self.sources)
        digest = hashlib.sha256(f"mixture {self._samples} {text} ".encode())
        digest.update(self.pattern.tobytes())
        return digest.hexdigest()

    def order(self, seed: int, epoch: int, shuffle: Shuffle, lanes: int) -> Order:
        """Return the epoch's order: each source's own, interleaved by the pattern.

        Args:
            seed: Of the run.
            epoch: Counted from 0.
            shuffle: How each source is shuffled.
            lanes: Samples of a global batch.
        """
        return _MixtureOrder(self, self._samples, seed, epoch, shuffle, lanes)

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Return rows of every field; sample numbers run through one source after the other.

        Args:
            indices: Shape (n,): numbers of samples.
            empty: Gives the memory, where a source has a use for it.
        """
        which = np.searchsorted(self._firsts[1:], indices, side="right")
        present = np.unique(which)
        if len(present) == 1:
            source = int(present[0])
            return self.sources[source].take(indices - self._firsts[source], empty)
        parts = []
        for source in present.tolist():
            rows = np.flatnonzero(which == source)
            parts.append((rows, self.sources[source].take(indices[rows] - self._firsts[source])))
        names = parts[0][1].keys()
        for _, part in parts:
            if part.keys() != names:
                raise Error(
                    f"sources of a mixture have fields {sorted(names)} and {sorted(part)}.",
                    hint="give all sources the same fields.",
                )
        batch: Arrays = {}
        for name in names:
            if name + OFFSETS in names:
                batch[name + OFFSETS] = offsets = _offsets(name, parts, len(indices), empty)
                batch[name] = _filled(name, parts, int(offsets[-1]), empty)
                for rows, part in parts:
                    begins = part[name + OFFSETS]
                    for number, row in enumerate(rows.tolist()):
                        values = part[name][begins[number] : begins[number + 1]]
                        batch[name][offsets[row] : offsets[row + 1]] = values
            elif name not in batch and name.removesuffix(OFFSETS) not in names - {name}:
                batch[name] = _filled(name, parts, len(indices), empty)
                for rows, part in parts:
                    batch[name][rows] = part[name]
        return batch

    def readable(self, indices: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Ask the sources which samples are not known to be lost; None: all."""
        which = np.searchsorted(self._firsts[1:], indices, side="right")
        result = np.ones(len(indices), dtype=bool)
        for source in np.unique(which).tolist():
            rows = which == source
            part = self.sources[source].readable(indices[rows] - self._firsts[source])
            if part is not None:
                result[rows] = part
        return None if result.all() else result

    def nothing_left(self) -> bool:
        """Whether all samples of all sources are lost."""
        return all(source.nothing_left() for source in self.sources)


_Parts = list[tuple[NDArray[np.int64], Arrays]]
"""Of each source: which samples of the batch it gives, and their fields."""


def _filled(name: str, parts: _Parts, rows: int, empty: Empty) -> NDArray[Any]:
    """Memory for a field of all sources."""
    first = parts[0][1][name]
    for _, part in parts:
        array = part[name]
        if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
            raise Error(
                f"field '{name}' is {array.dtype}{array.shape[1:]} in one source of a mixture and "
                f"{first.dtype}{first.shape[1:]} in another.",
                hint="give all sources the same fields.",
            )
    return empty((rows, *first.shape[1:]), first.dtype)


def _offsets(name: str, parts: _Parts, samples: int, empty: Empty) -> NDArray[np.int64]:
    lengths = np.zeros(samples, dtype=np.int64)
    for rows, part in parts:
        lengths[rows] = np.diff(part[name + OFFSETS])
    offsets = empty((samples + 1,), np.dtype(np.int64))
    offsets[0] = 0
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _pattern(weights: Sequence[float]) -> NDArray[np.int64]:
    """Which source each of PERIOD positions belongs to, each as evenly spread as can be."""
    parts = np.array(weights) / sum(weights) * PERIOD
    counts = np.floor(parts).astype(np.int64)
    counts[np.argsort(counts - parts, kind="stable")[: PERIOD - counts.sum()]] += 1
    if counts.min() == 0:
        raise Error(
            f"a source's part of the mixture is less than 1/{PERIOD}.", hint="give it more weight."
        )
    # Draw number k of a source with n draws stands at the middle of the k-th of n equal stretches.
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners[np.argsort(places, kind="stable")]


@dataclass(frozen=True)
class _MixtureOrder:
    mixture: Mixture
    samples: int
    seed: int
    epoch: int
    shuffle: Shuffle
    lanes: int
    version: int = VERSION
    _orders: dict[tuple[int, int], Order] = field(default_factory=dict, init=False)

    def indices(self, positions: Positions) -> NDArray[np.int64]:
        pattern = self.mixture.pattern
        period, place = np.divmod(np.asarray(positions, dtype=np.int64), PERIOD)
        result = np.empty(len(positions), dtype=np.int64)
        for number in range(len(self.mixture.sources)):
            mine = pattern == number
            before = np.concatenate([[0], np.cumsum(mine)])
            rows = np.flatnonzero(mine[place])
            in_epoch = self.samples // PERIOD * before[-1] + before[self.samples % PERIOD]
            draws = self.epoch * in_epoch + period[rows] * before[-1] + before[place[rows]]
            passes, draw = np.divmod(draws, len(self.mixture.sources[number]))
            for round_ in np.unique(passes).tolist():
                chosen = passes == round_
                found = self._order(number, round_).indices(draw[chosen].astype(np.uint64))
                result[rows[chosen]] = found + self.mixture._firsts[number]
        return result

    def _order(self, number: int, round_: int) -> Order:
        if (number, round_) not in self._orders:
            share = float((self.mixture.pattern == number).mean())
            lanes = max(1, round(self.lanes * share))
            source = self.mixture.sources[number]
            order = source.order(key(self.seed, number) >> 1, round_, self.shuffle, lanes)
            self._orders[number, round_] = of_version(order, self.version)
        return self._orders[number, round_]

    def uniform(self, positions: Positions, count: int) -> NDArray[np.float32]:
        secret = key(self.seed, self.epoch, 1)
        return uniform(np.asarray(positions, dtype=np.uint64), count, secret)


class Weighted(Source):
    """A source whose samples are drawn by weight, with replacement.

    A sample of twice the weight comes twice as often.

    Args:
        source: Of the samples.
        weights: Shape (samples,), none negative.
        samples: Draws in an epoch; None: as many as there are samples.

    Raises:
        Error: The weights are not one for each sample, or not numbers to draw by.

    Example:
        >>> from hpctrain.data.source import ArraySource
        >>> source = Weighted(ArraySource({"x": np.arange(3)}), np.array([0.0, 0.0, 1.0]))
        >>> order = source.order(seed=0, epoch=0, shuffle="full", lanes=1)
        >>> source.take(order.indices(np.arange(3, dtype=np.uint64)))["x"].tolist()
        [2, 2, 2]
    """

    def __init__(
        self, source: Source, weights: NDArray[np.float64], samples: int | None = None
    ) -> None:
        self._source = source
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(source),):
            raise Error(f"{weights.shape} weights for {len(source)} samples.", hint="one each.")
        if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
            raise Error("weights must be finite, none negative, and not all 0.", hint="check them.")
        self._ends = np.cumsum(weights)
        self._samples = len(source) if samples is None else samples

    def __len__(self) -> int:
        return len(self._source)

    @cached_property
    def digest(self) -> str:
        """A digest of the source's digest, the weights, and the epoch's length."""
        digest = hashlib.sha256(f"weighted {self._samples} {self._source.digest} ".encode())
        digest.update(self._ends.tobytes())
        return digest.hexdigest()

    def order(self, seed: int, epoch: int, shuffle: Shuffle, lanes: int) -> Order:
        """Return the epoch's order: a draw for each position.

        Args:
            seed: Of the run.
            epoch: Counted from 0.
            shuffle: Changes nothing: there is no order to keep.
            lanes: Changes nothing.
        """
        return _WeightedOrder(self._ends, self._samples, seed, epoch)

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Return the source's rows of every field.

        Args:
            indices: Shape (n,): numbers of samples.
            empty: Gives the memory, where the source has a use for it.
        """
        return self._source.take(indices, empty)

    def readable(self, indices: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Ask the source which samples are not known to be lost; None: all."""
        return self._source.readable(indices)

    def nothing_left(self) -> bool:
        """Whether all of the source's samples are lost."""
        return self._source.nothing_left()


@dataclass(frozen=True)
class _WeightedOrder:
    ends: NDArray[np.float64]
    samples: int
    seed: int
    epoch: int

    def indices(self, positions: Positions) -> NDArray[np.int64]:
        secret = np.uint64(key(self.seed, self.epoch, 6))
        draws = mix(np.asarray(positions, dtype=np.uint64) ^ secret) >> np.uint64(11)
        places = draws.astype(np.float64) * 2.0**-53 * self.ends[-1]
        found = np.searchsorted(self.ends, places, side="right")
        # Rounding may lead to the very end, beyond which there is nothing.
        last = int(np.searchsorted(self.ends, self.ends[-1]))
        return np.asarray(np.minimum(found, last), dtype=np.int64)

    def uniform(self, positions: Positions, count: int) -> NDArray[np.float32]:
        secret = key(self.seed, self.epoch, 1)
        return uniform(np.asarray(positions, dtype=np.uint64), count, secret)
