"""Load batches as torch tensors: each rank's part of each global batch, in the epoch order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.data.batch import Batch
from hpctrain.data.buffers import Buffers
from hpctrain.data.order import VERSION, Order, Positions, Shuffle
from hpctrain.data.prefetch import Epoch, Maker, ReadAhead
from hpctrain.data.source import Arrays, ArraySource, Empty, Source
from hpctrain.errors import Error
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import Part, World

Transform = Callable[[Batch], Batch]
WorkerKind = Literal["thread", "process"]


class Loader:
    """An iterable of :class:`Batch`; each pass over it is one epoch, or what is left of one.

    The global batches are the same in any world. Before each, the world is asked which part of it
    falls to this rank. ``epoch`` and ``cursor`` say where the next batch starts; they are all that
    a resume needs, in this world or in one of another size. There is no ``set_epoch`` to forget.

    Batches are made ahead of time in the background. On ``workers`` threads, which suits whatever
    spends its time in numpy, torch or Pillow; they share the mapped shards, and no process is ever
    forked. Or on as many processes, for transforms in plain Python: started afresh (never forked,
    so MPI and CUDA are safe), they are given the source and the transform by pickling.

    Args:
        source: The samples, or arrays or CPU tensors by field name that hold them.
        batch_size: Global: over all ranks together.
        world: Who shares the batches; None: this process alone.
        seed: Of the order and of ``Batch.uniform``.
        shuffle: ``block`` reads neighbours at a time and mixes as well (see
            :class:`hpctrain.data.order.EpochOrder`), ``full`` permutes everything, ``none`` keeps
            the samples' own order. True and False: ``block`` and ``none``.
        transform: Applied to each batch, for example to decode, normalise and augment. On threads
            it may run for several batches at once, and random numbers must come from
            ``batch.uniform``; on processes torch, numpy and random are seeded for each batch.
        workers: How many batches are made at a time; 0: each when it is asked for.
        worker_kind: ``thread`` or ``process``.
        timeout_seconds: Longest wait for a batch.
        drop_last: Leave out an epoch's last batch where it has fewer samples than others.
        least_part: Where ranks have equal parts, but less than this of a batch: fewer ranks have
            that much of it, and the others nothing.

    Attributes:
        epoch: Of the next batch, counted from 0.
        cursor: Samples of the epoch that the whole world has consumed.
        wait_seconds: Time spent waiting for batches so far.
        lost: Samples of this rank left out so far because their shards cannot be read.

    Raises:
        Error: The source is empty; while iterating, also that every sample of an epoch is lost.

    Example:
        >>> loader = Loader({"x": np.arange(6)}, 4, shuffle=False)
        >>> for batch in loader:
        ...     print(batch.samples, batch.weight)
        4 1.0
        2 1.0
        >>> loader.epoch
        1
        >>> loader.close()
    """

    def __init__(
        self,
        source: Source | Mapping[str, Any],
        batch_size: int,
        *,
        world: World | None = None,
        seed: int = 0,
        shuffle: Shuffle | bool = "block",
        transform: Transform | None = None,
        workers: int = 2,
        worker_kind: WorkerKind = "thread",
        timeout_seconds: float = 600.0,
        drop_last: bool = False,
        least_part: int = 1,
    ) -> None:
        self.source = ArraySource(source) if isinstance(source, Mapping) else source
        if len(self.source) == 0:
            raise Error("there are no samples to load.", hint="is the split empty?")
        if drop_last:
            self.source = _WholeBatches(self.source, batch_size)
        self.least_part = least_part
        if isinstance(shuffle, bool):
            shuffle = "block" if shuffle else "none"
        self.batch_size = batch_size
        self.world = world or World(ALONE)
        self.seed = seed
        self.shuffle: Shuffle = shuffle
        self.transform = transform
        self.workers = workers
        self.worker_kind = worker_kind
        self.timeout_seconds = timeout_seconds
        self.epoch = 0
        self.cursor = 0
        self.wait_seconds = 0.0
        self.lost = 0
        # The order's lanes: the batch size, but that of the epoch's beginning until its end.
        self._lanes = batch_size
        self._order_version = VERSION
        self._buffers = Buffers(pinned=torch.cuda.is_available())
        self._ahead: ReadAhead | None = None

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return -(-self.samples // self.batch_size)

    @property
    def samples(self) -> int:
        """How many samples an epoch has."""
        return self._order().samples

    @property
    def place(self) -> tuple[int, int, int]:
        """Where the next batch starts: epoch, cursor and lanes."""
        return self.epoch, self.cursor, self._lanes

    @place.setter
    def place(self, place: tuple[int, int, int]) -> None:
        self.epoch, self.cursor, self._lanes = place

    def _epoch(self) -> Epoch:
        return Epoch(self.seed, self.epoch, self.shuffle, self._lanes, self._order_version)

    def _order(self) -> Order:
        return self._epoch().order(self.source)

    def __iter__(self) -> Iterator[Batch]:
        if self.cursor == 0:
            self._lanes = self.batch_size
        samples = self.samples
        taken = lost = 0
        while self.cursor < samples:
            # All is asked each time: the world, the batch size and the cursor may have changed.
            part = self.world.part(self.epoch, self.cursor // self.batch_size)
            count = min(self.batch_size, samples - self.cursor)
            if count < self.least_part * part.size == self.least_part * part.total:
                part = _among_fewer(part, max(1, count // self.least_part))
            began = time.perf_counter()
            batch = self._read_ahead().get(self._epoch(), self.cursor, self.batch_size, part)
            self.wait_seconds += time.perf_counter() - began
            # Moved on before the batch is handed out: whoever asks for the state while working on
            # the batch, after its step, must get the place to go on from.
            self.cursor = batch.stop
            self.lost += batch.lost
            taken, lost = taken + batch.samples, lost + batch.lost
            yield batch
        if lost and not taken and self.source.nothing_left():
            raise Error(
                f"every sample of epoch {self.epoch} is lost: no shard can be read.",
                hint="`hpctrain data verify` says what is wrong with them.",
            )
        self.epoch += 1
        self.cursor = 0
        self._lanes = self.batch_size

    def _read_ahead(self) -> ReadAhead:
        """Return the queue that prefetches, kept from epoch to epoch."""
        if self._ahead is None:
            maker = Maker(self.source, self.transform, self._buffers)
            self._ahead = ReadAhead(maker, self.workers, self.worker_kind, self.timeout_seconds)
        return self._ahead

    def close(self) -> None:
        """Stop prefetching; it begins again when the loader is iterated."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __del__(self) -> None:
        if getattr(self, "_ahead", None) is not None:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch starts: plain values, for JSON."""
        place = {"epoch": self.epoch, "cursor": self.cursor, "lanes": self._lanes}
        return {**place, "order": self._order_version, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        """What a cursor means nothing without."""
        return {"source": self.source.digest, "seed": self.seed, "shuffle": self.shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, in this world, whatever size the other had.

        Raises:
            Error: The state is of other samples, or of another order.
        """
        if int(state.get("order", 1)) not in range(1, VERSION + 1):
            raise Error(
                f"the checkpoint's epoch order is of version {state['order']}; this hpctrain has "
                f"{VERSION}.",
                hint="update hpctrain.",
            )
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise Error(
                    f"the checkpoint's place in the epoch is for {name} {state.get(name)}, but "
                    f"this run has {value}: samples would be repeated and missed.",
                    hint="resume with the data, order and seed the run was started with.",
                )
        self.epoch = int(state["epoch"])
        self.cursor = int(state["cursor"])
        self._lanes = int(state["lanes"])
        # The run keeps the rules it began with: those before they were noted are the first.
        self._order_version = int(state.get("order", 1))


