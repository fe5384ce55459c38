"""Read a shard set: a folder of plain HDF5 files and an index. docs/shards.md has the format.

HDF5 is not asked for samples. The index says where each dataset's bytes are, and the files are
mapped: a sample costs what a copy from memory costs, and no lock of HDF5's is on the way. Datasets
in chunks are decompressed a chunk at a time (see chunks.py).
"""

from __future__ import annotations

import hashlib
import os
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import click
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.chunks import CACHE_BYTES, BadShard
from hpctrain.data.fields import Field, field, is_mapped
from hpctrain.data.index import (
    HEAD_BYTES,
    Index,
    ShardEntry,
    first_samples,
    read_index,
)
from hpctrain.data.order import WINDOW_BLOCKS, EpochOrder, Order, Shuffle
from hpctrain.data.source import Arrays, Empty, Source
from hpctrain.errors import Error, nearest
from hpctrain.files import is_own, open_regular

BLOCK_BYTES = 512 * 2**10
"""What is read at a stretch, about: parallel file systems move a megabyte as fast as a page."""

OPEN_BYTES = 2**30
"""Of decompressed blocks that an epoch's lanes have open. It is part of the order's rules."""
SEQUENCE_BYTES = 2**28
"""Of samples of varying length that HDF5 has read, and that are kept."""

OnBadShard = Literal["stop", "skip"]


class ShardSet:
    """A shard set on disk, read only.

    Args:
        path: The folder.
        on_bad_shard: ``stop``: a shard that cannot be read is an error. ``skip``: its samples are
            left out and counted.
        staged: A folder in which copies of shards may be found that are quicker to read.

    Attributes:
        path: Its folder.
        index: As read.
        splits: Name -> samples.
        attributes: What the importer wanted kept, such as the names of classes.

    Raises:
        Error: There is no index, or it is not one that this version reads.

    Example:
        >>> import tempfile
        >>> from hpctrain.data.writer import ShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder + "/shards") as writer:
        ...         writer.write("train", {"x": np.arange(6).reshape(3, 2)})
        ...     ShardSet(folder + "/shards").split("train").take(np.array([2]))
        {'x': array([[4, 5]])}
    """

    def __init__(
        self, path: Path | str, *, on_bad_shard: OnBadShard = "stop", staged: Path | None = None
    ) -> None:
        self.path = Path(path)
        self.index = read_index(self.path)
        self.attributes: dict[str, Any] = self.index.attributes
        self.splits: dict[str, ShardSplit] = {
            name: ShardSplit(self.path, name, self.index, on_bad_shard, staged)
            for name in self.index.splits
        }

    def split(self, name: str) -> ShardSplit:
        """Return the samples of one split.

        Raises:
            Error: There is no such split.
        """
        if name not in self.splits:
            raise Error(
                f"{self.path} has no split '{name}'.", hint=nearest(name, list(self.splits))
            )
        return self.splits[name]


