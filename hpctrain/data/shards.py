"""The shard set: a folder of plain HDF5 files and an index, written last and all at once.

Layout (version 1)::

    DIR/hpctrain-index.json    the commit point: without it the folder is not a shard set
    DIR/train-00000.h5         /samples/FIELD of shape (samples, ...), contiguous, uncompressed

Any HDF5 reader can read a shard. This one asks HDF5 only where a dataset's bytes are, and then maps
them: a sample costs what a copy from memory costs, and no HDF5 lock or global mutex is involved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.source import Arrays
from hpctrain.errors import Error, nearest
from hpctrain.files import sha256, sync, write_text

INDEX = "hpctrain-index.json"
FORMAT = "hpctrain-shards"
VERSION = 1
SHARD_BYTES = 256 * 2**20


class ShardSet:
    """A shard set on disk, read only.

    Attributes:
        path: Its folder.
        splits: Names and samples, as the index has them.
        attributes: What the importer wanted kept, such as the names of classes.

    Args:
        path: The folder.

    Raises:
        Error: There is no index, or it is not one that this version reads.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self.attributes: dict[str, Any] = index.get("attributes", {})
        self.splits: dict[str, ShardSplit] = {
            name: ShardSplit(self.path, name, split, index["fields"])
            for name, split in index["splits"].items()
        }

    def split(self, name: str) -> ShardSplit:
        """The samples of one split.

        Raises:
            Error: There is no such split.
        """
        if name not in self.splits:
            raise Error(
                f"{self.path} has no split '{name}'.", hint=nearest(name, list(self.splits))
            )
        return self.splits[name]


