"""Arrays with one row a sample, from an npz or npy; a piece at a time, so of any size.

``train_x``, ``x_train`` and ``train/x`` are field ``x`` of split ``train``; ``x`` has no split.
"""

from __future__ import annotations

import contextlib
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.importers.plan import (
    BLOCK_BYTES,
    Columns,
    Importer,
    Items,
    Survey,
    blocks,
    stamp,
)
from hpctrain.data.importers.tar import reading
from hpctrain.data.index import FieldSpec
from hpctrain.data.splits import split_and_field
from hpctrain.errors import Error

Rows = Callable[[int, int], NDArray[Any]]
"""Gives rows from a start to a stop; asked for rising ones."""
Shape = tuple[tuple[int, ...], "np.dtype[Any]"]


class Arrays(Importer):
    """What all files of arrays have in common."""

    what = "rows"

    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape and type of each array."""

    @abstractmethod
    def open(self, names: list[str]) -> contextlib.AbstractContextManager[Mapping[str, Rows]]:
        """These arrays, to be read."""

    def survey(self) -> Survey:
        """See what arrays there are."""
        with self.errors():
            shapes = self.shapes()
        splits: dict[str, dict[str, str]] = {}
        for name in shapes:
            split, field = split_and_field(name)
            splits.setdefault(split, {})[field] = name
        runs: list[tuple[str, int]] = []
        fields: dict[str, FieldSpec] = {}
        for split, names in splits.items():
            found = {field: self._spec(name, *shapes[name]) for field, name in names.items()}
            if fields and found != fields:
                raise Error(
                    f"{self.path}: split '{split}' has {_listing(found)}, but another has "
                    f"{_listing(fields)}.",
                    hint="all splits must have the same arrays, of the same types and row shapes.",
                )
            fields = found
            lengths = {name: shapes[name][0][0] for name in names.values()}
            if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
                raise Error(
                    f"{self.path}: arrays of a split must be equally long, but have {lengths} "
                    "rows.",
                    hint="one row a sample: x and y, or x_train, y_train, x_test and y_test.",
                )
            runs.append((split, next(iter(lengths.values()))))
        if not runs:
            raise Error(f"{self.path} holds no arrays.", hint="one row a sample, such as x and y.")
        row_bytes = sum(spec.row_bytes for spec in fields.values())
        return Survey(
            runs=runs,
            fields=fields,
            bytes=row_bytes * sum(count for _, count in runs),
            details={
                "stamp": stamp(self.path),
                "splits": [list(splits[split].items()) for split, _ in runs],
            },
        )

    def _spec(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FieldSpec:
        if dtype.kind not in "biufc":
            raise Error(
                f"{self.path}: {name} is an array of {dtype}, not of numbers.",
                hint="store plain arrays of numbers or booleans, not objects or text.",
            )
        if not shape:
            raise Error(f"{self.path}: {name} is a single number.", hint="one row a sample.")
        return FieldSpec(dtype.str, shape[1:])

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Turns what the reading of a broken file raises into one error."""
        return reading(self.path, ValueError, KeyError, zipfile.BadZipFile)

    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Read them in blocks of rows."""
        total = sum(count for _, count in survey.runs)
        rows = max(1, BLOCK_BYTES * total // max(1, survey.bytes))
        first = 0
        for (_, count), names in zip(survey.runs, survey.details["splits"], strict=True):
            begin, end = np.searchsorted(items, [first, first + count])
            local = items[begin:end] - first
            first += count
            with self.errors(), self.open([name for _, name in names]) as arrays:
                for part in blocks(local, rows):
                    start, stop = int(part[0]), int(part[-1]) + 1
                    taken = {field: arrays[name](start, stop) for field, name in names}
                    if len(part) < stop - start:
                        taken = {field: array[part - start] for field, array in taken.items()}
                    yield {field: taken[field] for field in survey.fields}


def _listing(fields: Mapping[str, FieldSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in fields.items())


class Npy(Arrays):
    """One array; the file's name is the field's."""

    def shapes(self) -> dict[str, Shape]:
        """By mapping it."""
        array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return {self.path.stem: (array.shape, array.dtype)}

    @contextlib.contextmanager
    def open(self, names: list[str]) -> Iterator[Mapping[str, Rows]]:
        """Mapped."""
        array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        yield {names[0]: lambda start, stop: np.asarray(array[start:stop])}


class Npz(Arrays):
    """Arrays in a zip, which is read as a stream: compressed or not, none need fit in memory."""

    def shapes(self) -> dict[str, Shape]:
        """As their heads say."""
        shapes = {}
        with zipfile.ZipFile(self.path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    shape, _, dtype = _head(file)
                shapes[member.removesuffix(".npy")] = (shape, dtype)
        return shapes

    @contextlib.contextmanager
    def open(self, names: list[str]) -> Iterator[Mapping[str, Rows]]:
        """Each a stream of its own."""
        with zipfile.ZipFile(self.path) as archive, contextlib.ExitStack() as stack:
            members = set(archive.namelist())
            arrays: dict[str, Rows] = {}
            for name in names:
                member = name if name in members else f"{name}.npy"
                file = stack.enter_context(archive.open(member))
                shape, fortran, dtype = _head(file)
                if fortran and len(shape) > 1:
                    # Rows are strewn all over it.
                    with archive.open(member) as whole:
                        array = np.lib.format.read_array(whole, allow_pickle=False)
                    arrays[name] = _rows_of(array)
                else:
                    arrays[name] = _Stream(file, shape, dtype)
            yield arrays


def _rows_of(array: NDArray[Any]) -> Rows:
    return lambda start, stop: np.ascontiguousarray(array[start:stop])


def _head(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type of the array that a npy file holds."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    return read(file)


class _Stream:
    """Rows of an array in a stream that has just given its head."""

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._file = file
        self._shape, self._dtype = shape[1:], dtype
        self._row_bytes = dtype.itemsize * int(np.prod(self._shape, dtype=np.int64))
        self._first_byte = file.tell()

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        self._file.seek(self._first_byte + start * self._row_bytes)
        data = self._file.read((stop - start) * self._row_bytes)
        if len(data) < (stop - start) * self._row_bytes:
            raise EOFError(f"rows {start} to {stop} are not all there")
        return np.frombuffer(data, self._dtype).reshape(stop - start, *self._shape)
