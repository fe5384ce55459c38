"""Read HDF5 files that others wrote: opened without locks, and what datasets there are in them.

What numpy calls ``float32`` may be stored as anything that HDF5 can convert to it: of 16 bits, of
12 bits at an offset of 4, in another order. Bytes may be taken from the file only where they are
what numpy has in memory, and only from the file itself: external storage and virtual datasets may
name any file that the reader can read.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import stat
from pathlib import Path
from typing import Any
from weakref import WeakSet

import h5py
import hdf5plugin  # noqa: F401 - lets HDF5 itself read lz4, zstd and others
import numpy as np
from h5py import h5t
from numpy.typing import NDArray

from hpctrain.data.index import FieldSpec
from hpctrain.errors import Error

LARGEST_ROW = 2**34
"""Bytes of one sample. More is a damaged file, or one whose rows are no samples."""
MOST_LINKS = 16

# Position of the sign; position and size of exponent and mantissa; the exponent's bias.
_IEEE = {
    2: ((15, 10, 5, 0, 10), 15),
    4: ((31, 23, 8, 0, 23), 127),
    8: ((63, 52, 11, 0, 52), 1023),
}
_COMPLEX = getattr(h5t, "COMPLEX", None)  # a class of its own from HDF5 2.0 on


class Unusable(ValueError):  # noqa: N818 - it says what a dataset is
    """Why a dataset cannot be a field: ends a sentence that begins with its name."""


class _Unlocked(io.FileIO):
    """A file that HDF5 reads through Python, and therefore cannot lock."""

    def __del__(self) -> None:
        self.close()


def open_file(path: Path, **options: Any) -> h5py.File:
    """Open an HDF5 file for reading, without a lock, whoever else has it open.

    ``HDF5_USE_FILE_LOCKING`` overrides what HDF5 is told for a file. Where it demands locks, or
    where this process has the file open in another way, HDF5 reads through a Python file.

    Args:
        path: Of the file.
        options: Of ``h5py.File``.

    Raises:
        OSError: It cannot be opened, or is no regular file (opening a FIFO could wait for ever).
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    first: OSError | None = None
    if os.environ.get("HDF5_USE_FILE_LOCKING", "").upper() in ("", "0", "FALSE"):
        try:
            return h5py.File(path, "r", locking=False, **options)
        except OSError as error:
            first = error
    try:
        file = h5py.File(_Unlocked(os.fspath(path), "rb"), "r", **options)
        _through_python.add(file)
        return file
    except OSError as error:
        first = first or error
    try:  # a writer that lets others read at the same time
        return h5py.File(path, "r", locking=False, swmr=True, **options)
    except (OSError, ValueError):
        raise first from None


if not hasattr(h5py._objects, "_phil_before_fork"):
    # A child of a fork would wait for ever for a lock of a thread that it does not have. Newer h5py
    # sees to that itself.
    _lock = h5py._objects.phil
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )

_through_python: WeakSet[h5py.File] = WeakSet()


@atexit.register
def _close() -> None:
    """HDF5 closes what is open after Python has gone, and cannot call it then."""
    for file in list(_through_python):
        file.close()


def spec_of_dataset(dataset: h5py.Dataset) -> FieldSpec:
    """Return the field that a dataset would be; text, and rows of varying length, are ragged.

    Raises:
        Unusable: It cannot be one.
    """
    try:
        dtype = dataset.dtype
    except (TypeError, ValueError) as error:
        raise Unusable("is of an HDF5 type that numpy does not have") from error
    if dataset.shape is None or dataset.ndim == 0:
        raise Unusable("is a single value")
    text = h5py.check_string_dtype(dtype) is not None
    inner = np.dtype("u1") if text else h5py.check_vlen_dtype(dtype)
    if inner is not None:
        inner = np.dtype(inner)
        _check_numbers(inner)
        if dataset.ndim > 1:
            raise Unusable("has several texts or sequences a sample")
        return FieldSpec(inner.str, (), True)
    shape = dataset.shape[1:]
    if dtype.subdtype is not None:
        dtype, more = dtype.subdtype
        shape = (*shape, *more)
    _check_numbers(dtype)
    spec = FieldSpec(dtype.str, tuple(int(n) for n in shape))
    if spec.row_bytes > LARGEST_ROW:
        raise Unusable(f"has samples of {spec.row_bytes / 1e9:,.0f} GB each")
    return spec


