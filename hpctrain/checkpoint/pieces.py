"""Sharded checkpoints: written in pieces by many processes, read by any other division.

Each process writes one file of what it owns (safetensors): whole tensors, boxes of larger ones, or
ranges of flattened ones. An index in JSON says, for each tensor, its shape and type, and which box
is where in which file, with checksums; it is written last, so a folder that has one is whole. A
checkpoint that one process writes is one with a single piece.

    state.json:
        format, version
        files     [{name, bytes, header}]: header is the checksum of what precedes the tensors
        tensors   {path: {dtype, shape, boxes: [{file, offsets, sizes, start, xxh3_128}]}}
        state     the rest of the state, as state_tree has it
        sha256    of all that

How processes come to it is the caller's matter: nothing here sends or receives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import operator
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from hpctrain.checkpoint import state_tree
from hpctrain.checkpoint.tensor_file import (
    BLOCK,
    DTYPES,
    NAMED,
    Entry,
    Job,
    Layout,
    Memory,
    bytes_of,
    check,
    digests_of,
    in_threads,
    layout,
    read_into,
    size_of,
    write_durably,
)
from hpctrain.errors import Error
from hpctrain.files import open_regular, parse_json, read_json, sync, write_text

TENSORS = "tensors.safetensors"
INDEX = "state.json"
FORMAT = "hpctrain-checkpoint"
VERSION = 3
READABLE = (1, 2, 3)
"""Version 1 did not keep the versions of a module's layers, nor tuples as such; 1 and 2 had one
file, and its SHA-256."""

_POLL_SECONDS = 0.05
_CHECKSUM_NAME = "xxh3_128"


class Box(NamedTuple):
    """Where a tensor lies within a larger one.

    Attributes:
        shape: Of the larger one.
        offsets: Where it begins, in each dimension.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]


class Range(NamedTuple):
    """Where a tensor of one dimension lies within a larger one that is flattened in C's order.

    Attributes:
        shape: Of the larger one, which is not flattened.
        start: The element at which it begins.
    """

    shape: tuple[int, ...]
    start: int


class Part(NamedTuple):
    """A box of a tensor, and its values."""

    name: str
    box: Box
    values: torch.Tensor


class Piece(NamedTuple):
    """A rank's piece of a checkpoint, copied, so that training may go on while it is written.

    Attributes:
        parts: Of its file.
        layout: Of its file.
        image: The file's bytes.
        rest: The state but for its tensors.
    """

    parts: list[Part]
    layout: Layout
    image: torch.Tensor
    rest: Any


