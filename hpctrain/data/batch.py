"""A rank's part of a global batch, as tensors by field name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.data.buffers import Buffers
from hpctrain.data.order import EpochOrder, Order, share
from hpctrain.data.random import Integers
from hpctrain.data.source import OFFSETS, native
from hpctrain.errors import Error, nearest


class NoField(Error, KeyError):  # noqa: N818 - a KeyError, which has the suffix
    """The error of asking a batch for a field that it has not."""


class Batch(dict[str, torch.Tensor]):
    """A rank's part of a global batch: field name -> tensor of shape (samples, ...).

    A ragged field ``x`` is two tensors: ``x``, the rows of all samples one after the other, and
    ``x.offsets``, of shape (samples + 1,); ``batch.rows("x")`` gives them sample by sample.

    Attributes:
        start: First position of the global batch in the epoch.
        stop: Position after its last; the cursor once the batch is done.
        positions: Of this rank's samples, shape (samples,), uint64.
        lost: How many of this rank's samples were left out because their shards cannot be read.

    Example:
        >>> import hpctrain
        >>> batch = next(iter(hpctrain.Loader({"x": torch.arange(4)}, 4, shuffle=False, workers=0)))
        >>> batch.samples, batch.weight
        (4, 1.0)
        >>> batch.replace(x=batch["x"] / 2)["x"]
        tensor([0.0000, 0.5000, 1.0000, 1.5000])
        >>> [part["x"].tolist() for part in batch.split(2)]  # micro-batches
        [[0, 1], [2, 3]]
    """

    def __init__(
        self,
        fields: dict[str, torch.Tensor],
        *,
        order: Order,
        start: int,
        stop: int,
        positions: Integers,
        world_size: int,
        lost: int = 0,
        buffers: Buffers | None = None,
    ) -> None:
        super().__init__(fields)
        self._order = order
        self._world_size = world_size
        self._buffers = buffers or Buffers()
        self.start = start
        self.stop = stop
        self.positions = positions
        self.lost = lost

    def __missing__(self, name: str) -> torch.Tensor:
        raise NoField(f"the batch has no field '{name}'.", hint=nearest(str(name), self))

    @property
    def samples(self) -> int:
        """How many samples this rank has; may be 0."""
        return len(self.positions)

    @property
    def indices(self) -> NDArray[np.int64]:
        """The samples of this rank, as the source counts them; shape (samples,)."""
        return self._order.indices(self.positions)

    @property
    def global_samples(self) -> int:
        """Samples of the whole world in this batch."""
        return self.stop - self.start

    @property
    def weight(self) -> float:
        """What to multiply a mean loss over this part with.

        The average of gradients over ranks is then the gradient of the mean over the global batch.
        """
        return self.samples * self._world_size / self.global_samples

    def uniform(self, count: int) -> torch.Tensor:
        """Return random numbers in [0, 1) for augmentation, of shape (samples, count), float32.

        They belong to the samples' positions in the epoch: the same at any world size, and again
        after a resume. Ask for all that a transform needs in one call.
        """
        return torch.from_numpy(self._order.uniform(self.positions, count))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return memory for a result, with any content.

        It is used again once nothing refers to it, which for large batches is several times as fast
        as memory from ``torch.empty``.

        Args:
            shape: Of the tensor, one number for each dimension.
            dtype: Of the tensor.
        """
        return native(self._buffers.empty(shape, _numpy_dtype(dtype)))

    def rows(self, name: str) -> list[torch.Tensor]:
        """Return a ragged field's samples, each of shape (rows, ...), without a copy."""
        sizes = self[name + OFFSETS].diff().tolist()
        return list(self[name].split(sizes)) if sizes else []

    def replace(self, **fields: torch.Tensor) -> Batch:
        """Return the same batch with some fields changed or added."""
        return self._with({**self, **fields}, self.positions)

    def of_fields(self, fields: dict[str, torch.Tensor]) -> Batch:
        """Return the same samples with these fields alone."""
        return self._with(fields, self.positions)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Return the same batch on a device; floating-point fields in another type if one is given.

        Args:
            device: Where the tensors are to be; the copy need not have ended on return.
            dtype: Of floating-point fields; None: as they are.
        """
        moved = {
            name: tensor.to(
                device, dtype if tensor.is_floating_point() else None, non_blocking=True
            )
            for name, tensor in self.items()
        }
        return self._with(moved, self.positions)

    def split(self, parts: int, *, empty: bool = False) -> Iterator[Batch]:
        """Yield micro-batches: nearly equal parts of this rank's samples.

        Args:
            parts: How many.
            empty: Whether to keep those that have no samples.
        """
        for number in range(parts):
            start, stop = share(0, self.samples, number, parts)
            if stop > start or empty:
                yield self._with(cut(self, start, stop), self.positions[start:stop])

    def _with(self, fields: dict[str, torch.Tensor], positions: Integers) -> Batch:
        return Batch(
            fields,
            order=self._order,
            start=self.start,
            stop=self.stop,
            positions=positions,
            world_size=self._world_size,
            lost=self.lost,
            buffers=self._buffers,
        )

    def __reduce__(self) -> Any:
        # Between processes; whoever gets it knows the order.
        arguments = (dict(self), self.start, self.stop, self.positions, self._world_size, self.lost)
        return _rebuilt, arguments

    def attach(self, order: Order, buffers: Buffers) -> Batch:
        """Give a batch that came from another process what was left behind there.

        Args:
            order: Of the epoch.
            buffers: Memory for what transforms compute.
        """
        self._order, self._buffers = order, buffers
        return self


@cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


Rows = TypeVar("Rows", torch.Tensor, NDArray[Any])


def cut(fields: Mapping[str, Rows], start: int, stop: int) -> dict[str, Rows]:
    """Return a range of samples of all fields, as views; only offsets are copied.

    Args:
        fields: Field name -> rows; offsets of a ragged field beside it.
        start: The first sample.
        stop: The sample after the last.
    """
    result: dict[str, Rows] = {}
    for name, tensor in fields.items():
        if name.endswith(OFFSETS):
            result[name] = tensor[start : stop + 1] - tensor[start]
        elif (offsets := fields.get(name + OFFSETS)) is not None:
            result[name] = tensor[int(offsets[start]) : int(offsets[stop])]
        else:
            result[name] = tensor[start:stop]
    return result


def _rebuilt(
    fields: dict[str, torch.Tensor],
    start: int,
    stop: int,
    positions: Integers,
    world_size: int,
    lost: int,
) -> Batch:
    return Batch(
        fields,
        order=EpochOrder(stop, 0, 0),
        start=start,
        stop=stop,
        positions=np.asarray(positions),
        world_size=world_size,
        lost=lost,
    )
