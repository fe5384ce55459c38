"""Adopt existing HDF5 files as a shard set where they are: an index is written, nothing copied."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py

from hpctrain.data.chunks import CACHE_BYTES, block_rows
from hpctrain.data.fields import SEQUENCES, is_mapped
from hpctrain.data.folder_tree import walk
from hpctrain.data.hdf5 import (
    Unusable,
    aside,
    datasets,
    locate,
    mapped_offset,
    open_file,
    own_bytes,
    spec_of_dataset,
)
from hpctrain.data.index import FieldSpec, Index, SplitEntry
from hpctrain.data.progress import progress
from hpctrain.data.shards import ShardSet
from hpctrain.data.source import check_names
from hpctrain.data.splits import listing, splits_of_files, tell
from hpctrain.data.summary import MOST_COUNTED, Found, count_classes, is_class_field
from hpctrain.data.writer import entry_of, prepare, writing
from hpctrain.errors import Error
from hpctrain.files import sha256
from hpctrain.process import cores

MOST_LABELS = 2**26
"""Of a file, to be counted."""


def adopt(
    sources: Sequence[Path],
    folder: Path,
    *,
    fields: tuple[str, ...] = (),
    checksums: bool = True,
    names_tell_splits: bool = True,
    say: Callable[[str], None] | None = None,
) -> ShardSet:
    """Write an index for HDF5 files, each a shard of one split or of several.

    Datasets of one file with as many rows are the fields of its samples. A split is told by the
    dataset's name (``train_x``, ``x_test``, ``train/x``), or else by the file's, or a folder's;
    else it is ``train``; :mod:`hpctrain.data.splits` has the rule. Text, and HDF5's rows of varying
    length, are ragged fields.

    Args:
        sources: Files, or folders of files ``*.h5`` and ``*.hdf5``.
        folder: Where to put the index. The files are noted relative to it.
        fields: Datasets to take, or links to them within a file's folder; none: all datasets.
        checksums: Read every file once, so that `verify` can tell whether it has changed.
        names_tell_splits: Whether names tell splits at all.
        say: Gets the lines of the summary: what was taken for what, what was left out, and what
            reading the set will cost.

    Raises:
        Error: A file cannot be used, files differ in what they hold, or the index cannot be
            written.
    """
    prepare(folder)
    adoption = _adopted(sources, folder, fields, names_tell_splits)
    if say is not None:
        for line in adoption.summary():
            say(line)
    index = adoption.index
    if checksums:
        _checksums(index, folder)
    with writing(folder):
        index.write(folder)
    return ShardSet(folder)


def look(
    sources: Sequence[Path],
    *,
    fields: tuple[str, ...] = (),
    names_tell_splits: bool = True,
) -> list[str]:
    """Return the summary of HDF5 files that adopting them would begin with; nothing is written.

    Args:
        sources: As of :func:`adopt`.
        fields: Datasets to take.
        names_tell_splits: Whether names tell splits at all.

    Raises:
        Error: They could not be adopted.
    """
    return _adopted(sources, Path(), fields, names_tell_splits).summary()


def _adopted(
    sources: Sequence[Path], folder: Path, fields: tuple[str, ...], told: bool
) -> _Adoption:
    found = Found("HDF5 files, used where they are, a row a sample")
    named = [pair for source in sources for pair in _files(source, found)]
    splits = splits_of_files([name for _, name in named], str(sources[0]), told=told)
    adoption = _Adoption(folder, fields, found, told)
    files = zip(named, splits, strict=True)
    for (file, _), split in progress(files, what="files", total=len(named)):
        try:
            adoption.add(file, split or "train")
        except OSError as error:
            raise Error(
                f"{file} cannot be read as HDF5: {_line(error)}.",
                hint="is it an HDF5 file, and whole? If it was left open by a program that died, "
                "`h5clear -s FILE` mends it.",
            ) from error
    if not any(shard.samples for _, _, shard in adoption.index.shards()):
        raise Error(f"{named[0][0]} holds no samples.", hint="its datasets have 0 rows.")
    adoption.index.chunk_samples = adoption.block()
    return adoption


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _files(source: Path, found: Found) -> list[tuple[Path, str]]:
    """Files, and what their names say below the source."""
    if not source.is_dir():
        if not source.exists():
            raise Error(f"{source} does not exist.", hint="check the path.")
        return [(source, source.name)]
    tree = walk(source)
    for why, name in tree.left_out:
        found.leave(why, name)
    files = [(source / name, name) for name in tree.files if name.endswith((".h5", ".hdf5"))]
    for name in tree.files:
        if not name.endswith((".h5", ".hdf5")):
            found.leave("file that is no *.h5 or *.hdf5", name)
    if not files:
        raise Error(f"{source} holds no *.h5 or *.hdf5 files.", hint="check the path.")
    return sorted(files)


class _Adoption:
    """An index in the making.

    Attributes:
        index: So far.

    Args:
        folder: Of the index.
        only: Datasets to take; none: all.
        found: Where to note what was seen.
        told: Whether names tell splits.
    """

    def __init__(self, folder: Path, only: tuple[str, ...], found: Found, told: bool) -> None:
        self.index = Index({}, {}, adopted=1)
        self._folder = folder.resolve()
        self._only = only
        self._found = found
        self._told = told
        self._left_out: dict[str, str] = {}
        self._classes: Counter[int] = Counter()
        # By field that is read in blocks: rows of the largest.
        self._blocks: dict[str, int] = {}

    def add(self, path: Path, split: str) -> None:
        """Take a file, or the one that all names lead to.

        Args:
            path: The file.
            split: Of its samples, where no name in it tells one.

        Raises:
            Error: It cannot be used.
            OSError: It cannot be opened.
        """
        home, named = self._named(path)
        with open_file(home) as file:
            specs = self._specs(file, path, named)
            told = self._tell(specs, file, named, path)
            for named_split, fields in told.items():
                found = {field: specs[name] for field, name in fields.items()}
                places = {field: named[name] for field, name in fields.items()}
                self.index.fields = self.index.fields or found
                entry = self.index.splits.setdefault(named_split or split, SplitEntry(places))
                if found != self.index.fields or places != entry.datasets:
                    raise Error(
                        f"{path} holds {listing(found)}, others hold {listing(self.index.fields)}.",
                        hint="files of a set must have the same datasets; --fields picks some.",
                    )
                offsets = {}
                for field, place in places.items():
                    dataset, spec = file[place], found[field]
                    few = dataset.shape[0] <= MOST_LABELS and len(self._classes) <= MOST_COUNTED
                    if few and is_class_field(field, spec):
                        self._classes.update(count_classes(dataset[()]))
                    offset = mapped_offset(dataset, home, spec)
                    if offset is not None:
                        offsets[place] = offset
                    elif dataset.size:
                        rows = SEQUENCES if spec.ragged else block_rows(dataset, spec.row_bytes)
                        self._blocks[field] = max(rows, self._blocks.get(field, 0))
                samples = file[next(iter(places.values()))].shape[0]
                shard = entry_of(home, samples, offsets, digest=False)
                # Relative paths are made of real ones: `..` leads out of a link's target.
                place = os.path.relpath(home.resolve(), self._folder)
                entry.shards.append(shard._replace(path=place))

    def _named(self, path: Path) -> tuple[Path, dict[str, str]]:
        """Return the file that holds the data, and the datasets to look at: name -> place in it."""
        if not self._only:
            with open_file(path) as file:
                names, others = datasets(file)
            self._left_out |= others
            if not names:
                hint = "`h5ls -r` lists what it holds."
                if others:
                    hint = f"it has {next(iter(others.values()))}: adopt such files, or --fields."
                raise Error(f"{path} holds no datasets.", hint=hint)
            return path, {name: name for name in names}
        found = {name: locate(path, name) for name in self._only}
        homes = {home.resolve(): home for home, _ in found.values()}
        if len(homes) > 1:
            listing = ", ".join(f"{name} in {home}" for name, (home, _) in found.items())
            raise Error(
                f"{path}: its fields are in different files: {listing}.",
                hint="`hpctrain data import` copies them together.",
            )
        return next(iter(homes.values())), {name: place for name, (_, place) in found.items()}

    def _specs(self, file: h5py.File, path: Path, named: dict[str, str]) -> dict[str, FieldSpec]:
        specs: dict[str, FieldSpec] = {}
        unusable: dict[str, str] = {}
        for name, place in named.items():
            dataset = file[place]
            if not self._only and (why := aside(dataset)):
                self._left_out[name] = why
                continue
            if not own_bytes(dataset):
                # HDF5 reads zeros, without a word, where such a dataset's other files are missing.
                raise Error(
                    f"{path}: {name} is put together from other files.", hint="adopt those files."
                )
            try:
                specs[name] = spec_of_dataset(dataset)
            except Unusable as error:
                unusable[name] = str(error)
        if unusable:
            name, why = next(iter(unusable.items()))
            hint = f"leave it out: --fields {','.join(specs)}" if specs else "name others: --fields"
            raise Error(f"{path}: {name} {why}.", hint=f"{hint}.")
        if not specs:
            raise Error(
                f"{path} holds no datasets with samples.", hint="`h5ls -r` lists what it holds."
            )
        return specs

    def block(self) -> int:
        """Samples of a block of the epoch order: those of the field that is largest.

        Of smaller fields more is decompressed than a block needs, and kept.
        """
        if not self._blocks:
            return 0
        fields = self.index.fields
        return self._blocks[max(self._blocks, key=lambda field: fields[field].row_bytes)]

    def _tell(
        self, specs: dict[str, FieldSpec], file: h5py.File, named: dict[str, str], path: Path
    ) -> dict[str, dict[str, str]]:
        """Split -> field -> name; split ``""`` where names tell none."""
        arrays = {name: (int(file[named[name]].shape[0]), spec) for name, spec in specs.items()}
        told = tell(arrays, str(path), told=self._told, chosen=bool(self._only))
        self._left_out |= told.left_out
        for fields in told.splits.values():
            check_names(fields, str(path))
        return told.splits

    def summary(self) -> list[str]:
        """Return the lines of the summary."""
        for name, why in self._left_out.items():
            self._found.leave(f"dataset ({why})", name)
        if len(self._classes) <= MOST_COUNTED:
            counts = {str(number): self._classes[number] for number in sorted(self._classes)}
            self._found.classes = counts
        self._found.notes += self._notes()
        splits = {
            split: sum(shard.samples for shard in entry.shards)
            for split, entry in self.index.splits.items()
        }
        return self._found.lines(self.index.fields, splits)

    def _notes(self) -> list[str]:
        """What an epoch will decompress."""
        notes = []
        block = self.block()
        for split, entry in self.index.splits.items():
            samples = sum(shard.samples for shard in entry.shards)
            total, needed = 0, 0
            for field, spec in self.index.fields.items():
                if spec.ragged or is_mapped(entry.datasets[field], entry.shards):
                    continue
                size = samples * spec.row_bytes
                again = -(-self._blocks.get(field, 1) // block) if size > CACHE_BYTES else 1
                total, needed = total + size * again, needed + size
            if total:
                times = f", {total / needed:.1f} times the data" if total > needed else ""
                notes.append(
                    f"{split}: an epoch reads {total / 1e9:,.3g} GB of samples in chunks{times}, "
                    f"{block} samples at a time; `hpctrain data import` makes shards to be mapped."
                )
        return notes


def _checksums(index: Index, folder: Path) -> None:
    paths = list({shard.path: None for _, _, shard in index.shards()})
    with ThreadPoolExecutor(cores()) as pool:
        digests = pool.map(lambda path: sha256(folder / path), paths)
        found = dict(progress(zip(paths, digests, strict=True), what="files", total=len(paths)))
    for split in index.splits.values():
        split.shards = [shard._replace(sha256=found[shard.path]) for shard in split.shards]
