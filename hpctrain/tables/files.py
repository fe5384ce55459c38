"""Rows of tables in the files of a checkpoint: written and read block by block, never as a whole.

Each process that has rows writes a safetensors file of them, and beside it, in JSON, what tables
they are of and a checksum of each block. The rows of a table lie by its parts
(``TableSpec.shards``) and then by id, so the files are the same bits whenever the rows are, and a
reader that has some of the parts finds them side by side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash

from hpctrain.checkpoint.tensor_file import Entry, bytes_of, check, layout, read_into, size_of
from hpctrain.errors import Error
from hpctrain.files import sync, write_text
from hpctrain.tables.arena import Arena
from hpctrain.tables.index import Ids
from hpctrain.tables.row_store import RowStore
from hpctrain.tables.spec import TableSpec
from hpctrain.tables.table import Table

BLOCK_ROWS = 2**14
"""Rows under one checksum, of each column."""

OTHER = "use the task and options that the run was started with."

_PARTS = ("rows", "candidates")
Mine = Callable[[TableSpec, Ids], np.ndarray]
"""Whether rows of these ids belong to the process that reads."""


def _path(folder: Path, number: int) -> Path:
    return folder / f"tables-{number:05d}.safetensors"


def _arena(store: RowStore, part: str) -> Arena:
    found: Arena = getattr(store, part)
    return found


def write(folder: Path, number: int, stores: Mapping[str, RowStore]) -> Iterator[None]:
    """Write a process's rows, a block a turn; they must not change until the last one.

    Args:
        folder: Where; made if it is not there.
        number: Of the process, among those that write.
        stores: Rows by table.

    Raises:
        OSError: It could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed: dict[tuple[str, str], Ids] = {}
    for name, store in stores.items():
        for part in _PARTS:
            listed[name, part] = yield from store.listing(_arena(store, part))
    entries, sources = [], []
    for (name, part), slots in listed.items():
        arena = _arena(stores[name], part)
        for column, kind in arena.columns.items():
            entries.append(Entry(f"{name}/{part}/{column}", kind.dtype, kind.shape(len(slots))))
            sources.append((arena, column, slots))
    plan = layout(entries)
    digests: dict[str, list[str]] = {}
    path = _path(folder, number)
    with path.open("wb") as file:
        file.write(plan.header)
        for entry, start, source in zip(entries, plan.starts, sources, strict=True):
            file.seek(start)
            digests[entry.key] = []
            yield from _write_column(file, *source, digests[entry.key])
        file.truncate(plan.size)
        file.flush()
        os.fsync(file.fileno())
    tables = {
        name: {
            "spec": store.spec.describe(),
            "version": store.version,
            "counts": {part: len(listed[name, part]) for part in _PARTS},
        }
        for name, store in stores.items()
    }
    columns = {
        entry.key: {"start": start, "digests": digests[entry.key]}
        for entry, start in zip(entries, plan.starts, strict=True)
    }
    write_text(path.with_suffix(".json"), json.dumps({"tables": tables, "columns": columns}))
    sync(folder)


def _write_column(
    file: BinaryIO, arena: Arena, column: str, slots: Ids, digests: list[str]
) -> Iterator[None]:
    for begin in range(0, len(slots), BLOCK_ROWS):
        data = bytes_of(arena.read(column, slots[begin : begin + BLOCK_ROWS]))
        digests.append(xxhash.xxh3_128_hexdigest(data))
        file.write(data)
        yield


def read(folder: Path, files: int, stores: Mapping[str, RowStore], mine: Mine) -> Iterator[None]:
    """Read those of a checkpoint's rows that are this process's, a block a turn.

    Args:
        folder: The checkpoint.
        files: How many processes wrote it.
        stores: By table; filled, and empty before.
        mine: Says which rows are this process's.

    Raises:
        Error: A file is missing or damaged, or of other tables.
    """
    if bool(files) != bool(stores):
        raise Error(
            f"checkpoint {folder} is of a model with{'' if files else 'out'} tables, "
            f"and this one has {'none' if files else 'some'}.",
            hint=OTHER,
        )
    for number in range(files):
        path = _path(folder, number)
        try:
            yield from _read_file(path, stores, mine)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Error(
                f"{path} is damaged, or cannot be read here: {error}.",
                hint="every server has to see the checkpoint; where it is damaged, go on from "
                "another one: --resume PATH.",
            ) from error


def _read_file(path: Path, stores: Mapping[str, RowStore], mine: Mine) -> Iterator[None]:
    head: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    _check_tables(path, head["tables"], stores)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for name, store in stores.items():
            about = head["tables"][name]
            store.version = max(store.version, int(about["version"]))
            for part in _PARTS:
                arena = _arena(store, part)
                columns = {
                    column: head["columns"][f"{name}/{part}/{column}"] for column in arena.columns
                }
                for block in range(-(-int(about["counts"][part]) // BLOCK_ROWS)):
                    rows = min(BLOCK_ROWS, int(about["counts"][part]) - block * BLOCK_ROWS)
                    _read_block(descriptor, arena, columns, block, rows, partial(mine, store.spec))
                    yield
    finally:
        os.close(descriptor)


def _read_block(
    descriptor: int,
    arena: Arena,
    columns: Mapping[str, Any],
    block: int,
    rows: int,
    mine: Callable[[Ids], np.ndarray],
) -> None:
    def values(column: str) -> torch.Tensor:
        kind = arena.columns[column]
        out = torch.empty(kind.shape(rows), dtype=kind.dtype)
        each = size_of(kind.dtype, kind.shape(BLOCK_ROWS))
        data = bytes_of(out)
        read_into(descriptor, data, int(columns[column]["start"]) + block * each)
        check(data, columns[column]["digests"][block])
        return out

    ids = values("id").numpy()
    which = np.flatnonzero(mine(ids))
    if not len(which):
        return
    slots = arena.add(ids[which])
    for column in arena.columns:
        if column != "id":
            arena.write(column, slots, values(column)[torch.from_numpy(which)])


def _check_tables(path: Path, saved: Mapping[str, Any], stores: Mapping[str, RowStore]) -> None:
    for name in sorted(saved.keys() ^ stores.keys()):
        raise Error(
            f"checkpoint {path.parent} is of other tables: '{name}' is only in one of both.",
            hint=OTHER,
        )
    for name, store in stores.items():
        ours, theirs = json.loads(store.spec.describe()), json.loads(saved[name]["spec"])
        for key in ours:
            if ours[key] != theirs.get(key):
                raise Error(
                    f"checkpoint {path.parent} is of another table '{name}': its {key} is "
                    f"{theirs.get(key)}, and not {ours[key]}.",
                    hint=OTHER,
                )


def load(folder: Path, files: int, tables: Sequence[Table]) -> None:
    """Read all of a checkpoint's rows into tables of this process.

    Args:
        folder: The checkpoint.
        files: How many processes wrote it.
        tables: A model's; what they held is forgotten.

    Raises:
        Error: A file is missing or damaged, or of other tables.
    """
    stores = {table.spec.name: RowStore(table.spec) for table in tables}
    finish(read(folder, files, stores, lambda spec, ids: np.ones(len(ids), bool)))
    for table in tables:
        table.store = stores[table.spec.name]


def finish(turns: Iterator[None]) -> None:
    """Take all turns of :func:`write` or :func:`read`."""
    for _ in turns:
        pass
