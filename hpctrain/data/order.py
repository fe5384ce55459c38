"""The epoch order: which sample is seen at which position, and which positions fall to which rank.

Both are pure functions. The order knows no rank and no world size, lists nothing, and can be asked
about any position of an epoch of any length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.random import Unsigned, key, mix, mix32, permute, uniform

Shuffle = Literal["block", "full", "none"]
Positions = NDArray[np.uint64] | NDArray[np.int64]

# A lane mixes this many blocks at a time ...
WINDOW_BLOCKS = 4
# ... and has at least this many windows, so that the one which the epoch's start cuts in two, and
# which is therefore read twice, is a small part of it.
WINDOWS_PER_LANE = 8
# Lanes next to each other that see the rest together: more of them read its blocks less often, and
# bring more neighbours into a batch.
REST_LANES = 4
VERSION = 2
"""Of the order's rules: a cursor counts on them, so they never change within a version."""
# Positions worked out at a time, so that what lies between stays in the cache.
AT_A_TIME = 8192


class Order(Protocol):
    """The order of one epoch: which sample is at which position.

    Attributes:
        samples: Positions in the epoch.
    """

    @property
    def samples(self) -> int:
        """Positions in the epoch."""

    def indices(self, positions: Positions) -> NDArray[np.int64]:
        """Return the samples at these positions."""

    def uniform(self, positions: Positions, count: int) -> NDArray[np.float32]:
        """Return ``count`` numbers in [0, 1) for each position: shape (len(positions), count).

        Args:
            positions: Of the epoch.
            count: Numbers for each.
        """


