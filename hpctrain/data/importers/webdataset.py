"""Import WebDataset tars: a sample's members stand side by side, named alike up to the first dot.

``0001.jpg``, ``0001.cls`` and ``0001.json`` are one sample.
https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.folder_tree import HIDDEN, is_hidden
from hpctrain.data.importers.arrays import check_type, in_order, npy_head
from hpctrain.data.importers.folders import folders_of
from hpctrain.data.importers.images import (
    batch_rows,
    describe_pixels,
    image_column,
    image_spec,
    is_image,
)
from hpctrain.data.importers.import_plan import Columns, Importer, Items, Survey, runs_of, stamp
from hpctrain.data.importers.pixels import SUFFIXES
from hpctrain.data.importers.tar import TARS, Member, contents, files_in, members
from hpctrain.data.index import FieldSpec
from hpctrain.data.splits import splits_of_files
from hpctrain.data.summary import Found
from hpctrain.data.writer import Column, Ragged
from hpctrain.errors import Error

BYTES = FieldSpec("|u1", ragged=True)
MOST_LABEL_BYTES = 30


ARCHIVES = frozenset({"tar", "zip", "tgz", "tar.gz", "tar.bz2", "tar.xz", "tar.zst", "7z", "rar"})


def is_webdataset(path: Path) -> bool:
    """Whether a tar's first image has company of another kind, or no folder to name its class."""
    shown = (member for member in members(path) if not _is_hidden(member))
    for _, group in groupby(shown, key=lambda member: _key(member.name)[0]):
        names = [member.name for member in group]
        images = [name for name in names if is_image(name)]
        if images:
            return len(images) < len(names) or not folders_of(images[0])
    return True


def _key(name: str) -> tuple[str, str]:
    """What a sample's members have in common, and what tells them apart."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _field(extension: str, images: int) -> str:
    """Return the field's name of a member, where so many of its sample's members are images."""
    if extension in SUFFIXES and images == 1:
        return "image"
    return "label" if extension == "cls" else extension.replace(".", "_")


def _is_array(field: str) -> bool:
    return field == "npy" or field.endswith("_npy")


class WebDataset(Importer):
    """An importer of one tar, or a folder of them, whose names may tell their split."""

    def _names(self) -> list[str]:
        if not self.path.is_dir():
            return [""]
        return [name for name in self.tree.files if name.lower().endswith(TARS)]

    def survey(self) -> Survey:
        """List the members; the first sample says what all must have."""
        names = self._names()
        found = Found("WebDataset, a sample the members that stand side by side")
        if self.path.is_dir():
            for why, name in self.tree.left_out:
                found.leave(why, name)
            for name in sorted(set(self.tree.files) - set(names)):
                found.leave("no tar", name)
        told = splits_of_files(
            names if self.path.is_dir() else [self.path.name],
            str(self.path),
            told=self.options.names_tell_splits,
        )
        keys: list[list[str]] = []
        splits: list[str] = []
        places: dict[str, tuple[list[int], list[int]]] = {}  # field -> offsets and sizes
        for name, split in zip(names, told, strict=True):
            tar = self.path / name
            keys.append([])
            for key, group in groupby(_shown(tar, found), key=lambda m: _key(m.name)[0]):
                where = f"sample {key} in {tar}"
                sample = _sample(list(group), where)
                self._refuse_archives(sample, key, tar)
                if places and sample.keys() != places.keys():
                    raise Error(
                        f"{where} has {', '.join(sorted(sample))}; others have "
                        f"{', '.join(sorted(places))}.",
                        hint="every sample needs the same members, side by side in the tar.",
                    )
                for field, (offset, size) in sample.items():
                    offsets, sizes = places.setdefault(field, ([], []))
                    offsets.append(offset)
                    sizes.append(size)
                keys[-1].append(key)
                splits.append(split)
        if not places:
            raise Error(f"{self.path} holds no samples.", hint="is it the right tar?")
        for field in self.options.fields:
            if field not in places:
                raise Error(
                    f"{self.path} holds no member {field}.",
                    hint=f"--fields takes some of {', '.join(places)}.",
                )
        for field in set(places) - set(self.options.fields) if self.options.fields else ():
            found.leave("member that was not asked for", field, len(splits))
            del places[field]
        details: dict[str, Any] = {
            "stamp": stamp(*(self.path / name for name in names)),
            "tars": names,
            "keys": keys,
            "places": places,
        }
        fields = {name: self._spec(name, details, found) for name in places}
        folders = {"/".join(folders_of(key)) for group in keys for key in group}
        if "label" not in places and len(folders) > 1:
            found.notes.append(
                f"the {len(folders)} folders that samples are in name no classes here; where they "
                "do, --kind images takes the images alone"
            )
        return Survey(
            runs=runs_of(splits),
            fields=fields,
            bytes=sum(
                8 * len(splits) + sum(places[name][1])
                if spec.ragged
                else spec.row_bytes * len(splits)
                for name, spec in fields.items()
            ),
            details=details,
            found=found,
        )

    def _refuse_archives(self, sample: dict[str, tuple[int, int]], key: str, tar: Path) -> None:
        if all(field.replace("_", ".") in ARCHIVES for field in sample):
            raise Error(
                f"{tar} holds nothing but archives, such as {key}.{next(iter(sample))}.",
                hint="unpack it, and import what it holds: archives of one class each into folders "
                "of these names.",
            )

    def _spec(self, name: str, details: dict[str, Any], found: Found) -> FieldSpec:
        (sample,) = self._samples(details, np.zeros(1, dtype=np.int64))
        where, data = sample[name]
        if name == "image":
            found.notes += describe_pixels([(where, data)], self.options)
            return image_spec(data, where, self.options)
        if name == "label":
            return FieldSpec("<i8")
        if _is_array(name):
            array = _array(data, where)
            sizes = set(details["places"][name][1])
            if len(sizes) > 1 and array.ndim:  # sequences of several lengths
                return FieldSpec(array.dtype.str, array.shape[1:], ragged=True)
            return FieldSpec(array.dtype.str, array.shape)
        return BYTES

    def _samples(
        self, details: dict[str, Any], items: Items
    ) -> Iterator[dict[str, tuple[str, bytes]]]:
        """Yield for each sample, field -> what to call it in an error, and its bytes."""
        keys = [key for tar in details["keys"] for key in tar]
        places = details["places"]
        tars = [self.path / name for name in details["tars"]]
        ends = np.cumsum([len(group) for group in details["keys"]])
        for tar, end, count in zip(tars, ends, map(len, details["keys"]), strict=True):
            begin, stop = np.searchsorted(items, [end - count, end])
            parts = [
                (offset, size, item, name)
                for item in items[begin:stop].tolist()
                for offset, size, name in sorted(
                    (offsets[item], sizes[item], name) for name, (offsets, sizes) in places.items()
                )
            ]
            if not parts:
                continue
            stream = contents(tar, ((offset, size) for offset, size, _, _ in parts))
            named = (
                (item, name, f"{name} of sample {keys[item]} in {tar}", data)
                for (_, _, item, name), data in zip(parts, stream, strict=True)
            )
            for _, sample in groupby(named, key=lambda part: part[0]):
                yield {name: (where, data) for _, name, where, data in sample}

    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Yield the samples of these numbers, in one pass over each tar.

        Args:
            survey: As found.
            items: Numbers of samples, rising.
        """
        samples = self._samples(survey.details, items)
        rows = batch_rows(survey)
        while batch := list(islice(samples, rows)):
            yield {
                name: self._column(name, [sample[name] for sample in batch], spec)
                for name, spec in survey.fields.items()
            }

    def _column(self, name: str, parts: list[tuple[str, bytes]], spec: FieldSpec) -> Column:
        if name == "image":
            return image_column(parts, len(parts), spec, self.options)
        if name == "label":
            return np.array([_label(data, where) for where, data in parts], dtype=np.int64)
        if not _is_array(name):
            return Ragged.of([data for _, data in parts])
        arrays = []
        for where, data in parts:
            array = _array(data, where)
            shape = array.shape[1:] if spec.ragged and array.ndim else array.shape
            if shape != spec.shape or array.dtype != spec.kind:
                raise Error(
                    f"{where} is {array.dtype}{array.shape}, others are {spec}.",
                    hint="arrays of all samples must be of one type, and of one shape but for "
                    "their length.",
                )
            arrays.append(array)
        return Ragged.of(arrays) if spec.ragged else np.stack(arrays)


