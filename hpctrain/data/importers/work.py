"""Do an import: each rank makes its part of the shards, rank 0 the index.

What is finished is on record in ``.import`` inside the shard set to be, and not made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.importers.import_plan import (
    Columns,
    Importer,
    ImportOptions,
    Shard,
    Survey,
    layout,
    pick,
)
from hpctrain.data.importers.ranks import Ranks, put
from hpctrain.data.importers.tar import reading
from hpctrain.data.index import INDEX, Index, ShardEntry, SplitEntry
from hpctrain.data.progress import progress
from hpctrain.data.writer import (
    Ragged,
    check_columns,
    check_storable_names,
    datasets_of,
    join,
    prepare,
    write_index,
    write_shard,
    writing,
)
from hpctrain.errors import Error
from hpctrain.world.launcher import Launch

FOLDER = ".import"
VERSION = 2
"""Of what decides the bytes of an import; one that another version began is not gone on with."""
MOST_TICKS = 100_000


def make(
    open_as: Callable[[str | None], Importer],
    source: Path,
    destination: Path,
    launch: Launch,
    say: Callable[[str], None] | None = None,
) -> Index | None:
    """Import with all ranks, and return the index on rank 0, None on others.

    Args:
        open_as: Gives what reads the source as a kind; asked for None, it looks of what kind it is.
        source: What is read.
        destination: The shard set to be.
        launch: This rank.
        say: Gets the lines of the summary, on rank 0.

    Raises:
        Error: Something cannot be read or written, here or on another rank; no index is written.
    """
    folder = destination / FOLDER
    prepare(destination)
    with reading(source), Ranks(folder, launch) as ranks:
        if launch.rank > 0:
            begun = ranks.receive()
            importer, todo = open_as(begun["kind"]), begun["todo"]
            survey = Survey.of(_stored(folder)["survey"])
            shards = layout(survey, importer.options)
        else:
            importer = open_as(None)
            survey = _begin(importer, destination)
            if say is not None:
                deque(map(say, survey.summary(importer.options)), maxlen=0)
            shards = layout(survey, importer.options)
            _clear(destination, shards)
            todo = [shard.name for shard in shards if not _entry(destination, shard)]
            ranks.publish({"todo": todo, "kind": importer.kind})
        left = set(todo)
        mine = share([shard for shard in shards if shard.name in left], launch)
        _write(importer, survey, mine, destination, ranks)
        if launch.rank > 0:
            return None
        return _finish(survey, shards, importer.options, destination, ranks)


def _begin(importer: Importer, destination: Path) -> Survey:
    """On rank 0: look the source over, and see whether this is an import already begun."""
    survey = importer.survey()
    check_storable_names(survey.fields, str(importer.path))
    options = importer.options
    identity = hashlib.sha256(
        json.dumps([VERSION, str(importer.path.resolve()), asdict(options), survey.tree()]).encode()
    ).hexdigest()
    before = _stored(destination / FOLDER)
    begun = any((destination / FOLDER).glob("*.h5.json"))
    if before is None or (before["identity"] != identity and not begun):
        tree = {"identity": identity, "survey": survey.tree()}
        put(destination / FOLDER / "survey.json", tree)
    elif before["identity"] != identity:
        raise Error(
            f"{destination} holds an unfinished import, but the source or the options are not "
            "what they were.",
            hint=f"remove {destination} to begin anew, or finish it by the command that began it.",
        )
    return survey


def _clear(destination: Path, shards: list[Shard]) -> None:
    """Remove what killed writers left."""
    for name in (INDEX, *(shard.name for shard in shards)):
        for torn in destination.glob(f".{name}.*"):
            torn.unlink(missing_ok=True)


def _stored(folder: Path) -> Any:
    try:
        return json.loads((folder / "survey.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Error(
            f"{folder}/survey.json is damaged: {error}.", hint=f"remove {folder.parent}."
        ) from error


def _record(destination: Path, shard: Shard) -> Path:
    return destination / FOLDER / f"{shard.name}.json"


def _entry(destination: Path, shard: Shard) -> ShardEntry | None:
    """Return the index's entry for a shard that is finished; None if it is not."""
    try:
        entry = ShardEntry(**json.loads(_record(destination, shard).read_bytes()))
        finished = (destination / shard.name).stat().st_size == entry.bytes
    except (OSError, ValueError, TypeError):
        return None
    return entry if finished else None


def share(shards: list[Shard], launch: Launch) -> list[Shard]:
    """Return the shards that a rank makes: neighbours, so that it reads one part of the source.

    Args:
        shards: Of the whole import, in order.
        launch: The rank, and how many there are.
    """
    total = sum(len(shard.items) for shard in shards)
    mine, before = [], 0
    for shard in shards:
        middle = 2 * before + len(shard.items)
        if middle * launch.size // (2 * total) == launch.rank:
            mine.append(shard)
        before += len(shard.items)
    return mine


