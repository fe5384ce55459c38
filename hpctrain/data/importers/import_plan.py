"""Plan an import: what was found in a source, and which of it makes which shard.

Both are functions of the source and the options alone, never of how many ranks there are. So any
number of ranks writes the same bytes, and an interrupted import goes on where it was.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.folder_tree import Tree, walk
from hpctrain.data.index import FieldSpec
from hpctrain.data.order import EpochOrder
from hpctrain.data.summary import Found
from hpctrain.data.writer import Column, Compression, Ragged, chunk_samples, shard_name
from hpctrain.errors import Error

LEAST_SHARD_BYTES, MOST_SHARD_BYTES = 16 * 2**20, 2**30
SHARDS = 64
"""Of a set whose shards are between the two: enough for many ranks, few enough for file systems."""
BLOCK_BYTES = 4 * 2**20
"""What is read at a stretch, about."""

Classes = Literal["first", "last", "path", "none"]
Pixels = Literal["rgb", "gray", "keep"]

Columns = dict[str, Column]
Items = NDArray[np.int64]


@dataclass(frozen=True)
class ImportOptions:
    """How to import a source.

    Attributes:
        shard_bytes: About the size of a shard; None: a 64th of the whole, within 16 MiB and 1 GiB.
        compression: ``none``, ``lz4`` or ``zstd``.
        resize: Height and width that images are scaled to; None: they must be of one size.
        validation_fraction: Part of the samples that become the split ``validation`` where the
            data have no splits of their own.
        sequence_length: Characters a text sample predicts; it holds one more.
        seed: Chooses the validation samples.
        keep_encoded: Images are stored as the bytes of their files, and decoded while training.
        kind: What the source is: images, webdataset, tables, text, or an importer's name or place;
            None: as its content says.
        fields: Arrays, datasets, columns or members to take; none: all that can be.
        names_tell_splits: Whether words such as ``train`` in names say to which split samples go.
        classes: Which folder names an image's class: the first below the split, the last, all of
            them (``cat/young``), or none; None: the only one there is.
        pixels: What images become: three channels or one of 8 bits, or as they are.
        delimiter: Between the columns of a CSV; None: a comma, or a tab in a ``.tsv``.
        header: Whether the first line of a CSV names its columns; None: if it looks like names.
        decimal: The decimal mark of a CSV's numbers.
        missing: What stands for missing whole numbers: a number, or ``nan``, which makes floats of
            them; None: they are refused. Missing floats are NaN.
    """

    shard_bytes: int | None = None
    compression: Compression = "none"
    resize: int | None = None
    validation_fraction: float = 0.1
    sequence_length: int = 128
    seed: int = 0
    keep_encoded: bool = False
    kind: str | None = None
    fields: tuple[str, ...] = ()
    names_tell_splits: bool = True
    classes: Classes | None = None
    pixels: Pixels = "rgb"
    delimiter: str | None = None
    header: bool | None = None
    decimal: str = "."
    missing: str | None = None

    def __post_init__(self) -> None:
        if self.keep_encoded and self.resize is not None:
            raise Error(
                "images that are kept encoded cannot be resized.",
                hint="give one of --keep-encoded and --resize; transforms can resize in training.",
            )
        for name, mark in (("delimiter", self.delimiter), ("decimal", self.decimal)):
            if mark is not None and (len(mark) != 1 or not mark.isascii() or mark in '"\r\n'):
                raise Error(f"--{name} {mark!r} is not one character.", hint="such as ; or ,")
        if self.missing not in (None, "nan") and not re.fullmatch(r"-?\d{1,18}", self.missing):
            raise Error(
                f"--missing {self.missing} is neither a whole number nor nan.",
                hint="it stands for missing whole numbers: --missing=-1, or nan for floats.",
            )


@dataclass(frozen=True)
class Survey:
    """What was found in a source. One rank surveys it; all ranks get this, as JSON.

    Attributes:
        runs: Split and number of samples, run by run, in the source's own order; the split is ""
            where the source says nothing of it.
        fields: Of a sample.
        bytes: Of all samples, about.
        attributes: Kept in the index.
        details: What the importer needs to read them.
        found: For the summary; no rank but the one that looks needs it.
    """

    runs: list[tuple[str, int]]
    fields: dict[str, FieldSpec]
    bytes: int
    attributes: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    found: Found = field(default_factory=lambda: Found(""))

    def tree(self) -> dict[str, Any]:
        """Return the survey as JSON-able values; :meth:`of` makes a survey of them again."""
        fields = {name: asdict(spec) for name, spec in self.fields.items()}
        tree = {**vars(self), "fields": fields}
        del tree["found"]
        return tree

    def summary(self, options: ImportOptions) -> list[str]:
        """Return the lines of the summary that is shown."""
        splits = {split: len(items) for split, items in _splits(self, options).items()}
        return self.found.lines(self.fields, splits)

    @staticmethod
    def of(tree: Mapping[str, Any]) -> Survey:
        """Make a survey of what :meth:`tree` returned."""
        fields = {
            name: FieldSpec(spec["dtype"], tuple(spec["shape"]), spec["ragged"])
            for name, spec in tree["fields"].items()
        }
        runs = [(split, count) for split, count in tree["runs"]]
        return Survey(runs, fields, tree["bytes"], tree["attributes"], tree["details"])


class Importer(ABC):
    """Reads one kind of source; derive a class from this to add one.

    Args:
        path: The source.
        options: How to import it.
        kind: By which other ranks know what reads it.
        tree: What is below the source, if it is a folder and has been looked through.
    """

    what = "samples"

    def __init__(
        self, path: Path, options: ImportOptions, kind: str = "", tree: Tree | None = None
    ) -> None:
        self.path = path
        self.options = options
        self.kind = kind
        self._tree = tree

    @cached_property
    def tree(self) -> Tree:
        """What is below the source, which is a folder."""
        return self._tree or walk(self.path)

    @classmethod
    def claims(cls, path: Path) -> bool:
        """Whether this reads such a source, where nothing says what it is.

        Asked of importers that other packages declare by entry points of ``hpctrain.importers``.

        Args:
            path: A file or folder that is there.
        """
        return False

    @abstractmethod
    def survey(self) -> Survey:
        """Look the source over, reading as little of it as will do.

        Raises:
            Error: It holds no samples, or something that cannot be imported.
        """

    @abstractmethod
    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Yield the samples of these numbers, in this order, any number of them at a time.

        Args:
            survey: As found.
            items: Numbers in the source's own order, rising: one pass through the source does.

        Raises:
            Error: Something in the source cannot be read.
        """