def _check_numbers(dtype: np.dtype[Any]) -> None:
    if dtype.names:
        raise Unusable("is a table: its members are of different types")
    if h5py.check_ref_dtype(dtype) is not None:
        raise Unusable("holds references")
    if dtype.kind not in "biufc":
        raise Unusable(f"is of type {dtype}, which is not numbers")
    if dtype.itemsize > (16 if dtype.kind == "c" else 8):
        raise Unusable(f"is of type {dtype}, which torch does not have")


def aside(dataset: h5py.Dataset) -> str:
    """Say why a dataset that nobody asked for is none of the samples; empty where it may be."""
    if dataset.shape is None or dataset.ndim == 0:
        return "a single value"
    name = dataset.attrs.get("NAME", b"") if "CLASS" in dataset.attrs else b""
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    if text.startswith("This is a netCDF dimension but not a netCDF variable"):
        return "a dimension without values"
    return ""


def stored_as_numpy(dataset: h5py.Dataset) -> bool:
    """Whether the file's bytes, once decompressed, are those of numpy's array."""
    return _same_bytes(dataset.id.get_type(), dataset.dtype.base)


def _same_bytes(stored: Any, dtype: np.dtype[Any]) -> bool:
    kind = stored.get_class()
    if kind == h5t.ARRAY:
        return _same_bytes(stored.get_super(), dtype)
    if kind == h5t.ENUM:
        signed = "i" if dtype.kind == "b" else dtype.kind
        return _same_bytes(stored.get_super(), np.dtype(f"{dtype.str[0]}{signed}{dtype.itemsize}"))
    if stored.get_size() != dtype.itemsize:
        return False
    if kind == h5t.COMPOUND and dtype.kind == "c":  # as h5py has always written complex numbers
        half = np.dtype(f"{dtype.str[0]}f{dtype.itemsize // 2}")
        return stored.get_nmembers() == 2 and all(
            stored.get_member_offset(i) == i * half.itemsize
            and _same_bytes(stored.get_member_type(i), half)
            for i in range(2)
        )
    if _COMPLEX is not None and kind == _COMPLEX and dtype.kind == "c":
        half = np.dtype(f"{dtype.str[0]}f{dtype.itemsize // 2}")
        return _same_bytes(stored.get_super(), half)
    if kind == h5t.BITFIELD:
        order = "BE" if dtype.str[0] == ">" else "LE"
        return dtype.kind == "u" and stored == getattr(h5t, f"STD_B{8 * dtype.itemsize}{order}")
    if kind not in (h5t.INTEGER, h5t.FLOAT):
        return False
    order = h5t.ORDER_BE if dtype.str[0] == ">" else h5t.ORDER_LE
    whole = stored.get_precision() == 8 * dtype.itemsize and stored.get_offset() == 0
    if not whole or (dtype.itemsize > 1 and stored.get_order() != order):
        return False
    if kind == h5t.FLOAT:
        found = (tuple(stored.get_fields()), stored.get_ebias())
        implied = stored.get_norm() == h5t.NORM_IMPLIED
        return dtype.kind == "f" and implied and found == _IEEE.get(dtype.itemsize)
    return dtype.kind == ("i" if stored.get_sign() == h5t.SGN_2 else "u")


def own_bytes(dataset: h5py.Dataset) -> bool:
    """Whether the dataset's bytes are in the very file that it was asked of."""
    return not dataset.is_virtual and dataset.id.get_create_plist().get_external_count() == 0


