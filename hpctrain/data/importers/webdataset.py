"""WebDataset tars: the members of a sample stand side by side, named alike up to the first dot.

``0001.jpg``, ``0001.cls`` and ``0001.json`` are one sample.
https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.importers.images import (
    SUFFIXES,
    batch_rows,
    folders_of,
    image_column,
    image_spec,
    is_image,
)
from hpctrain.data.importers.plan import (
    Columns,
    Importer,
    Items,
    Survey,
    runs_of,
    stamp,
)
from hpctrain.data.importers.tar import Member, contents, members
from hpctrain.data.index import FieldSpec
from hpctrain.data.splits import split_in_name
from hpctrain.data.writer import Column, Ragged
from hpctrain.errors import Error

BYTES = FieldSpec("|u1", ragged=True)


def is_webdataset(path: Path) -> bool:
    """Whether a tar's first image has company of another kind, or no folder to name its class."""
    for _, group in groupby(members(path), key=lambda member: _key(member.name)[0]):
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


def _field(extension: str) -> str:
    if extension in SUFFIXES:
        return "image"
    return "label" if extension == "cls" else extension.replace(".", "_")


class WebDataset(Importer):
    """One tar, or a folder of them; a tar's name may tell its split (``train-0001.tar``)."""

    def _tars(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        return sorted(
            file for file in self.path.iterdir() if ".tar" in file.name or file.suffix == ".tgz"
        )

    def survey(self) -> Survey:
        """List the members; the first sample says what all must have."""
        tars = self._tars()
        keys: list[list[str]] = []
        splits: list[str] = []
        places: dict[str, tuple[list[int], list[int]]] = {}  # field -> offsets and sizes
        for tar in tars:
            split = split_in_name(tar.name.partition(".tar")[0])
            found = (member for member in members(tar) if not _is_hidden(member))
            keys.append([])
            for key, group in groupby(found, key=lambda member: _key(member.name)[0]):
                where = f"sample {key} in {tar}"
                sample = _sample(list(group), where)
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
        details = {
            "stamp": stamp(*tars),
            "keys": keys,
            "places": places,
        }
        fields = {name: self._spec(name, details) for name in places}
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
        )

    def _spec(self, name: str, details: dict[str, Any]) -> FieldSpec:
        (sample,) = self._samples(details, np.zeros(1, dtype=np.int64))
        where, data = sample[name]
        if name == "image":
            return image_spec(data, where, self.options)
        if name == "label":
            return FieldSpec("<i8")
        if name == "npy":
            array = _array(data, where)
            return FieldSpec(array.dtype.str, array.shape)
        return BYTES

    def _samples(
        self, details: dict[str, Any], items: Items
    ) -> Iterator[dict[str, tuple[str, bytes]]]:
        """Of each sample, field -> what to call it in an error, and its bytes."""
        keys = [key for tar in details["keys"] for key in tar]
        places = details["places"]
        tars = self._tars()
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
        """In one pass."""
        samples = self._samples(survey.details, items)
        rows = batch_rows(survey)
        while batch := list(islice(samples, rows)):
            yield {
                name: self._column(name, [sample[name] for sample in batch], spec)
                for name, spec in survey.fields.items()
            }

    def _column(self, name: str, parts: list[tuple[str, bytes]], spec: FieldSpec) -> Column:
        if name == "image":
            return image_column(parts, len(parts), spec, self.options.resize)
        if name == "label":
            return np.array([_label(data, where) for where, data in parts], dtype=np.int64)
        if name != "npy":
            return Ragged.of([data for _, data in parts])
        column = np.empty((len(parts), *spec.shape), spec.kind)
        for row, (where, data) in enumerate(parts):
            array = _array(data, where)
            if array.shape != spec.shape or array.dtype != spec.kind:
                raise Error(
                    f"{where} is {array.dtype}{array.shape}, others are {spec.kind}{spec.shape}.",
                    hint="arrays of all samples must be of one type and shape.",
                )
            column[row] = array
        return column


def _is_hidden(member: Member) -> bool:
    return member.name.rpartition("/")[2].startswith(".")


def _sample(group: list[Member], where: str) -> dict[str, tuple[int, int]]:
    """Field -> offset and size."""
    sample: dict[str, tuple[int, int]] = {}
    for member in group:
        name = _field(_key(member.name)[1])
        if not name or name in sample:
            raise Error(
                f"{where} has two members for {name}." if name else f"{where} has no extension.",
                hint="a sample has one member of each kind, such as 0001.jpg and 0001.cls.",
            )
        sample[name] = (member.offset, member.size)
    return sample


def _label(data: bytes, where: str) -> int:
    try:
        return int(data)
    except ValueError as error:
        raise Error(
            f"{where} is {data[:20]!r}, not a number.", hint="a .cls holds the class's number."
        ) from error


def _array(data: bytes, where: str) -> NDArray[Any]:
    try:
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise Error(
            f"{where} is not a readable array: {error}.", hint="remove or mend it."
        ) from error