class ShardSplit:
    """One split's samples: a :class:`hpctrain.data.source.Source` over mapped shards."""

    def __init__(
        self, path: Path, name: str, split: dict[str, Any], fields: dict[str, Any]
    ) -> None:
        self.name = name
        self.fields = {
            field: (np.dtype(spec["dtype"]), tuple(spec["shape"])) for field, spec in fields.items()
        }
        self._path = path
        self._shards: list[dict[str, Any]] = split["shards"]
        self._ends = np.cumsum([shard["samples"] for shard in self._shards], dtype=np.int64)
        # Opened when first needed and kept: a mapping made anew would fault every page again.
        self._maps: dict[int, Arrays] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def digest(self) -> str:
        """Of the shards' checksums, in order."""
        text = " ".join(shard["sha256"] for shard in self._shards)
        return hashlib.sha256(text.encode()).hexdigest()

    def take(self, indices: NDArray[np.int64]) -> Arrays:
        """Rows of every field.

        Raises:
            Error: A shard is missing, truncated, or not what the index says.
        """
        shards = np.searchsorted(self._ends, indices, side="right")
        batch = {
            field: np.empty((len(indices), *shape), dtype)
            for field, (dtype, shape) in self.fields.items()
        }
        for shard in np.unique(shards):
            number = int(shard)
            arrays = self._maps.get(number) or self._open(number)
            rows = shards == shard
            local = indices[rows] - (self._ends[number] - self._shards[number]["samples"])
            for field, out in batch.items():
                if rows.all():
                    # Without a mode other than "raise", numpy gathers into a buffer first.
                    np.take(arrays[field], local, axis=0, out=out, mode="clip")
                else:
                    out[rows] = arrays[field][local]
        return batch

    def _open(self, number: int) -> Arrays:
        shard = self._shards[number]
        path = self._path / shard["path"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise Error(
                f"shard {path} cannot be read: {error.strerror}.",
                hint="is the whole shard set there? Import it again if not.",
            ) from error
        if size != shard["bytes"]:
            raise Error(
                f"shard {path} has {size} bytes, but the index says {shard['bytes']}.",
                hint="it is truncated or not the shard of this index; import the data again.",
            )
        try:
            arrays = dict(self._map(path, shard["samples"]))
        except (OSError, KeyError, RuntimeError) as error:
            raise Error(
                f"shard {path} is not the HDF5 file it was: {error}.",
                hint="it is corrupt; import the data again.",
            ) from error
        self._maps[number] = arrays
        return arrays

    def _map(self, path: Path, samples: int) -> Iterator[tuple[str, NDArray[Any]]]:
        with h5py.File(path, "r", locking=False) as file:
            for field, (dtype, shape) in self.fields.items():
                dataset = file[f"samples/{field}"]
                if dataset.shape != (samples, *shape) or dataset.dtype != dtype:
                    raise Error(
                        f"shard {path}: samples/{field} is {dataset.dtype}{dataset.shape}, but the "
                        f"index says {dtype}{(samples, *shape)}.",
                        hint="the shard and the index are not of one set; import the data again.",
                    )
                offset = dataset.id.get_offset()
                if offset is None:
                    raise Error(
                        f"shard {path}: samples/{field} is not stored contiguously.",
                        hint="write shards with `hpctrain data import` or ShardWriter.",
                    )
                yield (
                    field,
                    np.memmap(path, dtype, mode="r", offset=offset, shape=(samples, *shape)),
                )


class ShardWriter:
    """Writes a shard set; use it as a context manager.

    Nothing counts until the context ends without an exception: then the index is written. Shards
    are written under another name, synced, and renamed, so a reader never sees half a one.

    Args:
        path: Folder to make; it must not hold a shard set yet.
        shard_bytes: A new shard is begun when one would grow beyond this.

    Raises:
        Error: The folder cannot be made, or holds a shard set.
    """

    def __init__(self, path: Path | str, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.path = Path(path)
        self.shard_bytes = shard_bytes
        self.attributes: dict[str, Any] = {}
        self._fields: dict[str, dict[str, Any]] = {}
        self._splits: dict[str, list[dict[str, Any]]] = {}
        self._pending: dict[str, list[Arrays]] = {}
        if (self.path / INDEX).exists():
            raise Error(
                f"{self.path} already holds a shard set.", hint="remove it, or choose another name."
            )
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def write(self, split: str, fields: Mapping[str, NDArray[Any]]) -> None:
        """Add samples to a split.

        Args:
            split: Such as ``train``.
            fields: Name -> array of shape (samples, ...); the same names, types and sample shapes
                in every call.

        Raises:
            Error: A field is missing, new, or of another type or shape than before.
        """
        arrays = {name: np.asarray(array) for name, array in fields.items()}
        spec = {
            name: {"dtype": array.dtype.str, "shape": list(array.shape[1:])}
            for name, array in arrays.items()
        }
        self._fields = self._fields or spec
        if spec != self._fields:
            raise Error(
                f"samples of split '{split}' have fields {spec}, but the first had {self._fields}.",
                hint="all samples of a set must have the same fields, types and shapes.",
            )
        pending = self._pending.setdefault(split, [])
        pending.append(arrays)
        if sum(array.nbytes for part in pending for array in part.values()) >= self.shard_bytes:
            self._flush(split)

    def _flush(self, split: str) -> None:
        parts = self._pending.pop(split, [])
        if not parts:
            return
        shards = self._splits.setdefault(split, [])
        name = f"{split}-{len(shards):05d}.h5"
        arrays = {field: np.concatenate([part[field] for part in parts]) for field in self._fields}
        temporary = self.path / f".{name}.{os.getpid()}"
        with _writing(self.path):
            try:
                # Object headers hold no times, so the same samples give the same bytes.
                with h5py.File(temporary, "w", libver="v110") as file:
                    file.attrs["format"] = FORMAT
                    file.attrs["version"] = VERSION
                    for field, array in arrays.items():
                        file.create_dataset(f"samples/{field}", data=array, track_times=False)
                sync(temporary)
                digest = sha256(temporary)
                temporary.replace(self.path / name)
            finally:
                temporary.unlink(missing_ok=True)
        samples = len(next(iter(arrays.values())))
        size = (self.path / name).stat().st_size
        shards.append({"path": name, "samples": samples, "bytes": size, "sha256": digest})

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
            self._flush(split)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "fields": self._fields,
            "splits": {
                name: {"samples": sum(shard["samples"] for shard in shards), "shards": shards}
                for name, shards in self._splits.items()
            },
            "attributes": self.attributes,
        }
        with _writing(self.path):
            write_text(self.path / INDEX, json.dumps(index, indent=1) + "\n")


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}")
        if index["version"] != VERSION:
            raise Error(
                f"{file} is of version {index['version']}; this hpctrain reads {VERSION}.",
                hint="update hpctrain, or import the data again.",
            )
        for split in index["splits"].values():
            for shard in split["shards"]:
                int(shard["samples"]), int(shard["bytes"]), str(shard["path"]), shard["sha256"]
        for spec in index["fields"].values():
            np.dtype(spec["dtype"]), tuple(spec["shape"])
    except OSError as error:
        raise Error(
            f"{path} is not a shard set: {INDEX} cannot be read ({error.strerror}).",
            hint="make one with `hpctrain data import SRC DST`.",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Error(
            f"{file} is damaged: {type(error).__name__}: {error}.", hint="import the data again."
        ) from error
    return dict(index)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Error(
            f"cannot write {path}: {error.strerror or error}.",
            hint="is there room, and may you write there?",
        ) from error
