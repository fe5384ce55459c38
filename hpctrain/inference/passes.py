"""A trained model and the samples of a split, dealt out to ranks in whole batches.

A batch is computed by one rank alone, with the samples it has on any number of ranks: what comes
of it is the same, bit for bit, because arithmetic in batches of other sizes may round otherwise.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.data.batch import Batch
from hpctrain.data.loader import Loader
from hpctrain.data.order import Order, Positions, Shuffle
from hpctrain.data.shards import ShardSet
from hpctrain.data.source import Arrays, Empty, Source
from hpctrain.errors import Error, nearest
from hpctrain.inference.trained_model import Trained, open_trained
from hpctrain.strategies import strategy
from hpctrain.tasks.task import Task, TaskTransform
from hpctrain.world.agreement import compare
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World, init


class Wanted(NamedTuple):
    """What to evaluate or predict: which model, on which split, in what batches.

    Attributes:
        source: A run's folder, or one of its checkpoints.
        which: Of a run's checkpoints: ``best`` or ``newest``; None: the best, if there is one.
        split: Of the data.
        data: A shard set in place of the run's; None: the run's own data.
        batch_size: Samples in a pass; None: as many as the run's passes have on one rank.
    """

    source: Path
    which: str | None
    split: str
    data: str | None
    batch_size: int | None


class Passes:
    """A trained model, and the samples of a split, on every rank of the world.

    Args:
        trained: The model, and what it was trained by.
        samples: To apply it to.
        world: Connected.
        batch_size: Samples in a pass.

    Attributes:
        task: The user's side; its world is this rank alone, since a batch is.
        model: In evaluation mode, on the device.
        dtype: Of the arithmetic, as in the run.
    """

    def __init__(self, trained: Trained, samples: Source, world: World, batch_size: int) -> None:
        self.trained = trained
        self.samples = samples
        self.world = world
        self.task = trained.task
        self.model = trained.model.to(world.device)
        self.dtype = trained.config.train.dtype
        self._batch_size = batch_size

    def rounds(self) -> Iterator[Batch | None]:
        """Yield this rank's batches, one of every ``size`` consecutive ones; None: it has no more.

        So all ranks come to the end of a round equally often, and ranks' batches of a round are
        neighbours.
        """
        rank, size, length = self.world.rank, self.world.size, len(self.samples)
        batches = -(-length // self._batch_size)
        numbers = np.arange(length, dtype=np.int64)
        mine = numbers[numbers // self._batch_size % size == rank]
        loader = self._loader(mine) if len(mine) else None
        given = iter(loader or ())
        with torch.no_grad():
            for _ in range(-(-batches // size)):
                yield next(given, None)
        if loader is not None:
            loader.close()

    def _loader(self, numbers: NDArray[np.int64]) -> Loader:
        config = self.trained.config
        return Loader(
            _Some(self.samples, numbers),
            self._batch_size,
            world=World(ALONE),
            seed=config.seed,
            shuffle="none",
            transform=TaskTransform(self.task, False, config.task, config.options, config.seed),
            workers=config.data.workers,
            worker_kind=config.data.worker_kind,
            timeout_seconds=config.timeout_seconds,
        )


@contextlib.contextmanager
def passes(wanted: Wanted, complain: Any) -> Iterator[Passes]:
    """Connect the world, and yield the model and the samples.

    Args:
        wanted: The same on every rank.
        complain: Told of each damaged checkpoint that is passed over.

    Raises:
        Error: There is no such run, split or data; or ranks differ in them.
        PeerLost: Another rank is gone.
    """
    changes: dict[str, Any] = {"on_bad_shard": "stop"}
    if wanted.data is not None:
        changes |= {"path": wanted.data, "mixture": [], "weights": None}
    trained = open_trained(
        wanted.source, wanted.which, changes={"data": changes}, complain=complain
    )
    samples = _samples(trained, wanted)
    train = trained.config.train
    batch_size = wanted.batch_size or -(-train.batch_size // train.accumulate)
    world = init()
    strategy("auto", world, timeout_seconds=trained.config.timeout_seconds)
    try:
        digest = f"{len(samples)} samples, digest {samples.digest[:16]}"
        compare(world.comm, {"the checkpoint": trained.checkpoint.name, "the samples": digest})
        yield Passes(trained, samples, world, batch_size)
        world.comm.barrier()
    except BaseException as error:
        code = error.exit_code if isinstance(error, Error) else 1
        reason = f"rank {world.launch.rank} on {os.uname().nodename}: {error}"
        world.comm.abort(reason, code)
        raise
    world.comm.close()


def _samples(trained: Trained, wanted: Wanted) -> Source:
    splits, path = trained.splits, trained.config.data.path
    if type(trained.task).data is Task.data and path is not None:
        # Of a shard set every split can be had, and none has to be there.
        shards = ShardSet(path, on_bad_shard="stop").splits
        splits = {name: split for name, split in shards.items() if len(split)}
    if isinstance(splits, Exception):
        raise splits
    if wanted.data is not None and not trained.read.data.has_read("path"):
        raise Error(
            f"--data {wanted.data} changes nothing: data() of task {trained.config.task} does not "
            "read data.path.",
            hint="leave it out, or have data() read config.path.",
        )
    if wanted.split not in splits:
        there = ", ".join(splits)
        raise Error(
            f"there is no split '{wanted.split}' in the data of this run, but {there}.",
            hint=nearest(wanted.split, splits),
        )
    return splits[wanted.split]


class _Some(Source):
    """Some of a source's samples."""

    def __init__(self, source: Source, numbers: NDArray[np.int64]) -> None:
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def digest(self) -> str:
        """The digest of all samples."""
        return self._source.digest

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Rows of every field."""
        return self._source.take(self._numbers[indices], empty)

    def order(self, seed: int, epoch: int, shuffle: Shuffle, lanes: int) -> Order:
        """Their own, with the random numbers that the whole source has at these places."""
        return _Places(self._source.order(seed, epoch, shuffle, lanes), self._numbers)


class _Places(NamedTuple):
    """Some places of an order."""

    whole: Order
    numbers: NDArray[np.int64]

    @property
    def samples(self) -> int:
        return len(self.numbers)

    def indices(self, positions: Positions) -> NDArray[np.int64]:
        return np.asarray(positions, dtype=np.int64)

    def uniform(self, positions: Positions, count: int) -> NDArray[np.float32]:
        return self.whole.uniform(self.numbers[self.indices(positions)].astype(np.uint64), count)