def mapped_offset(dataset: h5py.Dataset, path: Path, spec: FieldSpec) -> int | None:
    """Find where in the file a dataset's rows are, one after the other as numpy has them.

    Args:
        dataset: Of the file.
        path: Of the file.
        spec: What the dataset is.

    Returns:
        None where there is no such place: HDF5 has to be asked for rows.
    """
    plain = dataset.chunks is None and not spec.ragged and own_bytes(dataset)
    if not plain or not stored_as_numpy(dataset):
        return None
    if dataset.size == 0:
        return 0
    offset = dataset.id.get_offset()
    if offset is None:
        return None
    size, rows = path.stat().st_size, dataset.shape[0]
    for start in (int(offset), int(offset) + dataset.file.userblock_size):
        if start + rows * spec.row_bytes <= size and _same_rows(dataset, path, spec, start):
            return start
    return None


def _same_rows(dataset: h5py.Dataset, path: Path, spec: FieldSpec, start: int) -> bool:
    rows = dataset.shape[0]
    with path.open("rb") as file:
        for row in {0, rows // 2, rows - 1}:
            file.seek(start + row * spec.row_bytes)
            wanted = np.ascontiguousarray(dataset[row : row + 1], spec.kind).tobytes()
            if file.read(spec.row_bytes) != wanted:
                return False
    return True


def sequences(dataset: h5py.Dataset, start: int, stop: int) -> list[NDArray[Any]]:
    """Read samples of a ragged field: text as its bytes, without what pads texts of one length.

    Args:
        dataset: Of text, or of sequences of varying length.
        start: The first sample.
        stop: The sample after the last.
    """
    rows = dataset[start:stop]
    text = h5py.check_string_dtype(dataset.dtype)
    if text is None:
        kind = np.dtype(h5py.check_vlen_dtype(dataset.dtype))
        return [np.ascontiguousarray(row, kind) for row in rows]
    return [
        np.frombuffer(row if isinstance(row, bytes) else str(row).encode(), np.uint8)
        for row in rows
    ]


def datasets(file: h5py.File) -> tuple[list[str], dict[str, str]]:
    """List a file's datasets by the first of their names, and its other members: name -> what.

    Links are not followed: a second name of a dataset is no second field, and another file may be
    anywhere. Each can be named by the user, and :func:`locate` finds it.
    """
    names: list[str] = []
    others: dict[str, str] = {}
    seen = {_address(file): "the file itself"}
    waiting = [(name, file) for name in sorted(file, reverse=True)]
    while waiting:
        name, group = waiting.pop()
        link = group.get(name.rpartition("/")[2], getlink=True)
        if isinstance(link, h5py.ExternalLink):
            others[name] = f"a link to {link.path} in {link.filename}"
            continue
        if isinstance(link, h5py.SoftLink):
            others[name] = f"a link to {link.path}"
            continue
        try:
            item = group[name.rpartition("/")[2]]
        except (KeyError, OSError, RuntimeError) as error:
            others[name] = f"not to be opened ({error})"
            continue
        if (other := seen.setdefault(_address(item), name)) != name:
            others[name] = f"another name of {other}"
        elif isinstance(item, h5py.Group):
            waiting += [(f"{name}/{key}", item) for key in sorted(item, reverse=True)]
        elif isinstance(item, h5py.Dataset):
            names.append(name)
    return names, others


def _address(item: Any) -> int:
    return int(h5py.h5o.get_info(item.id).addr)


def locate(path: Path, name: str) -> tuple[Path, str]:
    """Find the file and dataset that a name means, following links within the file's folder.

    Args:
        path: The file in which the name is looked up.
        name: With groups, separated by slashes.

    Raises:
        Error: There is none, or it is in another folder.
    """
    home, rest, links = path, [part for part in name.split("/") if part], 0
    while True:
        with open_file(home) as file:
            found = _follow(file, rest)
        if found is None:
            raise Error(f"{path} holds no dataset {name}.", hint="`h5ls -r` lists what it holds.")
        other, rest = found
        if other is None:
            return home, "/".join(rest)
        links += 1
        target = home.parent / other if other else home
        if links > MOST_LINKS:
            raise Error(
                f"{path}: the links of {name} lead nowhere.", hint="name the dataset itself."
            )
        if not _inside(target, path):
            raise Error(
                f"{path}: {name} leads to {target}, which is outside the file's folder.",
                hint="adopt that file itself.",
            )
        if not target.is_file():
            raise Error(
                f"{path}: {name} leads to {target}, which is not there.", hint="restore it."
            )
        home = target


def _follow(file: h5py.File, parts: list[str]) -> tuple[str | None, list[str]] | None:
    """Until a dataset (file None) or a link (its file, "" for this one); None: there is nothing."""
    group: Any = file
    for number, part in enumerate(parts):
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        below = parts[number + 1 :]
        if isinstance(link, h5py.ExternalLink):
            return link.filename, [p for p in link.path.split("/") if p] + below
        if isinstance(link, h5py.SoftLink):
            start = [] if link.path.startswith("/") else parts[:number]
            return "", start + [p for p in link.path.split("/") if p and p != "."] + below
        if link is None:
            return None
        try:
            group = group[part]
        except (KeyError, OSError, RuntimeError):
            return None
    return (None, parts) if isinstance(group, h5py.Dataset) else None


def _inside(target: Path, path: Path) -> bool:
    return target.resolve().is_relative_to(path.resolve().parent)


def open_dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    """Open a dataset whose other files, if it has any, are known to be there.

    HDF5 reads fill values, without a word, where they are not; and external storage may be any
    file.

    Args:
        file: Open.
        path: Of it.
        name: Of the dataset.

    Raises:
        Error: It is put together from files that are missing, too short, or in other folders.
        KeyError: There is none of this name.
    """
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    # Else names are relative to wherever the process happens to be.
    access.set_efile_prefix(os.fsencode(path.resolve().parent))
    dataset = h5py.Dataset(h5py.h5d.open(file.id, name.encode(), access))
    _check_sources(dataset, path, MOST_LINKS)
    return dataset


def _check_sources(dataset: h5py.Dataset, path: Path, depth: int) -> None:
    missing = dataset.nbytes if dataset.external else 0
    for name, offset, size in dataset.external or ():
        source = _source(path, dataset.name, os.fsdecode(name))
        length = min(int(size), missing)
        if source.stat().st_size < offset + length:
            raise _not_there(path, dataset.name, source, "which is shorter than it should be")
        missing -= length
    if missing:
        raise _not_there(path, dataset.name, path.parent, "which hold less than all of it")
    for part in dataset.virtual_sources() if dataset.is_virtual else ():
        if "%b" in part.file_name + part.dset_name:
            raise _not_there(
                path,
                dataset.name,
                Path(part.file_name),
                "which are numbered, however many there are",
            )
        name = part.file_name.replace("%%", "%")
        source = path if name == "." else _source(path, dataset.name, name)
        with open_file(source) as file:
            inner = file.get(part.dset_name.replace("%%", "%"))
            if not isinstance(inner, h5py.Dataset) or depth == 0:
                raise _not_there(path, dataset.name, source, f"which has no {part.dset_name}")
            _check_sources(inner, source, depth - 1)


def _source(path: Path, name: str, file: str) -> Path:
    source = path.parent / file
    if not _inside(source, path):
        raise _not_there(path, name, source, "which is outside the file's folder")
    if not source.is_file():
        raise _not_there(path, name, source, "which is not there")
    return source


def _not_there(path: Path, name: str, source: Path, why: str) -> Error:
    return Error(
        f"{path}: {name.lstrip('/')} is put together from {source}, {why}.",
        hint="HDF5 would read fill values: put all its files into one folder, or leave it out.",
    )
