"""Import HDF5 files whose datasets have one row a sample, such as others' tools write.

``x_train`` and ``train/x`` are field ``x`` of split ``train``. Text, and HDF5's rows of varying
length, become ragged fields.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hpctrain.data.hdf5 import (
    Unusable,
    aside,
    datasets,
    locate,
    open_dataset,
    open_file,
    sequences,
    spec_of_dataset,
)
from hpctrain.data.importers.arrays import Arrays, Rows
from hpctrain.data.importers.tar import reading
from hpctrain.data.index import FieldSpec
from hpctrain.data.splits import Array
from hpctrain.data.summary import Found
from hpctrain.data.writer import Column, Ragged
from hpctrain.errors import Error

CACHE_BYTES = 128 * 2**20
"""Of a dataset's chunks: each should be decompressed once, though it spans several blocks."""


class Hdf5(Arrays):
    """An importer of one HDF5 file."""

    said = "datasets of HDF5"

    def arrays(self, found: Found) -> dict[str, Array]:
        """List all datasets, in groups and out of them, or those asked for, which may be links."""
        if self.options.fields:
            return {name: self._array(name) for name in self.options.fields}
        with open_file(self.path) as file:
            names, others = datasets(file)
            aim = {name: aside(file[name]) for name in names}
        for name, what in others.items():
            found.leave(f"name in the file ({what})", name)
        for name, why in aim.items():
            if why:
                found.leave(f"dataset ({why})", name)
        return {name: self._array(name) for name, why in aim.items() if not why}

    def _array(self, name: str) -> Array:
        home, place = locate(self.path, name)
        with open_file(home) as file:
            dataset = file[place]
            try:
                spec = spec_of_dataset(dataset)
            except Unusable as error:
                raise Error(
                    f"{self.path}: {name} {error}.",
                    hint="leave it out: --fields A,B says which ones to take.",
                ) from error
            kind = spec.kind.newbyteorder("=").str
            return dataset.shape[0], FieldSpec(kind, spec.shape, spec.ragged)

    @contextlib.contextmanager
    def open(self, names: list[str]) -> Iterator[Mapping[str, Rows]]:
        """Open it, to read whole blocks of rows."""
        with contextlib.ExitStack() as stack:
            opened: dict[str, Rows] = {}
            for name in names:
                home, place = locate(self.path, name)
                file = stack.enter_context(open_file(home, rdcc_nbytes=CACHE_BYTES))
                opened[name] = _Dataset(open_dataset(file, home, place))
            yield opened

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Turn what HDF5 raises where a file is broken into one error."""
        return reading(self.path, ValueError, KeyError, RuntimeError, TypeError)


class _Dataset:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._ragged = spec_of_dataset(dataset).ragged

    def __call__(self, start: int, stop: int) -> Column:
        if self._ragged:
            return Ragged.of(sequences(self._dataset, start, stop))
        return np.asarray(self._dataset[start:stop])
