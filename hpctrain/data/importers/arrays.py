"""Import arrays with one row a sample, from an npz or npy; a piece at a time, so of any size.

``train_x``, ``x_train`` and ``train/x`` are field ``x`` of split ``train``; ``x`` has no split, but
its file's name may tell one.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.importers.import_plan import (
    BLOCK_BYTES,
    Columns,
    Importer,
    Items,
    Survey,
    blocks,
    pick,
    stamp,
)
from hpctrain.data.importers.tar import reading
from hpctrain.data.index import FieldSpec
from hpctrain.data.splits import Array, splits_of_files, tell
from hpctrain.data.summary import MOST_COUNTED, Found, count_classes, is_class_field
from hpctrain.data.writer import Column, Ragged, is_storable
from hpctrain.errors import Error

Rows = Callable[[int, int], Column]
"""Gives rows from a start to a stop; asked for rising ones."""
MOST_ROW_BYTES = 2**27
"""Of a compressed row, unless its file is as large: a few bytes can claim to be any number."""


BROKEN = (
    ValueError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy, zipfile and h5py raise for files that are not what they say."""


class Arrays(Importer):
    """An importer of files of arrays: what all their formats have in common."""

    what = "rows"

    said = "arrays"

    @abstractmethod
    def arrays(self, found: Found) -> dict[str, Array]:
        """List the arrays: name -> rows, and what they are.

        Args:
            found: Where to note what is no array.
        """

    @abstractmethod
    def open(self, names: list[str]) -> contextlib.AbstractContextManager[Mapping[str, Rows]]:
        """Open arrays to be read: name -> function that returns a range of rows."""

    def survey(self) -> Survey:
        """See what arrays there are."""
        where = str(self.path)
        found = Found(f"{self.said}, one row a sample")
        with self.errors():
            arrays = self._chosen(self.arrays(found))
        told = tell(
            arrays,
            where,
            told=self.options.names_tell_splits,
            chosen=bool(self.options.fields),
        )
        for name, why in told.left_out.items():
            found.leave(f"array ({why})", name)
        splits = told.splits
        if list(splits) == [""]:
            of_file = splits_of_files([self.path.name], where, told=self.options.names_tell_splits)
            splits = {of_file[0]: splits[""]}
        runs: list[tuple[str, int]] = []
        fields: dict[str, FieldSpec] = {}
        for split, names in splits.items():
            fields = {field: self._checked(name, arrays[name][1]) for field, name in names.items()}
            runs.append((split, arrays[next(iter(names.values()))][0] or 0))
        if not sum(count for _, count in runs):
            raise Error(f"{self.path} holds no samples.", hint="one row a sample, such as x and y.")
        self._count(splits, arrays, found)
        size = sum(spec.row_bytes for spec in fields.values()) * sum(count for _, count in runs)
        if any(spec.ragged for spec in fields.values()):
            size = max(size, self.path.stat().st_size)
        return Survey(
            runs=runs,
            fields=fields,
            bytes=size,
            details={
                "stamp": stamp(self.path),
                "splits": [list(splits[split].items()) for split, _ in runs],
            },
            found=found,
        )

    def _chosen(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Return the arrays that were asked for."""
        missing = [name for name in self.options.fields if name not in arrays]
        if missing or not arrays:
            what = f"no array {missing[0]}" if missing else "no arrays"
            raise Error(
                f"{self.path} holds {what}.", hint=f"it has: {', '.join(arrays) or 'none'}."
            )
        return {name: arrays[name] for name in self.options.fields or arrays}

    def _count(
        self, splits: dict[str, dict[str, str]], arrays: dict[str, Array], found: Found
    ) -> None:
        """Samples of each class, where a field holds the classes' numbers."""
        total: Counter[int] = Counter()
        for names in splits.values():
            for field, name in names.items():
                rows, spec = arrays[name]
                if not rows or not is_class_field(field, spec):
                    continue
                with self.errors(), self.open([name]) as opened:
                    for start in range(0, rows, BLOCK_BYTES):
                        part = opened[name](start, min(rows, start + BLOCK_BYTES))
                        total.update(count_classes(np.asarray(part)))
                        if len(total) > MOST_COUNTED:
                            return
        found.classes = {str(number): total[number] for number in sorted(total)}

    def _checked(self, name: str, spec: FieldSpec) -> FieldSpec:
        check_type(spec.kind, f"{self.path}: {name}")
        if spec.row_bytes > max(MOST_ROW_BYTES, self.path.stat().st_size):
            raise Error(
                f"{self.path}: a row of {name} has {spec.row_bytes:,} bytes, more than the file.",
                hint="is it whole? save it uncompressed if it is meant so.",
            )
        return spec

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Turn what the reading of a broken file raises into one error."""
        return reading(self.path, *BROKEN)

    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Read the samples of these numbers in blocks of rows.

        Args:
            survey: As found.
            items: Numbers in the source's own order, rising.
        """
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
                    taken = {field: native(arrays[name](start, stop)) for field, name in names}
                    if len(part) < stop - start:
                        wanted = np.zeros(stop - start, bool)
                        wanted[part - start] = True
                        taken = {field: pick(column, wanted) for field, column in taken.items()}
                    yield {field: taken[field] for field in survey.fields}


def array_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Describe an array: its rows, and the field that they are in this machine's byte order.

    Args:
        shape: Of the array; empty: a single value, without rows.
        dtype: Of the array.
    """
    kind = dtype.newbyteorder("=").str
    return (shape[0], FieldSpec(kind, shape[1:])) if shape else (None, FieldSpec(kind))


def check_type(dtype: np.dtype[Any], where: str) -> None:
    """Refuse a type that a field cannot have.

    Args:
        dtype: Of the array.
        where: What to call it in an error.

    Raises:
        Error: It is of objects, text, records, dates, or of numbers that torch has not.
    """
    if not is_storable(dtype):
        raise Error(
            f"{where} is an array of {dtype}, not of numbers that torch has.",
            hint="store plain arrays of numbers or booleans, or name others by --fields A,B.",
        )


def native(column: Column) -> Column:
    """Return a column in this machine's byte order."""
    if isinstance(column, Ragged):
        return Ragged(in_order(column.values), column.offsets)
    return in_order(column)


def in_order(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array in this machine's byte order; the array itself where it is already."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


class Npy(Arrays):
    """An importer of a npy file: one array; the file's name is the field's."""

    said = "an array of numpy's"

    def arrays(self, found: Found) -> dict[str, Array]:
        """Read from the file's header what the array is."""
        with self.path.open("rb") as file:
            shape, _, dtype = npy_head(file, self.path.stat().st_size)
        return {self.path.stem: array_of(shape, dtype)}

    @contextlib.contextmanager
    def open(self, names: list[str]) -> Iterator[Mapping[str, Rows]]:
        """Map the array into memory."""
        array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        yield {names[0]: lambda start, stop: np.asarray(array[start:stop])}


class Npz(Arrays):
    """An importer of a npz file: arrays in a zip, read as streams; none need fit in memory."""

    said = "arrays of numpy's"

    def arrays(self, found: Found) -> dict[str, Array]:
        """Read from the members' headers what the arrays are."""
        arrays = {}
        with zipfile.ZipFile(self.path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    shape, _, dtype = npy_head(file, member.file_size)
                arrays[member.filename.removesuffix(".npy")] = array_of(shape, dtype)
        return arrays

    @contextlib.contextmanager
    def open(self, names: list[str]) -> Iterator[Mapping[str, Rows]]:
        """Open each array as a stream of its own."""
        with zipfile.ZipFile(self.path) as archive, contextlib.ExitStack() as stack:
            members = set(archive.namelist())
            arrays: dict[str, Rows] = {}
            for name in names:
                member = name if name in members else f"{name}.npy"
                file = stack.enter_context(archive.open(member))
                size = archive.getinfo(member).file_size
                shape, fortran, dtype = npy_head(file, size)
                if fortran and len(shape) > 1:
                    # Rows are strewn all over it.
                    if size > max(2 * MOST_ROW_BYTES, self.path.stat().st_size):
                        raise ValueError(f"{name} is in Fortran's order, and too large to turn")
                    with archive.open(member) as whole:
                        array = np.lib.format.read_array(whole, allow_pickle=False)
                    arrays[name] = _rows_of(array)
                else:
                    arrays[name] = _Stream(file, shape, dtype)
            yield arrays


def _rows_of(array: NDArray[Any]) -> Rows:
    return lambda start, stop: np.ascontiguousarray(array[start:stop])


def npy_head(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a npy file: shape, whether in Fortran's order, and type of its array.

    Args:
        file: At its beginning; it is left where the array begins.
        size: Of the file, in bytes.

    Raises:
        ValueError: It is none, or of another size than it says.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # numpy evaluates it as Python, whose parser has errors of its own
        raise ValueError(f"its head cannot be read ({type(error).__name__})") from error
    if any(length < 0 for length in shape):
        raise ValueError(f"its head says it has the shape {shape}")
    held, said = size - file.tell(), dtype.itemsize * math.prod(shape)
    if held != said and not dtype.hasobject:
        raise ValueError(f"an array of {dtype}{shape} has {said} bytes, but {held} are there")
    return shape, fortran, dtype


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
