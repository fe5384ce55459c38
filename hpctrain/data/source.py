"""Sources: what a loader gets samples from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.order import EpochOrder, Order, Shuffle
from hpctrain.errors import Error

if TYPE_CHECKING:
    import torch

Arrays = dict[str, NDArray[Any]]

OFFSETS = ".offsets"
"""A ragged field ``x`` comes as the rows of all samples one after the other, ``x``, and as
``x.offsets``: sample ``i`` has the rows from ``offsets[i]`` to ``offsets[i + 1]``."""

Empty = Callable[[tuple[int, ...], Any], NDArray[Any]]
"""Gives an array of a shape and dtype to be filled, as ``numpy.empty`` does."""


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse a field whose name is that under which another's offsets come.

    Args:
        names: Of all fields.
        where: They are, for the error.

    Raises:
        Error: One has.
    """
    names = set(names)
    for name in sorted(names):
        if name.removesuffix(OFFSETS) in names - {name}:
            raise Error(
                f"{where}: field '{name}' has the name by which a loader says where samples of "
                f"'{name.removesuffix(OFFSETS)}' begin.",
                hint="rename it, or leave it out.",
            )


class Source(ABC):
    """A source of samples that can be taken by number. A sample is one row of each field.

    A source of your own needs ``__len__``, ``digest`` and ``take``. It is also a map-style dataset
    for ``torch.utils.data.DataLoader``, which asks it for the samples of a batch in one call.

    Example:
        >>> class Squares(Source):
        ...     digest = "squares of 0 to 9"
        ...
        ...     def __len__(self):
        ...         return 10
        ...
        ...     def take(self, indices, empty=np.empty):
        ...         return {"x": indices**2}
        >>> Squares().take(np.array([3, 0]))
        {'x': array([9, 0])}
    """

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A digest of the content: a checkpoint's cursor means nothing in other samples."""

    @abstractmethod
    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Return rows of every field, in the order of ``indices``, in memory of their own.

        Args:
            indices: Shape (n,), each from 0 to ``len(self) - 1``.
            empty: Gives the memory, where the source has a use for it.

        Returns:
            Field name -> array of shape (n, ...).

        Raises:
            BadShard: What holds some of the samples cannot be read.
        """

    def readable(self, indices: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Tell which of these samples are not known to be lost, of shape (n,); None: all."""
        return None

    def nothing_left(self) -> bool:
        """Whether every sample is lost."""
        return False

    def order(self, seed: int, epoch: int, shuffle: Shuffle, lanes: int) -> Order:
        """Return the order in which an epoch's samples are seen.

        Args:
            seed: Of the run.
            epoch: Counted from 0.
            shuffle: How samples are shuffled.
            lanes: Samples of a global batch.
        """
        return EpochOrder(len(self), seed, epoch, shuffle, lanes=lanes)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Samples by their numbers: for each, field name -> tensor."""
        batch = self.take(np.asarray(indices, dtype=np.int64))
        fields = {name: native(array) for name, array in batch.items()}
        return [
            {
                name: rows[fields[name + OFFSETS][i] : fields[name + OFFSETS][i + 1]]
                if name + OFFSETS in fields
                else rows[i]
                for name, rows in fields.items()
                if not name.endswith(OFFSETS)
            }
            for i in range(len(indices))
        ]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample: field name -> tensor.

        Raises:
            IndexError: There is none of this number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.__getitems__([index])[0]


class ArraySource(Source):
    """A source of samples held in memory.

    Args:
        fields: Arrays (or CPU tensors) with the same first dimension.

    Raises:
        Error: The arrays differ in length, or there are none.

    Example:
        >>> source = ArraySource({"x": np.arange(6.0), "label": np.arange(6) % 2})
        >>> source.take(np.array([5, 0]))
        {'x': array([5., 0.]), 'label': array([1, 0])}
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {
            name: np.ascontiguousarray(np.asarray(array)) for name, array in fields.items()
        }
        check_names(self._fields, "a source")
        lengths = {name: len(array) for name, array in self._fields.items()}
        if len(set(lengths.values())) != 1:
            raise Error(f"the fields of a source differ in length: {lengths}.")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    @cached_property
    def digest(self) -> str:
        """A digest of names, shapes and bytes."""
        digest = hashlib.sha256()
        for name, array in sorted(self._fields.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Return rows of every field, in the order of ``indices``.

        Args:
            indices: Shape (n,): numbers of samples.
            empty: Gives the memory for them.
        """
        batch = {}
        for name, array in self._fields.items():
            batch[name] = empty((len(indices), *array.shape[1:]), array.dtype)
            # Without a mode other than "raise", numpy gathers into a buffer first.
            np.take(array, indices, axis=0, out=batch[name], mode="clip")
        return batch


def native(array: NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor in this machine's byte order, of the same memory if it can be.

    Where the memory is a tensor's (page-locked memory is), the result is a view of that tensor:
    PyTorch notes copies under way by the storage, and would give memory out again too soon.
    """
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    import torch  # here, because importing data needs none, and it takes a second to load

    tensor = torch.from_numpy(array)
    owner: Any = array.base
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not isinstance(owner, torch.Tensor) or not array.size:
        return tensor
    whole = owner.view(torch.uint8).view(-1)
    start = array.ctypes.data - whole.data_ptr()
    typed = whole[start : start + array.itemsize].view(tensor.dtype)
    return typed.as_strided(tensor.shape, tensor.stride(), typed.storage_offset())