def runs_of(splits: Iterable[str]) -> list[tuple[str, int]]:
    """Return the runs of a :class:`Survey` from each sample's split."""
    return [(split, sum(1 for _ in run)) for split, run in groupby(splits)]


def stamp(*paths: Path) -> list[list[Any]]:
    """Return what tells files from what they were before: place, bytes, and time of change."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def blocks(items: Items, rows: int) -> Iterator[Items]:
    """Cut the items so that each part lies within as many rows of the source.

    Args:
        items: Numbers of samples, rising.
        rows: How many rows of the source a part may reach over.
    """
    position = 0
    while position < len(items):
        end = int(np.searchsorted(items, items[position] + rows))
        yield items[position:end]
        position = end


@dataclass(frozen=True)
class Shard:
    """A shard to be made, and the samples of the source that it gets.

    Attributes:
        split: It belongs to.
        number: In the split.
        items: Its samples' numbers in the source.
    """

    split: str
    number: int
    items: Items

    @property
    def name(self) -> str:
        """The name of its file."""
        return shard_name(self.split, self.number)


def layout(survey: Survey, options: ImportOptions) -> list[Shard]:
    """Plan all shards, in order; those of a split are as large as each other.

    Args:
        survey: What was found.
        options: Size of shards, compression, and the split for validation.
    """
    total = sum(count for _, count in survey.runs)
    target = options.shard_bytes or min(
        MOST_SHARD_BYTES, max(LEAST_SHARD_BYTES, survey.bytes // SHARDS)
    )
    most = max(1, target * total // max(1, survey.bytes))
    shards = []
    for split, items in _splits(survey, options).items():
        size = -(-len(items) // -(-len(items) // most))
        if options.compression != "none":
            chunk = chunk_samples(survey.fields)
            size = -(-size // chunk) * chunk
        shards += [
            Shard(split, number, items[start : start + size])
            for number, start in enumerate(range(0, len(items), size))
        ]
    return shards


def _splits(survey: Survey, options: ImportOptions) -> dict[str, Items]:
    """Split -> its samples."""
    parts: dict[str, list[Items]] = {}
    first = 0
    for split, count in survey.runs:
        if not count:
            continue
        parts.setdefault(split, []).append(np.arange(first, first + count, dtype=np.int64))
        first += count
    if set(parts) == {""}:
        held = held_out(first, options)
        found = {"train": np.flatnonzero(~held), "validation": np.flatnonzero(held)}
    else:
        parts["train"] = sorted(
            [*parts.get("train", []), *parts.pop("", [])], key=lambda run: int(run[0])
        )
        found = {split: np.concatenate([np.empty(0, int), *runs]) for split, runs in parts.items()}
    return {split: items for split, items in found.items() if len(items)}


def held_out(samples: int, options: ImportOptions) -> NDArray[np.bool_]:
    """Choose which samples become the validation split.

    Args:
        samples: How many there are.
        options: Their ``validation_fraction``, and the seed by which they are drawn.

    Returns:
        Shape (samples,): true for those of the validation split.
    """
    held = np.zeros(samples, dtype=bool)
    count = round(samples * options.validation_fraction)
    held[EpochOrder(samples, options.seed, epoch=0).indices(np.arange(count, dtype=np.uint64))] = 1
    return held


def pick(column: Column, rows: NDArray[np.bool_]) -> Column:
    """Select some samples of a column.

    Args:
        column: Of all samples.
        rows: Shape (samples,): which to take.
    """
    if not isinstance(column, Ragged):
        return column[rows]
    lengths = np.diff(column.offsets)
    offsets = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64)
    inner = slice(int(column.offsets[0]), int(column.offsets[-1]))
    return Ragged(column.values[inner][np.repeat(rows, lengths)], offsets)
