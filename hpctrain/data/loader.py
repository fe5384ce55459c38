"""Batches as torch tensors: each rank's part of each global batch, in the epoch order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from hpctrain.data.order import EpochOrder, share
from hpctrain.data.source import ArraySource, Source
from hpctrain.errors import Error
from hpctrain.launcher import ALONE
from hpctrain.world import World


class Batch(dict[str, torch.Tensor]):
    """This rank's part of a global batch: field name -> tensor of shape (samples, ...).

    Attributes:
        start: First position of the global batch in the epoch.
        stop: Position after its last; the cursor once the batch is done.
        first: Position of this rank's first sample.
        samples: How many samples this rank has; may be 0 in an epoch's last batch.
        global_samples: How many the whole world has.
        weight: What to multiply a mean loss over this part with, so that the average of gradients
            over ranks is the gradient of the mean over the global batch.
    """

    def __init__(
        self,
        fields: dict[str, torch.Tensor],
        *,
        order: EpochOrder,
        start: int,
        stop: int,
        first: int,
        samples: int,
        world_size: int,
    ) -> None:
        super().__init__(fields)
        self._order = order
        self._world_size = world_size
        self.start = start
        self.stop = stop
        self.first = first
        self.samples = samples

    @property
    def global_samples(self) -> int:
        """Samples of the whole world in this batch."""
        return self.stop - self.start

    @property
    def weight(self) -> float:
        """This part's share of the global batch, times the world's size."""
        return self.samples * self._world_size / self.global_samples

    def uniform(self, count: int) -> torch.Tensor:
        """Random numbers in [0, 1) for augmentation, of shape (samples, count), float32.

        They belong to the samples' positions in the epoch: the same at any world size, and again
        after a resume. Ask for all that a transform needs in one call.
        """
        return torch.from_numpy(self._order.uniform(self.first, self.first + self.samples, count))

    def replace(self, **fields: torch.Tensor) -> Batch:
        """The same batch with some fields changed or added."""
        return self._with({**self, **fields}, self.first, self.samples)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on a device, floating-point fields in another type where one is given."""
        moved = {
            name: tensor.to(
                device, dtype if tensor.is_floating_point() else None, non_blocking=True
            )
            for name, tensor in self.items()
        }
        return self._with(moved, self.first, self.samples)

    def split(self, parts: int) -> Iterator[Batch]:
        """Nearly equal parts of this rank's samples; empty ones are left out."""
        for part in range(parts):
            start, stop = share(0, self.samples, part, parts)
            if stop > start:
                fields = {name: tensor[start:stop] for name, tensor in self.items()}
                yield self._with(fields, self.first + start, stop - start)

    def _with(self, fields: dict[str, torch.Tensor], first: int, samples: int) -> Batch:
        return Batch(
            fields,
            order=self._order,
            start=self.start,
            stop=self.stop,
            first=first,
            samples=samples,
            world_size=self._world_size,
        )


class Loader:
    """An iterable of :class:`Batch`; each pass over it is one epoch, or what is left of one.

    The global batches are the same whatever the world's size, which is asked of the world at every
    batch. ``epoch`` and ``cursor`` say where the next batch starts; they are all that a resume
    needs. There is no ``set_epoch`` to forget.

    Args:
        source: The samples, or arrays or CPU tensors by field name that hold them.
        batch_size: Global: over all ranks together.
        world: Who shares the batches; None: this process alone.
        seed: Of the order and of ``Batch.uniform``.
        shuffle: See :class:`hpctrain.data.order.EpochOrder`.
        transform: Applied to each batch, for example to normalise and augment.

    Raises:
        Error: The source is empty.
    """

    def __init__(
        self,
        source: Source | Mapping[str, Any],
        batch_size: int,
        *,
        world: World | None = None,
        seed: int = 0,
        shuffle: bool = True,
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.source = ArraySource(source) if isinstance(source, Mapping) else source
        if len(self.source) == 0:
            raise Error("there are no samples to load.", hint="is the split empty?")
        self.batch_size = batch_size
        self.world = world or World(ALONE)
        self.seed = seed
        self.shuffle = shuffle
        self.transform = transform
        self.epoch = 0
        self.cursor = 0

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = EpochOrder(len(self.source), self.seed, self.epoch, self.shuffle)
        while self.cursor < order.samples:
            start = self.cursor
            stop = min(start + self.batch_size, order.samples)
            # Moved on before the batch is handed out: whoever asks for the state while working on
            # the batch, after its step, must get the place to go on from.
            self.cursor = stop
            yield self._batch(order, start, stop)
        self.epoch += 1
        self.cursor = 0

    def _batch(self, order: EpochOrder, start: int, stop: int) -> Batch:
        world = self.world
        first, last = share(start, stop, world.rank, world.size)
        arrays = self.source.take(order.indices(first, last))
        batch = Batch(
            {name: torch.from_numpy(array) for name, array in arrays.items()},
            order=order,
            start=start,
            stop=stop,
            first=first,
            samples=last - first,
            world_size=world.size,
        )
        return self.transform(batch) if self.transform else batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts: plain values, for JSON."""
        return {"epoch": self.epoch, "cursor": self.cursor, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        """What a cursor means nothing without."""
        return {"source": self.source.digest, "seed": self.seed, "shuffle": self.shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, in this world, whatever size the other had.

        Raises:
            Error: The state is of other samples, or of another order.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise Error(
                    f"the checkpoint's place in the epoch is for {name} {state[name]}, but this "
                    f"run has {value}: samples would be repeated and missed.",
                    hint="resume with the data, order and seed the run was started with.",
                )
        self.epoch = int(state["epoch"])
        self.cursor = int(state["cursor"])
