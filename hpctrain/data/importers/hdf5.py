"""HDF5 files whose datasets have one row a sample, such as others' tools write.

``x_train`` and ``train/x`` are field ``x`` of split ``train``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 - so that what its filters compressed can be read
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.importers.arrays import Arrays, Rows, array_of
from hpctrain.data.importers.tar import reading
from hpctrain.data.splits import Array
from hpctrain.data.summary import Found

CACHE_BYTES = 128 * 2**20
"""Of a dataset's chunks: each should be decompressed once, though it spans several blocks."""


class Hdf5(Arrays):
    """One HDF5 file."""

    said = "datasets of HDF5"

    def arrays(self, found: Found) -> dict[str, Array]:
        """All datasets, in groups and out of them."""
        arrays: dict[str, Array] = {}

        def note(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                arrays[name] = array_of(node.shape or (), node.dtype)

        with h5py.File(self.path, "r") as file:
            file.visititems(note)
        return arrays

    @contextlib.contextmanager
    def open(self, names: list[str]) -> Iterator[Mapping[str, Rows]]:
        """Open it, to read whole blocks of rows."""
        with h5py.File(self.path, "r", rdcc_nbytes=CACHE_BYTES) as file:
            yield {name: _Dataset(file[name]) for name in names}

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """What HDF5 raises where a file is broken."""
        return reading(self.path, ValueError, KeyError, RuntimeError)


class _Dataset:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        return np.asarray(self._dataset[start:stop])
