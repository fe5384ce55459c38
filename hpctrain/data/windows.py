"""Windows of long arrays as samples, without a copy of what they share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.source import Arrays, Empty, Source, check_names
from hpctrain.errors import Error


class Windows(Source):
    """Samples that are windows of long arrays, such as time series; they may overlap.

    Sample ``i`` has the rows from ``i * stride`` on, ``length`` of them. Arrays are kept as they
    are (a ``numpy.memmap`` stays on its disk); a batch is what is copied.

    >>> import numpy as np
    >>> windows = Windows({"x": np.arange(10)}, length=4, stride=3)
    >>> len(windows), windows.take(np.array([0, 2]))["x"].tolist()
    (3, [[0, 1, 2, 3], [6, 7, 8, 9]])

    Args:
        fields: Arrays of shape (rows, ...) by name, all of as many rows.
        length: Rows of a window.
        stride: Rows from the beginning of a window to that of the next.

    Raises:
        Error: The arrays differ in length or are shorter than a window, or a number is below 1.
    """

    def __init__(self, fields: Mapping[str, Any], length: int, stride: int = 1) -> None:
        self._fields = {name: np.asanyarray(array) for name, array in fields.items()}
        check_names(self._fields, "windows")
        if length < 1 or stride < 1:
            raise Error(
                f"windows of length {length} and stride {stride}.", hint="both are 1 or more."
            )
        rows = {name: len(array) for name, array in self._fields.items()}
        if len(set(rows.values())) != 1:
            raise Error(
                f"the arrays of windows differ in length: {rows}.", hint="cut them alike, or pad."
            )
        (count,) = set(rows.values())
        if count < length:
            raise Error(
                f"a window has {length} rows, and there are {count}.", hint="shorten the windows."
            )
        self.length, self.stride = length, stride
        self._count = (count - length) // stride + 1

    def __len__(self) -> int:
        return self._count

    @cached_property
    def digest(self) -> str:
        """Return a digest of lengths, names, shapes and bytes."""
        digest = hashlib.sha256(f"windows {self.length} {self.stride}".encode())
        for name, array in sorted(self._fields.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            for start in range(0, len(array), 65536):
                digest.update(np.ascontiguousarray(array[start : start + 65536]).tobytes())
        return digest.hexdigest()

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Copy windows into a batch.

        Args:
            indices: Which ones.
            empty: Makes the arrays that they are copied into.

        Returns:
            Arrays of shape (windows, length, ...) by field.
        """
        batch = {}
        for name, array in self._fields.items():
            shape = (len(indices), self.length, *array.shape[1:])
            batch[name] = out = empty(shape, array.dtype)
            for place, index in enumerate(indices.tolist()):
                start = index * self.stride
                out[place] = array[start : start + self.length]
        return batch
