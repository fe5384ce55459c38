"""Write shards and the index. docs/shards.md has the format.

A shard is written under another name, synced and renamed; the index is written last. So a reader
never sees half a shard, and a folder without an index is not a shard set yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.index import (
    FORMAT,
    HEAD_BYTES,
    INDEX,
    VERSION,
    FieldSpec,
    Index,
    ShardEntry,
    SplitEntry,
)
from hpctrain.data.source import check_names
from hpctrain.errors import Error
from hpctrain.files import sha256, sync

SHARD_BYTES = 256 * 2**20
CHUNK_BYTES = 256 * 2**10
"""Of a compressed chunk, about: one is decompressed as a whole."""
SMALL_BYTES = 16
"""Fields with smaller samples, such as labels, are never compressed."""
ALIGNMENT = 4096

Compression = Literal["none", "lz4", "zstd"]


@dataclass(frozen=True)
class Ragged:
    """Samples of one field, each with any number of rows: values end to end, and offsets.

    Attributes:
        values: The rows of all samples, one after the other: shape (rows, ...).
        offsets: Shape (samples + 1,): sample ``i`` has rows ``offsets[i]`` to ``offsets[i + 1]``.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @staticmethod
    def of(samples: Sequence[Any]) -> Ragged:
        """Make a ragged column of one array for each sample.

        All are of one type and row shape; ``bytes`` are uint8.

        Example:
            >>> column = Ragged.of([b"one", b"three"])
            >>> column.values.tobytes(), column.offsets.tolist()
            (b'onethree', [0, 3, 8])
        """
        arrays = [
            np.frombuffer(sample, np.uint8) if isinstance(sample, bytes) else np.asarray(sample)
            for sample in samples
        ]
        lengths = [len(array) for array in arrays]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Ragged(np.concatenate(arrays) if arrays else np.empty(0, np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, part: slice) -> Ragged:
        start, stop, _ = part.indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    @property
    def nbytes(self) -> int:
        """The bytes of the values and offsets."""
        return self.values.nbytes + self.offsets.nbytes


Column = NDArray[Any] | Ragged


def column_of(samples: Any) -> Column:
    """Return samples as they are stored: little-endian, whatever they came as."""
    if isinstance(samples, Ragged):
        return Ragged(_little(samples.values), samples.offsets.astype("<i8", copy=False))
    return _little(np.asarray(samples))


def _little(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def spec_of(column: Column) -> FieldSpec:
    """Return the field that a column of samples is.

    Raises:
        Error: It is of no type that HDF5 and torch both have.
    """
    array = column.values if isinstance(column, Ragged) else column
    if not is_storable(array.dtype):
        raise Error(
            f"samples of type {array.dtype} cannot be stored.",
            hint="use numbers or booleans; text goes in as bytes of varying length (Ragged).",
        )
    return FieldSpec(array.dtype.str, tuple(array.shape[1:]), isinstance(column, Ragged))


def is_storable(dtype: np.dtype[Any]) -> bool:
    """Whether HDF5 and torch both have a type: booleans, and numbers of usual precision."""
    return (dtype.kind in "biuf" and dtype.itemsize <= 8) or (
        dtype.kind == "c" and dtype.itemsize <= 16
    )


def check_storable_names(names: Iterable[str], where: str) -> None:
    """Refuse names that fields of one HDF5 file cannot have beside each other.

    Args:
        names: Of all fields.
        where: They are, for the error.

    Raises:
        Error: One is empty, holds what HDF5 has a use of its own for, or is within another.
    """
    names = list(names)
    check_names(names, where)
    for name in names:
        parts = name.split("/")
        coded = name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        unfit = "\0" in name or coded != name or {"", ".", ".."} & {*parts}
        if unfit or any(other.startswith(f"{name}/") for other in names):
            raise Error(
                f"{where}: a field cannot be called {name!r}.", hint="rename it, or leave it out."
            )


def chunk_samples(fields: Mapping[str, FieldSpec]) -> int:
    """Return how many samples a compressed chunk has: a power of two, best for the epoch order."""
    largest = max((spec.row_bytes for spec in fields.values() if not spec.ragged), default=0)
    return 1 << max(0, (CHUNK_BYTES // max(1, largest)).bit_length() - 1)


def write_shard(
    folder: Path,
    name: str,
    columns: Mapping[str, Column],
    *,
    split: str,
    number: int,
    compression: Compression = "none",
) -> ShardEntry:
    """Write one shard, whole or not at all. The same samples always give the same bytes.

    Args:
        folder: Of the shard set.
        name: Of the file.
        columns: Field -> its samples, all equally many.
        split: Kept in the file.
        number: Of the shard in its split; kept in the file.
        compression: Of fields that are not ragged.

    Raises:
        Error: It cannot be written.
    """
    samples = len(next(iter(columns.values())))
    temporary = folder / f".{name}.{os.uname().nodename}.{os.getpid()}"
    offsets: dict[str, int] = {}
    datasets = dict(_datasets(columns, compression))
    with writing(folder):
        try:
            # "v110" so that object headers hold no times: the same samples give the same bytes.
            with h5py.File(
                temporary,
                "w",
                libver=("earliest", "v110"),
                alignment_threshold=ALIGNMENT,
                alignment_interval=ALIGNMENT,
            ) as file:
                file.attrs["format"] = FORMAT
                file.attrs["version"] = VERSION
                file.attrs["split"] = split
                file.attrs["shard"] = number
                file.attrs["samples"] = samples
                file.attrs["sha256"] = _digest(datasets)
                for dataset, (array, chunks, digest) in datasets.items():
                    options: dict[str, Any] = {"track_times": False}
                    if chunks:
                        options["chunks"] = (chunks, *array.shape[1:])
                        options |= _filter(compression)
                    file.create_dataset(dataset, data=array, **options)
                    file[dataset].attrs["sha256"] = digest
                file.flush()
                for dataset, (array, chunks, _) in datasets.items():
                    if not chunks:
                        offset = file[dataset].id.get_offset()
                        offsets[dataset] = 0 if offset is None or not array.size else int(offset)
            sync(temporary)
            entry = entry_of(temporary, samples, offsets)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return entry._replace(path=name)


def entry_of(path: Path, samples: int, offsets: dict[str, int], digest: bool = True) -> ShardEntry:
    """Return the index's entry for a file as it is.

    Args:
        path: Of the file.
        samples: How many it holds.
        offsets: Dataset -> where its rows begin in the file, in bytes.
        digest: Whether to read it all for a checksum.
    """
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
    checksum = sha256(path) if digest else ""
    return ShardEntry(str(path), samples, path.stat().st_size, checksum, head, offsets)


def _filter(compression: Compression) -> dict[str, Any]:
    return dict(hdf5plugin.LZ4() if compression == "lz4" else hdf5plugin.Zstd(clevel=3))


_Dataset = tuple[NDArray[Any], int, str]
"""Content, samples in a chunk (0: contiguous), and SHA-256 of the content."""


def _datasets(
    columns: Mapping[str, Column], compression: Compression
) -> Iterator[tuple[str, _Dataset]]:
    """What a shard holds, by name."""
    specs = {field: spec_of(column) for field, column in columns.items()}
    for field, column in columns.items():
        name = f"samples/{field}"
        if isinstance(column, Ragged):
            yield f"{name}/values", (column.values, 0, _sha256(column.values))
            yield f"{name}/offsets", (column.offsets, 0, _sha256(column.offsets))
        else:
            small = specs[field].row_bytes <= SMALL_BYTES
            chunked = compression != "none" and not small
            chunks = min(len(column), chunk_samples(specs)) if chunked else 0
            yield name, (column, chunks, _sha256(column))


def _sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _digest(datasets: Mapping[str, _Dataset]) -> str:
    """Return the digest of all in a shard: it stands at its start, and tells it from others."""
    parts = [f"{n} {a.dtype.str} {a.shape} {digest}\n" for n, (a, _, digest) in datasets.items()]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


class ShardWriter:
    """Writes a shard set from samples as they come; use it as a context manager.

    Nothing counts until the context ends without an exception: then the index is written.

    Args:
        path: Folder to make; it must not hold a shard set yet.
        shard_bytes: A new shard is begun when one has grown to this.
        compression: ``none``, ``lz4`` or ``zstd``.

    Raises:
        Error: The folder cannot be made, or holds a shard set.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder + "/shards") as writer:
        ...         for text in (b"one", b"a longer one"):
        ...             row = np.full((1, 3), len(text))
        ...             writer.write("train", {"x": row, "text": Ragged.of([text])})
    """

    def __init__(
        self,
        path: Path | str,
        *,
        shard_bytes: int = SHARD_BYTES,
        compression: Compression = "none",
    ) -> None:
        if compression not in get_args(Compression):
            raise Error(f"there is no compression '{compression}'.", hint="none, lz4 or zstd.")
        self.path = Path(path)
        self.shard_bytes = shard_bytes
        self.compression = compression
        self.attributes: dict[str, Any] = {}
        self._fields: dict[str, FieldSpec] = {}
        self._splits: dict[str, SplitEntry] = {}
        self._pending: dict[str, list[dict[str, Column]]] = {}
        self._bytes: dict[str, int] = {}
        prepare(self.path)

    def write(self, split: str, columns: Mapping[str, Any]) -> None:
        """Add samples to a split.

        Args:
            split: Such as ``train``.
            columns: Field -> array of shape (samples, ...), or :class:`Ragged`; the same names,
                types and sample shapes in every call.

        Raises:
            Error: A field is missing, new, or of another type or shape than before; fields differ
                in length; a shard cannot be written.
        """
        added = {name: column_of(column) for name, column in columns.items()}
        self._fields = check_columns(added, self._fields, split)
        self._pending.setdefault(split, []).append(added)
        size = self._bytes.get(split, 0) + sum(column.nbytes for column in added.values())
        self._bytes[split] = size
        if size >= self.shard_bytes:
            self._flush(split, last=False)

    def _flush(self, split: str, *, last: bool) -> None:
        parts = self._pending.pop(split, [])
        columns = {name: join([part[name] for part in parts]) for name in self._fields}
        samples = len(next(iter(columns.values())))
        whole = samples
        if self.compression != "none" and not last:
            # Only whole chunks, so that no chunk but a split's last is smaller than the others.
            whole -= samples % chunk_samples(self._fields)
        rest = {name: column[whole:] for name, column in columns.items()}
        self._pending[split] = [rest]
        self._bytes[split] = sum(column.nbytes for column in rest.values())
        if not whole:
            return
        columns = {name: column[:whole] for name, column in columns.items()}
        entry = self._splits.setdefault(split, SplitEntry(datasets_of(self._fields)))
        number = len(entry.shards)
        shard = write_shard(
            self.path,
            shard_name(split, number),
            columns,
            split=split,
            number=number,
            compression=self.compression,
        )
        entry.shards.append(shard)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        for split in list(self._pending):
            self._flush(split, last=True)
        write_index(self.path, self._fields, self._splits, self.attributes, self.compression)


def prepare(folder: Path) -> None:
    """Make the folder of a shard set to come.

    Raises:
        Error: It cannot be made, or holds a shard set.
    """
    if (folder / INDEX).exists():
        raise Error(
            f"{folder} already holds a shard set.", hint="remove it, or choose another name."
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_index(
    folder: Path,
    fields: dict[str, FieldSpec],
    splits: dict[str, SplitEntry],
    attributes: dict[str, Any],
    compression: Compression,
) -> Index:
    """Write the index that makes a folder a shard set, and return it.

    Args:
        folder: Of the shards.
        fields: Of a sample.
        splits: With the entries of their shards.
        attributes: Anything else that JSON can hold, such as the names of classes.
        compression: Of the shards.
    """
    chunked = compression != "none" and any(
        not spec.ragged and spec.row_bytes > SMALL_BYTES for spec in fields.values()
    )
    index = Index(fields, splits, attributes, chunk_samples(fields) if chunked else 0)
    with writing(folder):
        index.write(folder)
    return index


def shard_name(split: str, number: int) -> str:
    """Return the file name of a split's shard.

    Args:
        split: Its name.
        number: The shard's within the split, from 0.
    """
    return f"{split}-{number:06d}.h5"


def datasets_of(fields: Mapping[str, FieldSpec]) -> dict[str, str]:
    """Return where in a shard each field is: field -> dataset."""
    return {field: f"samples/{field}" for field in fields}


def join(parts: Sequence[Column]) -> Column:
    """Concatenate columns of samples, one after the other."""
    if len(parts) == 1:
        return parts[0]
    arrays: list[NDArray[Any]] = []
    offsets: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    rows = 0
    for part in parts:
        if isinstance(part, Ragged):
            arrays.append(part.values)
            offsets.append(part.offsets[1:] + rows)
            rows += len(part.values)
        else:
            arrays.append(part)
    values = np.concatenate(arrays)
    return Ragged(values, np.concatenate(offsets)) if len(offsets) > 1 else values


def check_columns(
    columns: Mapping[str, Column], fields: dict[str, FieldSpec], split: str
) -> dict[str, FieldSpec]:
    """Return the fields that columns are, if they are those that there were so far.

    Args:
        columns: By field.
        fields: What there was so far; empty: anything is accepted.
        split: For errors.

    Raises:
        Error: They are something else, or differ in length.
    """
    found = {name: spec_of(column) for name, column in columns.items()}
    if fields and found != fields:
        raise Error(
            f"samples of split '{split}' have fields {_listing(found)}, but the first had "
            f"{_listing(fields)}.",
            hint="all samples of a set must have the same fields, types and shapes.",
        )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise Error(f"fields of split '{split}' differ in length: {lengths}.", hint="one row each.")
    return found


def _listing(fields: Mapping[str, FieldSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in fields.items())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a disk into one error; a context manager."""
    try:
        yield
    except OSError as error:
        raise Error(
            f"cannot write {path}: {error.strerror or error}.",
            hint="is there room, and may you write there?",
        ) from error