def boxes_of_range(
    shape: Sequence[int], start: int, stop: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide a range of a flattened tensor into boxes: 2 d - 1 at most, in d dimensions.

    Args:
        shape: Of the tensor.
        start: First element of the range.
        stop: The one after its last.

    Returns:
        Offsets and sizes of each box, in the order of their elements.

    Example:
        >>> boxes_of_range((3, 4), 2, 11)  # the end of a row, a whole row, the start of one
        [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 3))]
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    inner = tuple(shape[1:])
    row = math.prod(inner)

    def within(index: int, begin: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [((index, *o), (1, *s)) for o, s in boxes_of_range(inner, begin, end)]

    first, last = start // row, (stop - 1) // row
    if first == last:
        return within(first, start - first * row, stop - first * row)
    boxes = []
    if start > first * row:
        boxes += within(first, start - first * row, row)
        first += 1
    whole = stop // row
    if whole > first:
        boxes.append(((first, *[0] * len(inner)), (whole - first, *inner)))
    return boxes + within(whole, 0, stop - whole * row)


def copy_piece(
    state: Any, memory: Memory, shares: Mapping[str, Box | Range] | None = None
) -> Piece:
    """Copy what a process is to write; its tensors may change once this returns.

    Args:
        state: A tree. What another process owns is left out of it; dicts that several processes
            have are made one.
        memory: Where the copy is made. It must be left alone until the piece is written.
        shares: Of the tensors that are parts of larger ones: by their path in the tree, such as
            ``model.layer.weight``, where they lie. All others are whole.

    Raises:
        Error: The state has something that no checkpoint holds.
    """
    tensors, rest = state_tree.split(state)
    parts: list[Part] = []
    for name, tensor in tensors.items():
        share = (shares or {}).get(name)
        if isinstance(share, Range) and all(share.shape):
            stop, done = share.start + tensor.numel(), 0
            for offsets, sizes in boxes_of_range(share.shape, share.start, stop):
                values = tensor[done : done + math.prod(sizes)].view(sizes)
                parts.append(Part(name, Box(share.shape, offsets), values))
                done += values.numel()
        else:
            shape = tuple(tensor.shape if share is None else share.shape)
            offsets = share.offsets if isinstance(share, Box) else (0,) * len(shape)
            empty = tensor.view(shape) if isinstance(share, Range) else tensor
            parts.append(Part(name, Box(shape, offsets), empty))
    laid = layout([Entry(_key(p), p.values.dtype, tuple(p.values.shape)) for p in parts])
    devices = {part.values.device for part in parts if part.values.is_cuda}
    image = memory.take(laid.size, pinned=bool(devices))
    image[: len(laid.header)] = torch.frombuffer(bytearray(laid.header), dtype=torch.uint8)
    copies = []
    for part, start in zip(parts, laid.starts, strict=True):
        size = part.values.numel() * part.values.element_size()
        target = image[start : start + size].view(part.values.dtype).view(part.values.shape)
        target.copy_(part.values, non_blocking=True)
        copies.append(part._replace(values=target))
    for device in devices:
        torch.cuda.synchronize(device)
    return Piece(copies, laid, image, rest)


def _key(part: Part) -> str:
    if part.box.shape == tuple(part.values.shape):
        return part.name
    spans = zip(part.box.offsets, part.values.shape, strict=True)
    return f"{part.name}[{','.join(f'{start}:{start + size}' for start, size in spans)}]"


def write_file(folder: Path, name: str, piece: Piece) -> dict[str, Any]:
    """Write a piece's tensors; they are on disk when this returns, but not yet the file's name.

    Args:
        folder: Where; it exists.
        name: Of the new file.
        piece: From ``copy_piece``.

    Returns:
        What the index has to say of it, for ``write_index``.

    Raises:
        OSError: It could not be written.
    """
    path, parts, laid = folder / name, piece.parts, piece.layout
    digests = write_durably(
        path, piece.image, laid.size, lambda: [digests_of(bytes_of(part.values)) for part in parts]
    )
    tensors = [
        {
            "name": part.name,
            "dtype": DTYPES[part.values.dtype],
            "shape": list(part.box.shape),
            "offsets": list(part.box.offsets),
            "sizes": list(part.values.shape),
            "start": start,
            _CHECKSUM_NAME: sums,
        }
        for part, start, sums in zip(parts, laid.starts, digests, strict=True)
    ]
    header = xxhash.xxh3_128_hexdigest(laid.header)
    file = {"name": name, "bytes": laid.size, "header_bytes": len(laid.header), "header": header}
    return {"file": file, "tensors": tensors, "state": piece.rest}


def write_index(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the index of pieces that are on disk; it is, too, when this returns.

    Args:
        folder: Where they are.
        records: Of all pieces, from ``write_file``.

    Raises:
        Error: The pieces do not make up whole tensors.
        OSError: It could not be written.
    """
    tensors: dict[str, Any] = {}
    for number, record in enumerate(records):
        for each in record["tensors"]:
            whole = {"dtype": each["dtype"], "shape": each["shape"]}
            known = tensors.setdefault(each["name"], {**whole, "boxes": []})
            if {key: known[key] for key in whole} != whole:
                raise Error(
                    f"piece {record['file']['name']} has '{each['name']}' as {whole['dtype']} of "
                    f"shape {whole['shape']}, another as {known['dtype']} of {known['shape']}."
                )
            keys = ("offsets", "sizes", "start", _CHECKSUM_NAME)
            known["boxes"].append({"file": number, **{key: each[key] for key in keys}})
    rest: Any = None
    for record in records:
        rest = record["state"] if rest is None else state_tree.merge(rest, record["state"])
    head = {
        "format": FORMAT,
        "version": VERSION,
        "files": [record["file"] for record in records],
        "tensors": tensors,
        "state": rest,
    }
    try:
        _index_of(head)
    except ValueError as error:
        raise Error(f"the pieces in {folder} are not a whole checkpoint: {error}.") from error
    _write_json(folder / INDEX, head)
    sync(folder)


def write_piece(folder: Path, rank: int, piece: Piece) -> None:
    """Write one of several pieces; it is on disk when this returns.

    Args:
        folder: Where all pieces go; it exists, and holds nothing of an earlier attempt.
        rank: Of this process.
        piece: From ``copy_piece``.

    Raises:
        OSError: It could not be written.
    """
    record = write_file(folder, _file_name(rank), piece)
    sync(folder)
    _write_json(folder / _record_name(rank), record)


def commit(pending: Path, folder: Path, ranks: int, *, timeout_seconds: float) -> None:
    """Make pieces a checkpoint, when all of them are on disk; on one process alone.

    Args:
        pending: Where the pieces are; beside ``folder``.
        folder: The checkpoint; replaced if it exists.
        ranks: How many pieces there are to be.
        timeout_seconds: How long to wait for those that are not there yet.

    Raises:
        Error: A piece is missing or damaged, or they do not fit each other.
        OSError: It could not be written.
    """
    deadline = time.monotonic() + timeout_seconds
    records = []
    for rank in range(ranks):
        path = pending / _record_name(rank)
        while not path.exists():
            if time.monotonic() >= deadline:
                raise Error(
                    f"checkpoint {folder} is not written: rank {rank} of {ranks} has not written "
                    f"its piece {path.name} within {timeout_seconds:g} s.",
                    hint="see what that rank says; the checkpoints before are whole.",
                )
            time.sleep(_POLL_SECONDS)
        with _damage_told(path):
            records.append(_read_json(path))
    write_index(pending, records)
    for rank in range(ranks):
        (pending / _record_name(rank)).unlink()
    publish(pending, folder)


def publish(pending: Path, folder: Path) -> None:
    """Give a checkpoint that is on disk its name, in one step.

    Args:
        pending: Where it is; beside ``folder``.
        folder: The name; what has it is replaced.

    Raises:
        OSError: It could not be renamed.
    """
    if folder.exists():
        discard(folder)
    pending.rename(folder)
    sync(folder.parent)


def discard(folder: Path) -> None:
    """Remove a checkpoint: out of sight in one step, then in pieces."""
    doomed = folder.with_name(f".{folder.name}.discarded.{os.getpid()}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _file_name(rank: int) -> str:
    return f"tensors-{rank:05d}.safetensors"


def _record_name(rank: int) -> str:
    return f"piece-{rank:05d}.json"


def _write_json(path: Path, head: dict[str, Any]) -> None:
    write_text(path, json.dumps({**head, "sha256": digest_of(head)}))


def _read_json(path: Path) -> dict[str, Any]:
    head = read_json(path)
    expected = head.pop("sha256")
    if digest_of(head) != expected:
        raise Error(f"checkpoint {path} is damaged: its checksum differs.")
    whole: dict[str, Any] = head
    return whole


def digest_of(head: dict[str, Any]) -> str:
    """Return the SHA-256 of what a file of JSON says, but for that digest itself."""
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


class _File(NamedTuple):
    """A file of tensors: how large it is, and the checksum of what precedes them, if known."""

    name: str
    size: int
    header_size: int
    header: str | None


class _Stored(NamedTuple):
    """Where a box of a tensor is; and the checksums of its blocks, if it was not checked before."""

    file: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    digests: tuple[str, ...] | None


class _Tensor(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: list[_Stored]


class _Index(NamedTuple):
    files: list[_File]
    tensors: dict[str, _Tensor]


class Checkpoint:
    """A checkpoint that is open to be read, in whole or in any part.

    A context manager: it keeps the files that were read open.

    Args:
        folder: Of the checkpoint; of any version.

    Attributes:
        folder: Of the checkpoint.
        rest: The state but for its tensors, as ``state_tree`` has it.

    Raises:
        Error: Its index is missing or damaged, or of a version that is not known here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._checked: set[tuple[int, int]] = set()
        with _damage_told(folder):
            head = _read_json(folder / INDEX)
            if head["format"] != FORMAT:
                raise Error(f"checkpoint {folder / INDEX} is damaged: it is of another format.")
            if head["version"] not in READABLE:
                raise Error(
                    f"checkpoint {folder} is of version {head['version']}, not {VERSION}.",
                    hint="use the hpctrain that wrote it.",
                )
            old = head["version"] < VERSION
            self._index = _old_index(folder, head) if old else _index_of(head)
            self.rest = head["state"]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        self._maps.clear()

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each tensor, by its path in the state."""
        return {name: (each.dtype, each.shape) for name, each in self._index.tensors.items()}

    def state(self, key: str | None = None, into: Any = None) -> Any:
        """Read the state, and check all that is read.

        Args:
            key: Of what is wanted, where the state is a dict; None: all of it.
            into: A tree. A tensor of it that is contiguous, on the CPU, and of the type and shape
                of the one at the same path is written to, and is what the state that is returned
                has there; also where it then turns out that the checkpoint is damaged.

        Raises:
            Error: A file is missing, cut short, or damaged.
        """
        with _damage_told(self.folder):
            tree = self.rest if key is None else self.rest[key]
            usable = _usable(into, key or "")
            tensors, plan = {}, _Plan()
            for name in state_tree.names(tree):
                kind = self._index.tensors[name]
                out = usable.get(name)
                if out is None or (out.dtype, tuple(out.shape)) != (kind.dtype, kind.shape):
                    out = torch.empty(kind.shape, dtype=kind.dtype)
                tensors[name] = out
                self._plan(plan, kind, (0,) * len(kind.shape), out)
            plan.run()
            return state_tree.join(tensors, tree)

    def read(
        self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Read a box of a tensor, and check what is read of the files.

        Args:
            name: The tensor's path in the state.
            offsets: Where the box begins, in each dimension; None: at the beginning.
            sizes: How large it is; None: to the end.

        Raises:
            Error: There is no such tensor, or the box is not within it; or a file is missing, cut
                short, or damaged.
        """
        kind = self._kind(name)
        offsets = (0,) * len(kind.shape) if offsets is None else tuple(offsets)
        if sizes is None:
            sizes = tuple(n - at for n, at in zip(kind.shape, offsets, strict=False))
        self._require(name, offsets, sizes)
        with _damage_told(self.folder):
            out = torch.empty(tuple(sizes), dtype=kind.dtype)
            plan = _Plan()
            self._plan(plan, kind, offsets, out)
            plan.run()
            return out

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read a range of a flattened tensor, of one dimension; as ``read`` otherwise.

        Args:
            name: The tensor's path in the state.
            start: First element.
            stop: The one after the last.
        """
        kind = self._kind(name)
        if not 0 <= start <= stop <= math.prod(kind.shape):
            raise Error(f"'{name}' of {self.folder} has no elements {start} to {stop}.")
        with _damage_told(self.folder):
            out = torch.empty(stop - start, dtype=kind.dtype)
            plan, done = _Plan(), 0
            for offsets, sizes in boxes_of_range(kind.shape, start, stop):
                end = done + math.prod(sizes)
                self._plan(plan, kind, offsets, out[done:end].view(sizes))
                done = end
            plan.run()
            return out

    def check(self) -> None:
        """Check every byte of every file.

        Raises:
            Error: One is missing, cut short, or damaged.
        """
        with _damage_told(self.folder):
            for number in range(len(self._index.files)):
                self._descriptor(number)
            places: set[tuple[int, int]] = set()
            in_threads(
                job
                for kind in self._index.tensors.values()
                for box in kind.boxes
                for job in self._checks(kind, box, 0, size_of(kind.dtype, box.sizes), places)
            )

    def _kind(self, name: str) -> _Tensor:
        if name not in self._index.tensors:
            raise Error(f"checkpoint {self.folder} has no tensor '{name}'.")
        return self._index.tensors[name]

    def _require(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        shape = self._index.tensors[name].shape
        fits = len(offsets) == len(sizes) == len(shape) and all(
            at >= 0 and size >= 0 and at + size <= whole
            for at, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not fits:
            raise Error(
                f"'{name}' of {self.folder} is of shape {list(shape)}, and has no box of sizes "
                f"{list(sizes)} at {list(offsets)}."
            )

    def _plan(self, plan: _Plan, kind: _Tensor, offsets: Sequence[int], out: torch.Tensor) -> None:
        """Say what has to be done to fill a box."""
        if not out.numel():
            return
        for box in kind.boxes:
            mine = zip(offsets, out.shape, box.offsets, box.sizes, strict=True)
            spans = [(max(a, b), min(a + n, b + m)) for a, n, b, m in mine]
            if any(begin >= end for begin, end in spans):
                continue
            target = out[_slices(spans, offsets)]
            self._descriptor(box.file)
            if tuple(target.shape) == box.sizes and target.is_contiguous():
                plan.checks += self._blocks(box, bytes_of(target))
                continue
            inner = _slices(spans, box.offsets)
            steps = [math.prod(box.sizes[n + 1 :]) for n in range(len(box.sizes))]  # in C's order
            first = sum(map(operator.mul, (each.start for each in inner), steps))
            last = sum(map(operator.mul, (each.stop - 1 for each in inner), steps))
            size = kind.dtype.itemsize
            plan.checks += self._checks(kind, box, first * size, (last + 1) * size, plan.places)
            whole = torch.frombuffer(
                self._map(box.file), dtype=kind.dtype, count=math.prod(box.sizes), offset=box.start
            ).view(box.sizes)
            plan.copies.append(
                (target.numel() * kind.dtype.itemsize, partial(target.copy_, whole[inner]))
            )

    def _checks(
        self, kind: _Tensor, box: _Stored, begin: int, end: int, places: set[tuple[int, int]]
    ) -> list[Job]:
        """Check the blocks that some bytes of a box are in, if they were not, or are not to be."""
        if box.digests is None:
            return []
        size = size_of(kind.dtype, box.sizes)
        jobs: list[Job] = []
        for start in range(begin // BLOCK * BLOCK, end, BLOCK):
            length = min(BLOCK, size - start)
            place = (box.file, box.start + start)
            if place not in self._checked and place not in places:
                places.add(place)
                digest = box.digests[start // BLOCK]
                jobs.append((length, partial(self._check, *place, length, digest)))
        return jobs

    def _blocks(self, box: _Stored, out: memoryview) -> Iterator[Job]:
        """Read a whole box to where it belongs, and check it there."""
        for number, start in enumerate(range(0, len(out), BLOCK)):
            block = out[start : start + BLOCK]
            digest = box.digests[number] if box.digests is not None else None
            yield len(block), partial(self._fill, box.file, box.start + start, block, digest)

    def _fill(self, file: int, start: int, out: memoryview, digest: str | None) -> None:
        with _damage_told(self.folder / self._index.files[file].name):
            read_into(self._open[file], out, start)
            if digest is not None:
                check(out, digest)

    def _check(self, file: int, start: int, size: int, digest: str) -> None:
        self._fill(file, start, memoryview(bytearray(size)), digest)
        self._checked.add((file, start))

    def _descriptor(self, number: int) -> int:
        """Open a file, if it is not open, and check its size and what precedes its tensors."""
        if number not in self._open:
            file = self._index.files[number]
            path = self.folder / file.name
            with _damage_told(path), open_regular(path) as opened:
                size = os.fstat(opened.fileno()).st_size
                if size != file.size:
                    raise ValueError(f"it has {size} bytes, not {file.size}")
                if file.header is not None:
                    header = bytearray(file.header_size)
                    read_into(opened.fileno(), memoryview(header), 0)
                    check(memoryview(header), file.header)
                self._open[number] = os.dup(opened.fileno())
        return self._open[number]

    def _map(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            self._maps[number] = mmap.mmap(self._descriptor(number), 0, access=mmap.ACCESS_COPY)
        return self._maps[number]


class _Plan:
    """How boxes are filled: first all that is read and checked, then what is copied of it."""

    def __init__(self) -> None:
        self.checks: list[Job] = []
        self.copies: list[Job] = []
        self.places: set[tuple[int, int]] = set()  # blocks that are checked

    def run(self) -> None:
        in_threads(self.checks)
        in_threads(self.copies)


def _slices(spans: Sequence[tuple[int, int]], offsets: Sequence[int]) -> tuple[slice, ...]:
    pairs = zip(spans, offsets, strict=True)
    return tuple(slice(begin - at, end - at) for (begin, end), at in pairs)


def _usable(into: Any, path: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a tree that can be read into, by path; of those in one memory, one."""
    found, taken = {}, set()
    for name, tensor in state_tree.split(into, path)[0].items():
        plain = not (tensor.is_conj() or tensor.is_neg())
        place = tensor.untyped_storage().data_ptr()
        if tensor.device.type == "cpu" and tensor.is_contiguous() and plain and place not in taken:
            taken.add(place)
            found[name] = tensor
    return found


def _index_of(head: dict[str, Any]) -> _Index:
    """Take an index apart.

    Raises:
        ValueError: It is not one, or of tensors that are not whole.
    """
    files = [
        _File(_plain_name(f["name"]), _number(f["bytes"]), _number(f["header_bytes"]), f["header"])
        for f in head["files"]
    ]
    tensors = {}
    for name, each in head["tensors"].items():
        kind = _Tensor(NAMED[each["dtype"]], _numbers(each["shape"]), [])
        for box in each["boxes"]:
            digests = tuple(map(str, box[_CHECKSUM_NAME]))
            offsets, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
            place = _number(box["file"]), offsets, sizes, _number(box["start"])
            kind.boxes.append(_Stored(*place, digests))
        tensors[name] = kind
    index = _Index(files, tensors)
    _require_whole(index)
    return index


def _old_index(folder: Path, head: dict[str, Any]) -> _Index:
    """Make the index of a checkpoint of one file, which is checked as a whole.

    Raises:
        ValueError: It is damaged.
        OSError: It cannot be read.
    """
    path = folder / TENSORS
    with _damage_told(path), open_regular(path) as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK):
            digest.update(block)
        if digest.hexdigest() != head["tensors_sha256"]:
            raise ValueError("its checksum differs")
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError("its header is cut short")
        header = parse_json(file.read(length))
    tensors = {}
    for name, each in header.items():
        if name != "__metadata__":
            shape = _numbers(each["shape"])
            start = 8 + length + _number(each["data_offsets"][0])
            box = _Stored(0, (0,) * len(shape), shape, start, None)
            tensors[name] = _Tensor(NAMED[each["dtype"]], shape, [box])
    index = _Index([_File(TENSORS, size, 8 + length, None)], tensors)
    _require_whole(index)
    return index


def _require_whole(index: _Index) -> None:
    """Refuse an index whose boxes are not in their files, or do not make up their tensors.

    Raises:
        ValueError: So it is.
    """
    filled = [file.header_size for file in index.files]
    for name, kind in index.tensors.items():
        volume = 0
        for box in kind.boxes:
            if box.file >= len(index.files) or len(box.offsets) != len(box.sizes):
                raise ValueError(f"'{name}' has a box that is nowhere")
            size = size_of(kind.dtype, box.sizes)
            ends = [at + n for at, n in zip(box.offsets, box.sizes, strict=True)]
            if len(ends) != len(kind.shape) or any(map(operator.gt, ends, kind.shape)):
                raise ValueError(f"'{name}' has a box that is not within it")
            if box.start + size > index.files[box.file].size:
                raise ValueError(f"'{name}' ends after its file")
            if box.digests is not None and len(box.digests) != -(-size // BLOCK):
                raise ValueError(f"'{name}' lacks checksums")
            filled[box.file] += size
            volume += math.prod(box.sizes)
        if volume != math.prod(kind.shape) or _overlap(kind.boxes):
            raise ValueError(f"the boxes of '{name}' do not make up a whole")
    if any(size > file.size for size, file in zip(filled, index.files, strict=True)):
        raise ValueError("there is more in a file than it can hold")


def _overlap(boxes: Sequence[_Stored]) -> bool:
    boxes = [box for box in boxes if all(box.sizes)]
    if len(boxes) < 2 or not boxes[0].sizes:
        return len(boxes) > 1
    begin = np.array([box.offsets for box in boxes])
    end = begin + np.array([box.sizes for box in boxes])
    for number in range(len(boxes) - 1):
        meets = (begin[number] < end[number + 1 :]) & (begin[number + 1 :] < end[number])
        if meets.all(axis=1).any():
            return True
    return False


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError("it names a file that is not in its folder")
    return name


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is no size")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(_number(value) for value in values)


@contextlib.contextmanager
def _damage_told(where: Path) -> Iterator[None]:
    """Make of whatever a damaged file has its readers say one line that names it."""
    try:
        yield
    except OSError as error:
        raise Error(
            f"checkpoint {error.filename or where} cannot be read: {error.strerror}."
        ) from error
    except Error:
        raise
    except ValueError as error:
        raise Error(f"checkpoint {where} is damaged: {error}.") from error
    except Exception as error:
        raise Error(f"checkpoint {where} is damaged: {type(error).__name__}: {error}.") from error
