"""Taking existing HDF5 files as a shard set where they are: an index is written, nothing copied."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py

from hpctrain.data.index import FieldSpec, Index, SplitEntry
from hpctrain.data.shards import ShardSet
from hpctrain.data.splits import split_and_field, split_in_name
from hpctrain.data.writer import entry_of, prepare, writing
from hpctrain.errors import Error
from hpctrain.files import sha256
from hpctrain.process import cores
from hpctrain.progress import progress

# What is decompressed at a time: chunks of a sample each would cost more to find than to read.
BLOCK_BYTES = 64 * 2**10
MOST_ROWS = 2**16


def adopt(
    sources: Sequence[Path],
    folder: Path,
    *,
    fields: tuple[str, ...] = (),
    checksums: bool = True,
) -> ShardSet:
    """Write an index for HDF5 files, each a shard of one split or of several.

    Datasets of one file with as many rows are the fields of its samples. A split is told by the
    dataset's name (``train_x``, ``x_test``, ``train/x``), or else by the file's; else it is
    ``train``.

    Args:
        sources: Files, or folders of files ``*.h5`` and ``*.hdf5``.
        folder: Where to put the index. The files are noted relative to it.
        fields: Datasets to take; none: all that hold numbers.
        checksums: Read every file once, so that `verify` can tell whether it has changed.

    Raises:
        Error: A file cannot be used, files differ in what they hold, or the index cannot be
            written.
    """
    files = [file for source in sources for file in _files(source)]
    prepare(folder)
    index = Index({}, {})
    chunks: set[int] = set()
    for file in progress(files, what="files", total=len(files)):
        _add(index, file, folder, fields, chunks)
    index.chunk_samples = _block(chunks, index.fields)
    if checksums:
        _checksums(index, folder)
    with writing(folder):
        index.write(folder)
    return ShardSet(folder)


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(file for kind in ("*.h5", "*.hdf5") for file in source.rglob(kind))
        if not found:
            raise Error(f"{source} holds no *.h5 or *.hdf5 files.", hint="check the path.")
        return found
    if not source.exists():
        raise Error(f"{source} does not exist.", hint="check the path.")
    return [source]


def _add(index: Index, path: Path, folder: Path, only: tuple[str, ...], chunks: set[int]) -> None:
    try:
        with h5py.File(path, "r", locking=False) as file:
            for named, datasets in _datasets(file, path, only).items():
                split = named or split_in_name(path.stem) or "train"
                found = {field: file[name] for field, name in datasets.items()}
                specs = {f: FieldSpec(d.dtype.str, tuple(d.shape[1:])) for f, d in found.items()}
                index.fields = index.fields or specs
                entry = index.splits.setdefault(split, SplitEntry(datasets))
                if specs != index.fields or datasets != entry.datasets:
                    raise Error(
                        f"{path} holds {_listing(specs)}, others hold {_listing(index.fields)}.",
                        hint="files of a set must have the same datasets; --fields picks some.",
                    )
                offsets = {}
                for dataset in found.values():
                    offset = dataset.id.get_offset() if dataset.chunks is None else None
                    if offset is not None:
                        offsets[dataset.name.lstrip("/")] = int(offset)
                    elif dataset.size:
                        chunks.add(int(dataset.chunks[0]) if dataset.chunks else 1)
                samples = next(iter(found.values())).shape[0]
                shard = entry_of(path, samples, offsets, digest=False)
                place = os.path.relpath(path, folder)
                entry.shards.append(shard._replace(path=place))
    except OSError as error:
        raise Error(
            f"{path} cannot be read as HDF5: {error}.", hint="is it an HDF5 file, and whole?"
        ) from error


def _datasets(file: h5py.File, path: Path, only: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    """Split -> field -> dataset of a file; split ``""`` where names tell none.

    Args:
        file: Open.
        path: Of it, for errors.
        only: Datasets to look at; none: all.

    Raises:
        Error: There are none, or those of a split differ in length, or one cannot be used.
    """
    found: dict[str, dict[str, str]] = {}
    lengths: dict[str, dict[str, int]] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or (only and name not in only):
            return
        if item.ndim == 0:
            if only:
                raise Error(f"{path}: {name} is a single value.", hint="name others in --fields.")
            return
        if item.dtype.kind not in "biufc":
            raise Error(
                f"{path}: {name} is of type {item.dtype}, which cannot be trained on as it is.",
                hint="leave it out with --fields.",
            )
        if item.is_virtual or item.external:
            # HDF5 reads zeros, without a word, where such a dataset's other files are missing.
            raise Error(
                f"{path}: {name} is put together from other files.", hint="adopt those files."
            )
        split, field = split_and_field(name)
        found.setdefault(split, {})[field] = name
        lengths.setdefault(split, {})[name] = item.shape[0]

    file.visititems(visit)
    missing = [name for name in only if not any(name in names for names in lengths.values())]
    if missing or not found:
        what = f"no dataset {missing[0]}" if missing else "no datasets with samples"
        raise Error(f"{path} holds {what}.", hint="`h5ls -r` lists what it holds.")
    for names in lengths.values():
        if len(set(names.values())) > 1:
            listing = ", ".join(f"{name} {length}" for name, length in names.items())
            raise Error(
                f"{path}: datasets differ in length: {listing}.",
                hint="one row a sample; name those that belong together in --fields a,b.",
            )
    return found


def _block(chunks: set[int], fields: dict[str, FieldSpec]) -> int:
    """Samples to decompress at a time: whole chunks of every dataset, if that is not too many."""
    if not chunks:
        return 0
    rows = math.lcm(*chunks)
    if rows > MOST_ROWS:
        rows = max(chunks)
    largest = max(1, *(spec.row_bytes for spec in fields.values()))
    return int(rows * max(1, -(-BLOCK_BYTES // (largest * rows))))


def _checksums(index: Index, folder: Path) -> None:

    paths = list({shard.path: None for _, _, shard in index.shards()})
    with ThreadPoolExecutor(cores()) as pool:
        digests = pool.map(lambda path: sha256(folder / path), paths)
        found = dict(progress(zip(paths, digests, strict=True), what="files", total=len(paths)))
    for split in index.splits.values():
        split.shards = [shard._replace(sha256=found[shard.path]) for shard in split.shards]


def _listing(fields: dict[str, FieldSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in fields.items())