@dataclass(frozen=True)
class EpochOrder:
    """An epoch's order in which every sample comes once.

    With ``shuffle="block"`` the samples are cut into blocks of ``block`` neighbours. The blocks are
    permuted and dealt to ``lanes`` lanes, and position ``p`` belongs to lane ``p % lanes``: a batch
    of as many samples takes one from each lane. A lane goes through its blocks a window of a few at
    a time, the samples of a window permuted; lanes change windows one after the other, so reading
    is even in time. A rank that takes the same part of every batch thus reads the same lanes, and
    each block once, while a batch mixes as many places of the data as it has samples.

    What does not fill whole blocks in every lane, less than ``lanes * block + block`` samples, is
    dealt to the lanes in runs. Each few lanes see theirs at a random moment of the epoch, so no
    batch has much of it; the last batch, which may be smaller, is of lanes from all over.

    With a block of one sample, and with ``shuffle="full"``, the order is a keyed permutation of all
    samples; with ``"none"`` it is the samples' own.

    Attributes:
        samples: How many there are.
        seed: Of the run.
        epoch: Counted from 0.
        shuffle: ``block``, ``full`` or ``none``.
        block: Largest block, in samples; less where there would be too few blocks to mix.
        lanes: Positions between two samples of a lane; best the global batch.
        aligned: Blocks must not be made smaller, because whole ones are read (compressed chunks).
        together: Places next to each other in a batch that share a lane: more than one where not
            as many blocks as a batch has samples can be open.
        version: Of these rules. In version 1 all lanes saw the rest at the same moment, and the
            last batch was a run of neighbours.

    Example:
        >>> EpochOrder(10, seed=0, epoch=0).indices(np.arange(10, dtype=np.uint64)).tolist()
        [9, 3, 0, 1, 4, 6, 2, 8, 7, 5]
    """

    samples: int
    seed: int
    epoch: int
    shuffle: Shuffle = "full"
    block: int = 1
    lanes: int = 1
    aligned: bool = False
    together: int = 1
    version: int = VERSION

    def indices(self, positions: Positions) -> NDArray[np.int64]:
        """Return the samples at these positions, each below ``samples``."""
        if self.shuffle == "none" or self.samples < 2:
            return np.asarray(positions, dtype=np.int64)
        # Half the bytes are worked out in half the time.
        kind = np.uint32 if self.samples < 2**31 else np.uint64
        result = np.empty(len(positions), dtype=np.int64)
        for start in range(0, len(positions), AT_A_TIME):
            part = slice(start, start + AT_A_TIME)
            wanted = np.asarray(positions[part]).astype(kind, copy=False)
            if self.shuffle == "full" or self.block_samples == 1:
                result[part] = permute(wanted, self.samples, key(self.seed, self.epoch, 0))
            else:
                result[part] = self._in_lanes(wanted)
        return result

    def uniform(self, positions: Positions, count: int) -> NDArray[np.float32]:
        """Return ``count`` random numbers in [0, 1) for each of these positions.

        They depend on what is drawn for, not on who draws, so augmentation does not change with the
        world's size.

        Args:
            positions: Of the epoch.
            count: Numbers for each.
        """
        return uniform(np.asarray(positions, dtype=np.uint64), count, key(self.seed, self.epoch, 1))

    @cached_property
    def block_samples(self) -> int:
        """Samples in a block, as it came out."""
        if self.aligned:
            return self.block
        least = self.lanes * WINDOW_BLOCKS * WINDOWS_PER_LANE
        most = max(1, min(self.block, self.samples // least))
        # The largest power of two: a window of so many samples is permuted without walking.
        return 1 << (most.bit_length() - 1)

    def _in_lanes(self, positions: Unsigned) -> Unsigned:
        block, lanes, kind = self.block_samples, self.lanes, positions.dtype.type
        whole = self.samples // block  # blocks; what is left over is at the end of the samples
        per_lane = whole // lanes * block  # samples of a lane in whole blocks
        rest = self.samples - per_lane * lanes
        row, lane = _divide(self._together(positions), lanes)
        if self.version == 1:
            resting, steps, number = self._at_once(row, lane, per_lane, rest)
        else:
            lane = self._spread(row, lane, per_lane, rest)
            resting, steps, number = self._by_lane(row, lane, per_lane, rest)
        if not resting.any():
            return self._whole_blocks(steps, lane, whole, per_lane)
        if resting.all():
            result = np.empty_like(positions)
        else:
            steps[resting] = 0  # overwritten below: they are few, and leaving them out costs more
            result = self._whole_blocks(steps, lane, whole, per_lane)
        dealt = per_lane // block * lanes
        result[resting] = self._rest(number.astype(kind, copy=False), whole, dealt, rest)
        return result

    def _together(self, positions: Unsigned) -> Unsigned:
        """Where each position would be if the places of a batch were dealt to lanes one by one."""
        if self.together == 1:
            return positions
        kind = positions.dtype.type
        row, place = _divide(positions, self.lanes * self.together)
        lane, turn = _divide(place, self.together)
        first = row * kind(self.lanes * self.together)
        moved = first + turn * kind(self.lanes) + lane
        # A row that is not whole stays as it is.
        whole: Unsigned = first + kind(self.lanes * self.together) <= kind(self.samples)
        return np.where(whole, moved, positions)

    def _at_once(
        self, row: Unsigned, lane: Unsigned, per_lane: int, rest: int
    ) -> tuple[NDArray[np.bool_], Unsigned, Unsigned]:
        """Version 1: all lanes see the rest at one moment, and the epoch ends with its end."""
        kind = row.dtype.type
        run = rest // self.lanes  # samples of a lane in the rest; fewer than `lanes` remain
        cut = key(self.seed, self.epoch, 2) % (per_lane + 1)
        late = row >= cut
        resting = late & ((row < cut + run) | (row >= per_lane + run))
        steps = row - late * kind(run)
        row, lane = row[resting], lane[resting]
        last = row >= per_lane + run
        step = np.where(last, kind(0), row - kind(cut))
        if run > 1:
            step = permute(step, run, self._secrets(lane, 4))
        number = np.where(last, kind(self.lanes * run) + lane, lane * kind(run) + step)
        return resting, steps, number

    def _by_lane(
        self, row: Unsigned, lane: Unsigned, per_lane: int, rest: int
    ) -> tuple[NDArray[np.bool_], Unsigned, Unsigned]:
        """Version 2: which positions are of the rest, the others' steps, and which of the rest.

        Each few lanes see their part of the rest at a moment of their own.
        """
        kind = row.dtype.type
        run = rest // self.lanes
        before, cuts, lengths, ends = self._deal(per_lane, rest, row.dtype)
        number = lane.astype(np.intp)  # once, instead of at each look-up
        late = row >= cuts.take(number)
        resting = late & (row < ends.take(number))
        steps = row - late * lengths.take(number)
        lane, number = lane[resting], number[resting]
        length, step = lengths[number], row[resting] - cuts[number]
        for count in (run, run + 1):
            mine = length == count
            if count > 1 and mine.any():
                step[mine] = permute(step[mine], count, self._secrets(lane[mine], 4))
        return resting, steps, lane * kind(run) + before[number] + step

    def _spread(self, row: Unsigned, lane: Unsigned, per_lane: int, rest: int) -> Unsigned:
        """Return the lanes of positions; those of a last row that is not whole are all over."""
        last = row >= per_lane + rest // self.lanes
        if not last.any():
            return lane
        spread = lane.astype(np.uint64) * np.uint64(self.lanes) // np.uint64(rest % self.lanes)
        return np.where(last, spread.astype(lane.dtype), lane)

    def _deal(self, per_lane: int, rest: int, dtype: np.dtype[Any]) -> tuple[Unsigned, ...]:
        """By lane: how many before it have a sample more of the rest; its begin, length and end.

        Lanes next to each other see it together, because they have it of the same blocks.
        """
        if "deal" not in self.__dict__:
            every = np.arange(self.lanes + 1, dtype=np.int64)
            before = -(-every * (rest % self.lanes) // self.lanes)
            groups = every[:-1].astype(np.uint64) // np.uint64(REST_LANES)
            drawn = mix(groups ^ np.uint64(key(self.seed, self.epoch, 2)))
            cuts = (drawn % np.uint64(per_lane + 1)).astype(np.int64)
            lengths = rest // self.lanes + np.diff(before)
            numbers = (before[:-1], cuts, lengths, cuts + lengths)
            self.__dict__["deal"] = tuple(each.astype(dtype) for each in numbers)
        found: tuple[Unsigned, ...] = self.__dict__["deal"]
        return found

    def _whole_blocks(self, steps: Unsigned, lane: Unsigned, whole: int, length: int) -> Unsigned:
        block, lanes, kind = self.block_samples, self.lanes, steps.dtype.type
        window = max(1, min(WINDOW_BLOCKS, length // block // WINDOWS_PER_LANE)) * block
        # Each lane starts elsewhere in its first window, and comes back to the start of it last.
        steps = steps + (lane * (window / lanes)).astype(kind)
        steps -= (steps >= length) * kind(length)
        number, within = _divide(steps, window)
        secrets = self._secrets(lane + number * kind(lanes), 5)
        last = number == length // window  # a window that is shorter than the others
        if last.any():
            mixed = np.empty_like(within)
            mixed[last] = permute(within[last], length % window, secrets[last])
            mixed[~last] = permute(within[~last], window, secrets[~last])
        else:
            mixed = permute(within, window, secrets)
        place, sample = _divide(number * kind(window) + mixed, block)
        result: Unsigned = self._dealt(place, lane, whole) * kind(block) + sample
        return result

    def _dealt(self, place: Unsigned, lane: Unsigned, whole: int) -> Unsigned:
        """Which block is at each place of each lane."""
        lanes, kind = self.lanes, place.dtype.type
        first, width = place.min(), lane.max() - lane.min() + 1
        count = int(place.max() - first + 1) * int(width)
        if count < len(place):  # the same blocks again and again: each is worked out once
            every = np.arange(first, place.max() + 1, dtype=kind)[:, None] * kind(lanes)
            ordinals = (every + np.arange(lane.min(), lane.max() + 1, dtype=kind)).ravel()
            table = permute(ordinals, whole, key(self.seed, self.epoch, 0))
            result: Unsigned = table[(place - first) * kind(width) + (lane - lane.min())]
            return result
        return permute(place * kind(lanes) + lane, whole, key(self.seed, self.epoch, 0))

    def _rest(self, number: Unsigned, whole: int, dealt: int, rest: int) -> Unsigned:
        """Samples of the blocks after the first ``dealt``, and those in no whole block."""
        block, kind = self.block_samples, number.dtype.type
        turned = number + kind(key(self.seed, self.epoch, 3) % rest)
        turned -= (turned >= rest) * kind(rest)
        in_blocks = (whole - dealt) * block
        place, sample = _divide(turned, block)
        result: Unsigned = turned + kind(dealt * block)  # right for those in no whole block
        blocked = turned < in_blocks
        if blocked.any():
            ordinal = place[blocked] + kind(dealt)
            blocks = permute(ordinal, whole, key(self.seed, self.epoch, 0))
            result[blocked] = blocks * kind(block) + sample[blocked]
        return result

    def _secrets(self, values: Unsigned, purpose: int) -> Unsigned:
        secret = key(self.seed, self.epoch, purpose)
        if values.dtype == np.uint32:
            return mix32(values ^ np.uint32(secret & 0xFFFFFFFF))
        return mix(values ^ np.uint64(secret))


def of_version(order: Order, version: int) -> Order:
    """Return an order that follows the rules of a version, where it has any.

    Args:
        order: As it is.
        version: Of the rules, as a checkpoint has it.
    """
    if version == VERSION or not hasattr(order, "version"):
        return order
    found: Order = replace(order, version=version)  # type: ignore[type-var]
    return found


def _divide(values: Unsigned, divisor: int) -> tuple[Unsigned, Unsigned]:
    """Quotients and remainders, several times as fast as ``numpy.divmod``."""
    kind = values.dtype.type
    if divisor & (divisor - 1) == 0:
        return values >> kind(divisor.bit_length() - 1), values & kind(divisor - 1)
    quotients = values // kind(divisor)
    return quotients, values - quotients * kind(divisor)


def share(start: int, stop: int, rank: int, size: int) -> tuple[int, int]:
    """Return the part of positions ``[start, stop)`` that falls to one rank.

    Parts are contiguous, in rank order and differ by one at most. Some may be empty, but never rank
    0's unless all are.

    Args:
        start: The first position.
        stop: The position after the last.
        rank: Whose part it is.
        size: How many ranks there are.

    Returns:
        Its first position, and that after its last.

    Example:
        >>> [share(0, 10, rank, 3) for rank in range(3)]
        [(0, 4), (4, 7), (7, 10)]
    """
    return portion(start, stop, rank, rank + 1, size)


def portion(start: int, stop: int, lower: int, upper: int, total: int) -> tuple[int, int]:
    """Return the part of positions ``[start, stop)`` from ``lower / total`` to ``upper / total``.

    Both ends are rounded up, so parts that meet in a fraction meet in a position.

    Args:
        start: The first position.
        stop: The position after the last.
        lower: Shares of the ranks before.
        upper: Those and this rank's.
        total: Shares of all ranks.

    Returns:
        Its first position, and that after its last.
    """
    count = stop - start
    return start - (-count * lower // total), start - (-count * upper // total)
