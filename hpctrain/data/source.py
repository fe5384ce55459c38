"""Where a loader gets samples from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import Error

Arrays = dict[str, NDArray[Any]]


class Source(Protocol):
    """Samples that can be taken by number. A sample is one row of each field."""

    def __len__(self) -> int:
        """How many samples there are."""

    @property
    def digest(self) -> str:
        """Names the content: a checkpoint's cursor means nothing in another set of samples."""

    def take(self, indices: NDArray[np.int64]) -> Arrays:
        """Rows of every field, in the order of ``indices``, in memory of their own."""


class ArraySource:
    """Samples held in memory.

    Args:
        fields: Arrays (or CPU tensors) with the same first dimension.

    Raises:
        Error: The arrays differ in length, or there are none.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {
            name: np.ascontiguousarray(np.asarray(array)) for name, array in fields.items()
        }
        lengths = {name: len(array) for name, array in self._fields.items()}
        if len(set(lengths.values())) != 1:
            raise Error(f"the fields of a source differ in length: {lengths}.")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    @cached_property
    def digest(self) -> str:
        """Of names, shapes and bytes."""
        digest = hashlib.sha256()
        for name, array in sorted(self._fields.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def take(self, indices: NDArray[np.int64]) -> Arrays:
        """Rows of every field."""
        return {name: array[indices] for name, array in self._fields.items()}
