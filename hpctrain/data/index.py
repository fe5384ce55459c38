"""The index of a shard set: what it holds, shard by shard, and a checksum of itself.

It is JSON, one shard a line, and its last member is the SHA-256 of every byte before that member's
line, so that no change to it goes unseen. docs/shards.md is its specification.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpctrain.errors import Error
from hpctrain.files import read_regular, write_text

INDEX = "hpctrain-index.json"
FORMAT = "hpctrain-shards"
VERSION = 1
HEAD_BYTES = 8192
INDEX_BYTES = 2**30
"""Largest index: of some million shards."""


@dataclass(frozen=True)
class FieldSpec:
    """One field of a sample: its type and shape, and whether it is ragged.

    Attributes:
        dtype: numpy's name of it, such as ``|u1`` or ``<f4``.
        shape: Of one sample; of one row where the field is ragged.
        ragged: A sample has any number of rows.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    ragged: bool = False

    @property
    def kind(self) -> np.dtype[Any]:
        """The type of its values, as numpy's dtype."""
        return np.dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        """The bytes of a sample, or of one row of a ragged one."""
        return self.kind.itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        if self.ragged:
            return f"{self.kind}(rows{''.join(f', {n}' for n in self.shape)})"
        return f"{self.kind}{self.shape}"


class ShardEntry(NamedTuple):
    """A shard's entry in the index.

    Attributes:
        path: Relative to the index.
        samples: In it, of this split.
        bytes: Of the file.
        sha256: Of the file; empty where it was adopted unread.
        head_sha256: Of the file's first 8,192 bytes, which tells a shard from any other at once.
        offsets: Dataset -> where its bytes begin in the file; datasets in chunks have none.
    """

    path: str
    samples: int
    bytes: int
    sha256: str
    head_sha256: str
    offsets: dict[str, int]


@dataclass
class SplitEntry:
    """A split's entry in the index, with those of its shards.

    Attributes:
        datasets: Field -> dataset in each of the split's files.
        shards: In order.
    """

    datasets: dict[str, str]
    shards: list[ShardEntry] = field(default_factory=list)


@dataclass
class Index:
    """The index of a shard set: what the file ``hpctrain-index.json`` says.

    Attributes:
        fields: Name -> what it is; the same in all splits.
        splits: Name -> its shards.
        attributes: What the importer wanted kept, such as the names of classes.
        chunk_samples: Samples in a compressed chunk; 0 where samples can be read one by one.
        adopted: The files are others', and lie anywhere: 1 since what is mapped was compared with
            what HDF5 reads; 0 in sets that hpctrain wrote, and in those adopted before.
    """

    fields: dict[str, FieldSpec]
    splits: dict[str, SplitEntry]
    attributes: dict[str, Any] = field(default_factory=dict)
    chunk_samples: int = 0
    adopted: int = 0

    def shards(self) -> Iterator[tuple[str, SplitEntry, ShardEntry]]:
        """Yield all shards with the names of their splits."""
        for name, split in self.splits.items():
            for shard in split.shards:
                yield name, split, shard

    def write(self, folder: Path) -> None:
        """Write the index, whole or not at all.

        Raises:
            OSError: It could not be written.
        """
        write_text(folder / INDEX, _text(self))


def read_index(folder: Path) -> Index:
    """Read the index of a shard set, and check it.

    Raises:
        Error: There is none, or it is damaged, or of another version.
    """
    file = folder / INDEX
    try:
        content = read_regular(file, INDEX_BYTES)
    except OSError as error:
        raise Error(
            f"{folder} is not a shard set: {INDEX} cannot be read ({error.strerror}).",
            hint="make one with `hpctrain data import SRC DST` or `hpctrain data adopt`.",
        ) from error
    with _uncollected():
        return _checked(file, content)