class _Growing:
    """A shard whose samples come bit by bit."""

    def __init__(self, shard: Shard, survey: Survey) -> None:
        self.shard = shard
        self.filled = 0
        self._fields = survey.fields
        self._fixed = {
            name: np.empty((len(shard.items), *spec.shape), spec.kind)
            for name, spec in survey.fields.items()
            if not spec.ragged
        }
        self._ragged: dict[str, list[Any]] = {
            name: [] for name, spec in survey.fields.items() if spec.ragged
        }

    def add(self, columns: Columns, count: int) -> bool:
        """Whether that was the last of it."""
        for name, column in columns.items():
            if isinstance(column, Ragged):
                self._ragged[name].append(column)
            else:
                self._fixed[name][self.filled : self.filled + count] = column
        self.filled += count
        return self.filled == len(self.shard.items)

    def columns(self) -> Columns:
        joined = {name: join(parts) for name, parts in self._ragged.items()}
        return {name: joined.get(name, self._fixed.get(name)) for name in self._fields}  # type: ignore[misc]


def _write(
    importer: Importer, survey: Survey, shards: list[Shard], destination: Path, ranks: Ranks
) -> None:
    if not shards:
        return
    total = sum(len(shard.items) for shard in shards)
    unit = max(1, total // MOST_TICKS)
    steps = _in_steps(importer, survey, shards, destination, ranks, unit)
    if ranks.rank == 0:
        what = importer.what + (f" (x{unit})" if unit > 1 else "")
        what += f", rank 0 of {ranks.size}" if ranks.size > 1 else ""
        steps = progress(steps, what=what, total=total // unit)
    deque(steps, maxlen=0)


def _in_steps(
    importer: Importer,
    survey: Survey,
    shards: list[Shard],
    destination: Path,
    ranks: Ranks,
    unit: int,
) -> Iterator[None]:
    """Make shards in one pass through the source, and yield for every so many samples.

    The samples of a split come in the source's order, so no more than one shard of each split is
    growing at any time, and one more is being written.
    """
    items = np.concatenate([shard.items for shard in shards])
    owners = np.repeat(np.arange(len(shards)), [len(shard.items) for shard in shards])
    order = np.argsort(items, kind="stable")
    items, owners = items[order], owners[order]
    growing: dict[int, _Growing] = {}
    written: Future[None] | None = None
    position = 0
    # Syncing to disk is waiting, which a thread can do while samples are decoded.
    with ThreadPoolExecutor(1) as pool:
        for columns in importer.read(survey, items):
            ranks.check()
            before, position = position, position + len(next(iter(columns.values())))
            whose = owners[before:position]
            check_columns(columns, survey.fields, shards[whose[0]].split)
            present = np.unique(whose).tolist()
            for owner in present:
                rows = whose == owner
                part = columns
                if len(present) > 1:
                    part = {name: pick(column, rows) for name, column in columns.items()}
                if owner not in growing:
                    growing[owner] = _Growing(shards[owner], survey)
                if growing[owner].add(part, int(rows.sum())):
                    if written is not None:
                        written.result()
                    shard = growing.pop(owner)
                    written = pool.submit(_write_one, shard, importer.options, destination)
            yield from repeat(None, position // unit - before // unit)
        if written is not None:
            written.result()
    if growing:
        raise Error(
            f"{importer.path} gave fewer samples than it held.", hint="was it changed meanwhile?"
        )


def _write_one(shard: _Growing, options: ImportOptions, destination: Path) -> None:
    entry = write_shard(
        destination,
        shard.shard.name,
        shard.columns(),
        split=shard.shard.split,
        number=shard.shard.number,
        compression=options.compression,
    )
    put(_record(destination, shard.shard), entry._asdict())


def _finish(
    survey: Survey, shards: list[Shard], options: ImportOptions, destination: Path, ranks: Ranks
) -> Index:
    """On rank 0: write the index, once all shards are on record."""
    entries: dict[str, ShardEntry] = {}

    def recorded() -> bool | None:
        for shard in shards:
            if shard.name not in entries:
                entry = _entry(destination, shard)
                if entry is None:
                    return None
                entries[shard.name] = entry
        return True

    others = set(range(1, ranks.size))
    ranks.wait(recorded, others)
    splits: dict[str, SplitEntry] = {}
    for shard in shards:
        split = splits.setdefault(shard.split, SplitEntry(datasets_of(survey.fields)))
        split.shards.append(entries[shard.name])
    index = write_index(destination, survey.fields, splits, survey.attributes, options.compression)
    ranks.wait(ranks.others_left, others)
    with writing(destination):
        shutil.rmtree(destination / FOLDER)
    return index