def _is_hidden(member: Member) -> bool:
    return any(map(is_hidden, member.name.removeprefix("./").split("/")))


def _shown(tar: Path, found: Found) -> Iterator[Member]:
    for member in files_in(tar, found):
        if _is_hidden(member):
            found.leave(HIDDEN, member.name)
        else:
            yield member


def _sample(group: list[Member], where: str) -> dict[str, tuple[int, int]]:
    """Field -> offset and size. Where a sample has several images, each keeps its extension."""
    sample: dict[str, tuple[int, int]] = {}
    extensions = [_key(member.name)[1] for member in group]
    images = sum(extension in SUFFIXES for extension in extensions)
    for member, extension in zip(group, extensions, strict=True):
        name = _field(extension, images)
        if not name or name in sample:
            raise Error(
                f"{where} has two members for {name}." if name else f"{where} has no extension.",
                hint="a sample has one member of each kind, such as 0001.jpg and 0001.cls.",
            )
        sample[name] = (member.offset, member.size)
    return sample


def _label(data: bytes, where: str) -> int:
    try:
        number = int(data[:MOST_LABEL_BYTES])
    except ValueError:
        number = 2**63
    if len(data) > MOST_LABEL_BYTES or not -(2**63) <= number < 2**63:
        raise Error(
            f"{where} is {data[:20]!r}, not a number.", hint="a .cls holds the class's number."
        )
    return number


def _array(data: bytes, where: str) -> NDArray[Any]:
    file = io.BytesIO(data)
    try:
        shape, fortran, dtype = npy_head(file, len(data))
        check_type(dtype, where)
        order: Literal["F", "C"] = "F" if fortran else "C"
        return in_order(np.ndarray(shape, dtype, data, file.tell(), order=order))
    except (ValueError, EOFError) as error:
        raise Error(
            f"{where} is not a readable array: {error}.", hint="remove or mend it."
        ) from error
