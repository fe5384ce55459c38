"""Check every byte of a shard set against its checksums, and say what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpctrain.data.chunks import BadShard
from hpctrain.data.fields import field
from hpctrain.data.hdf5 import Unusable, mapped_offset, open_file, spec_of_dataset
from hpctrain.data.index import FieldSpec, Index, ShardEntry, SplitEntry, read_index
from hpctrain.data.progress import progress
from hpctrain.data.shards import check
from hpctrain.files import sha256
from hpctrain.process import cores

ROWS = 4096
READ_BYTES = 2**24


@dataclass(frozen=True)
class Verdict:
    """A shard that is not as it should be, and why.

    Attributes:
        path: Of the file.
        split: It belongs to.
        samples: In it, all of which are in doubt.
        reason: One line; names the dataset where one can be told.
    """

    path: Path
    split: str
    samples: int
    reason: str


def verify(folder: Path, *, threads: int | None = None) -> list[Verdict]:
    """Read all shards of a set and compare them with the index.

    Args:
        folder: Of the shard set.
        threads: Shards read at a time; None: one on each core.

    Returns:
        What is wrong, in the index's order; nothing where all is well.

    Raises:
        Error: The index is missing or damaged.
    """
    index = read_index(folder)
    verdicts = []
    shards = list(index.shards())
    with ThreadPoolExecutor(threads or cores()) as pool:
        reasons = pool.map(lambda item: examine(folder, index, item[1], item[2]), shards)
        found = progress(zip(shards, reasons, strict=True), what="shards", total=len(shards))
        for (name, _, shard), reason in found:
            if reason:
                verdicts.append(Verdict(folder / shard.path, name, shard.samples, reason))
    return verdicts


def examine(folder: Path, index: Index, split: SplitEntry, shard: ShardEntry) -> str:
    """Say what is wrong with one shard; empty where nothing is.

    Args:
        folder: Of the shard set.
        index: Of the set.
        split: That the shard is of.
        shard: Its entry in the index.
    """
    path = folder / shard.path
    try:
        check(path, shard)
        if shard.sha256 and sha256(path) != shard.sha256:
            return f"its bytes differ from the index's checksum: {_difference(path, index, split)}"
        return _schema(path, index, split, shard) or _unreadable(path, index, split, shard)
    except BadShard as error:
        detail = _difference(path, index, split) if path.exists() else ""
        return f"{error.message} {detail}".strip()
    except OSError as error:
        return f"it cannot be read: {error}."


def _schema(path: Path, index: Index, split: SplitEntry, shard: ShardEntry) -> str:
    """Whether the datasets are what and where the index says."""
    try:
        with open_file(path) as file:
            for column, spec in index.fields.items():
                name = split.datasets[column]
                if spec.ragged and f"{name}/values" in shard.offsets:
                    parts, flat = [f"{name}/values", f"{name}/offsets"], replace(spec, ragged=False)
                else:
                    parts, flat = [name], spec
                for part in parts:
                    dataset = file[part]
                    if not isinstance(dataset, h5py.Dataset):
                        return f"{part} is no dataset."
                    offset = shard.offsets.get(part)
                    if offset is None or not dataset.size:
                        continue
                    found = flat if part == parts[0] else FieldSpec("<i8")
                    if mapped_offset(dataset, path, found) != offset:
                        return f"{part} is not where the index says."
                rows = file[parts[-1]].shape[0] - (len(parts) - 1)
                try:
                    held = spec_of_dataset(file[parts[0]])
                except Unusable as error:
                    return f"{name} {error}, but the index says {spec}."
                if rows < shard.samples or held != flat:
                    return f"{name} is {held} with {rows} rows, but the index says {spec}."
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        return f"it is not the HDF5 file the index describes: {_line(error)}."
    return ""


def _unreadable(path: Path, index: Index, split: SplitEntry, shard: ShardEntry) -> str:
    """What training could not read of a file that others wrote, and may have written badly."""
    if not index.adopted:
        return ""
    numbers = np.arange(ROWS)
    for name, spec in index.fields.items():
        reader = field(split.datasets[name], spec, [shard], compared=True)
        try:
            reader.open(0, path, shard)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            return f"{name} cannot be opened: {_line(error)}."
        rows = max(1, min(ROWS, READ_BYTES // max(1, spec.row_bytes)))
        for start in range(0, shard.samples, rows):
            local = start + numbers[: min(rows, shard.samples - start)]
            reader.take(np.zeros(len(local), dtype=np.int64), local, np.empty)
    return ""


def _difference(path: Path, index: Index, split: SplitEntry) -> str:
    """Which datasets of a file do not match the checksums kept in it, as far as can be told."""
    wrong = []
    try:
        with open_file(path) as file:
            for column, spec in index.fields.items():
                name = split.datasets[column]
                for part in [f"{name}/values", f"{name}/offsets"] if spec.ragged else [name]:
                    wrong += list(_dataset_difference(file, part, spec.kind, spec.ragged))
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        return f"as an HDF5 file it cannot be opened: {_line(error)}."
    if wrong:
        return "; ".join(wrong) + "."
    return "the samples match the checksums kept beside them, the rest of the file does not."


def _dataset_difference(file: h5py.File, name: str, kind: Any, ragged: bool) -> Iterator[str]:
    try:
        dataset = file[name]
        expected = dataset.attrs.get("sha256")
        if dataset.dtype != kind and not (ragged and name.endswith("/offsets")):
            yield f"{name} is {dataset.dtype}, but the index says {kind}"
        elif isinstance(expected, str):
            digest = hashlib.sha256()
            for start in range(0, dataset.shape[0], ROWS):
                digest.update(np.ascontiguousarray(dataset[start : start + ROWS]).data)
            if digest.hexdigest() != expected:
                yield f"{name} has changed"
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        yield f"{name} cannot be read ({_line(error)})"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