def _checked(file: Path, content: bytes) -> Index:
    try:
        tree = json.loads(content)
        if tree["format"] != FORMAT:
            raise ValueError(f"its format is {tree['format']!r}")
        version = tree["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if isinstance(version, int) and version > VERSION:
        raise Error(
            f"{file} is of version {version}; this hpctrain reads {VERSION}.",
            hint="update hpctrain, or import the data again.",
        )
    start = content.rfind(b' "sha256": "')
    digest = hashlib.sha256(content[:start]).hexdigest()
    if content[start:] != _last_line(digest).encode():
        raise _damaged(file, "it differs from its own checksum")
    try:
        return _parse(tree)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which would look through all entries each time some are added."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _damaged(file: Path, why: str) -> Error:
    return Error(f"{file} is damaged: {why}.", hint="import the data again, or restore the index.")


def _parse(tree: dict[str, Any]) -> Index:
    if tree["version"] != VERSION:
        raise ValueError(f"its version is {tree['version']!r}")
    fields = {
        str(name): FieldSpec(spec["dtype"], tuple(spec["shape"]), spec["ragged"] is True)
        for name, spec in tree["fields"].items()
    }
    for name, field_spec in fields.items():
        _check_spec(name, field_spec)
    splits = {}
    for name, split in tree["splits"].items():
        shards = [ShardEntry(**shard) for shard in split["shards"]]
        for shard in shards:
            _check_entry(shard)
        datasets = dict(split["datasets"])
        if missing := [field for field in fields if not isinstance(datasets.get(field), str)]:
            raise ValueError(f"split '{name}' does not say where {missing[0]} is")
        splits[name] = SplitEntry(datasets, shards)
    attributes = tree["attributes"]
    if not isinstance(attributes, dict):
        raise TypeError("its attributes are no object")
    adopted = tree.get("adopted", 0)
    return Index(fields, splits, attributes, _count(tree["chunk_samples"]), _count(adopted))


def _check_spec(name: str, spec: FieldSpec) -> None:
    for length in spec.shape:
        _count(length)
    # Bytes of a file that were taken for Python objects would be taken for addresses.
    if not isinstance(spec.dtype, str) or spec.kind.kind not in "biufc" or spec.kind.subdtype:
        raise ValueError(f"{name} is of type {spec.dtype!r}")


def _check_entry(shard: ShardEntry) -> None:
    strings = (shard.path, shard.sha256, shard.head_sha256)
    if not all(isinstance(text, str) for text in strings):
        raise TypeError(f"shard {shard.path!r}")
    if b"\0" in os.fsencode(shard.path):  # which fails for half a character
        raise ValueError(f"shard {shard.path!r}")
    for number in (shard.samples, shard.bytes, *shard.offsets.values()):
        _count(number)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(index: Index) -> str:
    parts = [
        "{\n",
        f' "format": "{FORMAT}",\n "version": {VERSION},\n',
        f' "fields": {json.dumps({k: asdict(v) for k, v in index.fields.items()})},\n',
        f' "chunk_samples": {index.chunk_samples},\n',
        f' "attributes": {json.dumps(index.attributes)},\n',
        f' "adopted": {index.adopted},\n' if index.adopted else "",
        ' "splits": {',
    ]
    for number, (name, split) in enumerate(index.splits.items()):
        samples = sum(shard.samples for shard in split.shards)
        lines = ",\n".join("   " + json.dumps(shard._asdict()) for shard in split.shards)
        parts.append(
            f'{"," if number else ""}\n  {json.dumps(name)}: {{\n   "samples": {samples},\n'
            f'   "datasets": {json.dumps(split.datasets)},\n   "shards": [\n{lines}\n  ]}}'
        )
    parts.append("\n },\n")
    text = "".join(parts)
    return text + _last_line(hashlib.sha256(text.encode()).hexdigest())


def _last_line(digest: str) -> str:
    return f' "sha256": "{digest}"\n}}\n'


def first_samples(shards: list[ShardEntry]) -> list[int]:
    """Return the number of each shard's first sample in its split, and at the end their count."""
    return list(accumulate((shard.samples for shard in shards), initial=0))