def _among_fewer(part: Part, ranks: int) -> Part:
    """An equal part of what the first few ranks share, for a rank that may be none of them."""
    lower = min(part.rank, ranks)
    return Part(part.rank, part.size, lower, min(part.rank + 1, ranks), ranks)


class _WholeBatches(Source):
    """Samples whose epochs end with the last whole batch."""

    def __init__(self, source: Source, batch_size: int) -> None:
        if len(source) < batch_size:
            raise Error(
                f"data.drop_last leaves nothing: {len(source)} samples, batches of {batch_size}.",
                hint="use a smaller batch size.",
            )
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @property
    def digest(self) -> str:
        """The digest of all samples."""
        return self._source.digest

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Rows of every field."""
        return self._source.take(indices, empty)

    def readable(self, indices: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Which samples are not known to be lost."""
        return self._source.readable(indices)

    def order(self, seed: int, epoch: int, shuffle: Shuffle, lanes: int) -> Order:
        """All samples' order, cut off; the lanes are as many as a batch has samples."""
        whole = self._source.order(seed, epoch, shuffle, lanes)
        return _CutOff(whole, whole.samples - whole.samples % lanes or whole.samples)


class _CutOff(NamedTuple):
    """The first positions of an order."""

    order: Order
    samples: int

    def indices(self, positions: Positions) -> NDArray[np.int64]:
        return self.order.indices(positions)

    def uniform(self, positions: Positions, count: int) -> NDArray[np.float32]:
        return self.order.uniform(positions, count)