class ShardSplit(Source):
    """The samples of one split, as a source.

    Safe to use from any number of threads, to be pickled, and to be used after a fork.

    Attributes:
        name: Of the split.
        fields: Name -> what it is.
        bad: Path of a shard that could not be read -> why.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        index: Index,
        on_bad_shard: OnBadShard = "stop",
        staged: Path | None = None,
    ) -> None:
        self.name = name
        self.fields = index.fields
        self.path = path
        self.bad: dict[str, BadShard] = {}
        self._arguments = (path, name, index, on_bad_shard, staged)
        self._staged = staged
        self._skip = on_bad_shard == "skip"
        self._datasets = index.splits[name].datasets
        self._shards = index.splits[name].shards
        self._chunk_samples = index.chunk_samples
        self._firsts = np.array(first_samples(self._shards), dtype=np.int64)
        # Of the samples in a shard where all but the last have as many; else 0.
        sizes = np.unique(np.diff(self._firsts)[:-1])
        even = len(sizes) == 1 and np.diff(self._firsts)[-1] <= sizes[0]
        self._even_samples = int(sizes[0]) if even else 0
        self._readers: dict[str, Field] = {}
        self._adopted = index.adopted
        self._open_readers()
        _splits.add(self)

    def _open_readers(self) -> None:
        """Make ready to open shards; none is open yet, and no lock is held."""
        self._lock = threading.RLock()
        # By shard: 0 not opened yet, 1 open, 2 bad.
        self._states = np.zeros(len(self._shards), dtype=np.uint8)
        inside = all("/" not in shard.path for shard in self._shards)
        # What is decompressed shares the room by size.
        sizes = {
            column: spec.row_bytes
            for column, spec in self.fields.items()
            if not spec.ragged and not is_mapped(self._datasets[column], self._shards)
        }
        for column, spec in self.fields.items():
            dataset = self._datasets[column]
            room = CACHE_BYTES * sizes.get(column, 0) // max(1, sum(sizes.values()))
            self._readers[column] = field(
                dataset,
                spec,
                self._shards,
                room=room or SEQUENCE_BYTES,
                own=not self._adopted and inside and dataset.startswith("samples/"),
                compared=self._adopted > 0,
            )

    def __reduce__(self) -> Any:
        return ShardSplit, self._arguments

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @cached_property
    def digest(self) -> str:
        """A digest of the shards' checksums (sizes and heads where there are none), in order."""
        text = " ".join(
            shard.sha256 or f"{shard.samples} {shard.bytes} {shard.head_sha256}"
            for shard in self._shards
        )
        if self._adopted and self._chunk_samples:  # which blocks there are is no part of the files
            text += f" {self._adopted} {self._chunk_samples}"
        return hashlib.sha256(text.encode()).hexdigest()

    def order(self, seed: int, epoch: int, shuffle: Shuffle, lanes: int) -> Order:
        """Return an epoch's order, shuffled in blocks of some hundred KiB, or of whole chunks.

        Args:
            seed: Of the run.
            epoch: Counted from 0.
            shuffle: ``none`` keeps the order in which they are stored.
            lanes: Samples of a global batch.
        """
        together = 1
        if self._chunk_samples:
            block, aligned = self._chunk_samples, True
            if self._adopted:
                together = -(-lanes // self._lanes_at_most)
                lanes = -(-lanes // together)
        else:
            # A ragged sample's size is known only on the average.
            size = sum(spec.row_bytes for spec in self.fields.values() if not spec.ragged)
            if any(spec.ragged for spec in self.fields.values()):
                size = max(size, sum(shard.bytes for shard in self._shards) // max(1, len(self)))
            block, aligned = max(1, BLOCK_BYTES // max(1, size)), False
        return EpochOrder(len(self), seed, epoch, shuffle, block, lanes, aligned, together)

    @cached_property
    def _lanes_at_most(self) -> int:
        """How many lanes can have their windows open in the room that there is."""
        largest = max(
            (spec.row_bytes for spec in self.fields.values() if not spec.ragged), default=1
        )
        window = WINDOW_BLOCKS * self._chunk_samples * max(1, largest)
        return max(1, OPEN_BYTES // window)

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Read rows of every field, in the order asked for.

        Args:
            indices: Shape (n,): numbers of samples.
            empty: Gives the memory for them.

        Raises:
            BadShard: A shard is missing, truncated, or not what the index says.
        """
        shards = self._shards_of(indices)
        self._open_all(shards)
        local = indices - self._firsts[shards]
        batch: Arrays = {}
        try:
            for name, reader in self._readers.items():
                for suffix, rows in reader.take(shards, local, empty).items():
                    batch[name + suffix] = rows
        except BadShard as error:
            self._note_bad(int(shards[0]) if error.shard is None else error.shard, error)
            raise
        return batch

    def _shards_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._even_samples:
            return indices // self._even_samples
        return np.searchsorted(self._firsts[1:], indices, side="right")

    def column(self, name: str) -> NDArray[Any]:
        """Read one field of all samples, without the others.

        Raises:
            Error: There is no such field, or it is ragged.
            BadShard: A shard cannot be read.
        """
        if name not in self.fields or self.fields[name].ragged:
            raise Error(
                f"split '{self.name}' of {self.path} has no field '{name}' of one shape.",
                hint=nearest(name, self.fields),
            )
        every = np.arange(len(self))
        shards = self._shards_of(every)
        self._open_all(shards)
        local = every - self._firsts[shards]
        return self._readers[name].take(shards, local, np.empty)[""]

    def readable(self, indices: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Tell which samples are in shards that are not known to be bad; None: all must be."""
        if not self._skip:
            return None
        shards = self._shards_of(indices)
        self._open_all(shards)
        return np.asarray(self._states[shards] != 2)

    def nothing_left(self) -> bool:
        """Whether no shard can be read."""
        filled = [number for number, shard in enumerate(self._shards) if shard.samples]
        if not self._skip or not self.bad:
            return False
        self._open_all(np.array(filled, dtype=np.int64))
        return bool((self._states[filled] == 2).all())

    def _open_all(self, shards: NDArray[np.int64]) -> None:
        if (self._states[shards] == 1).all():
            return
        for number in np.unique(shards).tolist():
            with self._lock:
                state = self._states[number]
                if state == 2 and not self._skip:
                    raise self.bad[str(self.path / self._shards[number].path)]
                if state == 0:
                    try:
                        self._open(number)
                        self._states[number] = 1
                    except BadShard as error:
                        self._note_bad(number, error)
                        if not self._skip:
                            raise

    def _note_bad(self, number: int, error: BadShard) -> None:
        with self._lock:
            if self._skip and self._states[number] != 2:
                lost = self._shards[number].samples
                click.echo(
                    f"hpctrain: warning: {error.message} Its {lost} samples are left out.", err=True
                )
            self._states[number] = 2
            self.bad[str(self.path / self._shards[number].path)] = error

    def _open(self, number: int) -> None:
        shard = self._shards[number]
        path = self._path_of(shard)
        check(path, shard)
        try:
            for reader in self._readers.values():
                reader.open(number, path, shard)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise BadShard(
                f"shard {path} cannot be opened: {error}.",
                hint="`hpctrain data verify` tells more.",
            ) from error

    def _path_of(self, shard: ShardEntry) -> Path:
        if self._staged is not None:
            copy = self._staged / staged_name(shard)
            if is_own(self._staged) and is_own(copy):
                return copy
        return self.path / shard.path


_splits: WeakSet[ShardSplit] = WeakSet()


def _after_fork() -> None:
    """Open files anew in a child: another thread of the parent may have held any lock."""
    for split in list(_splits):
        split._open_readers()


os.register_at_fork(after_in_child=_after_fork)


def staged_name(shard: ShardEntry) -> str:
    """Return the name of a shard's copy, which differs for files of one name in other folders."""
    place = hashlib.sha256(shard.path.encode()).hexdigest()[:12]
    return f"{place}-{Path(shard.path).name}"


def check(path: Path, shard: ShardEntry) -> None:
    """Compare with the index what costs nothing: a file's size, and its first bytes.

    Args:
        path: Of the shard.
        shard: Its entry in the index.

    Raises:
        BadShard: It is missing, or differs from the index.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise BadShard(
            f"shard {path} cannot be read: {error.strerror}.",
            hint="is the whole shard set there? Import it again if not.",
        ) from error
    if size != shard.bytes:
        raise BadShard(
            f"shard {path} has {size} bytes, but the index says {shard.bytes}.",
            hint="it is truncated or not the shard of this index; import the data again.",
        )
    if hashlib.sha256(head).hexdigest() != shard.head_sha256:
        raise BadShard(
            f"shard {path} does not begin as the index says.",
            hint="it is corrupt or another shard in its place; `hpctrain data verify` tells more.",
        )
