"""Images in folders by class, unpacked or in a tar: ``[.../][SPLIT/]CLASS/NAME.jpg``."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hpctrain.data.importers.jpeg import decode_jpeg
from hpctrain.data.importers.plan import (
    BLOCK_BYTES,
    Columns,
    Importer,
    ImportOptions,
    Items,
    Survey,
    runs_of,
    stamp,
)
from hpctrain.data.importers.tar import contents, members
from hpctrain.data.index import FieldSpec
from hpctrain.data.splits import split_in
from hpctrain.data.writer import Column, Ragged
from hpctrain.errors import Error

SUFFIXES = frozenset({"jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "webp"})
ENCODED = FieldSpec("|u1", ragged=True)
PROBES = 64
"""Images whose sizes tell those of all, where each would have to be asked for its own."""
MOST_BATCH = 1024


def is_image(name: str) -> bool:
    """Whether a file's name is an image's; hidden files are none."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() in SUFFIXES and bool(stem) and stem[0] != "."


def folders_of(name: str) -> list[str]:
    """The folders that a file is in."""
    return [part for part in name.split("/")[:-1] if part not in ("", ".")]


def decode(data: bytes, where: str, resize: int | None) -> NDArray[np.uint8]:
    """An image's pixels: uint8 of shape (height, width, 3).

    Raises:
        Error: It is not a readable image.
    """
    try:
        image = decode_jpeg(data) or Image.open(io.BytesIO(data))
        if image.mode != "RGB":
            image = image.convert("RGB")
        if resize is not None:
            image = image.resize((resize, resize), Image.Resampling.BICUBIC)
        return np.asarray(image)
    except Exception as error:  # what a plug-in of Pillow's raises is anyone's guess
        raise _unreadable(where, error) from error


def image_spec(data: bytes, where: str, options: ImportOptions) -> FieldSpec:
    """What an image is stored as."""
    pixels = decode(data, where, options.resize)
    return ENCODED if options.keep_encoded else FieldSpec("|u1", pixels.shape)


def image_column(
    images: Iterable[tuple[str, bytes]], count: int, spec: FieldSpec, resize: int | None
) -> Column:
    """A column of images, each given by what it is called and the bytes of its file.

    Raises:
        Error: One cannot be read, or is not of the others' size.
    """
    if spec.ragged:
        return Ragged.of([_checked(data, where) for where, data in images])
    column = np.empty((count, *spec.shape), np.uint8)
    for row, (where, data) in enumerate(images):
        pixels = decode(data, where, resize)
        if pixels.shape != spec.shape:
            raise Error(
                f"{where} is {_size(pixels.shape)}, others are {_size(spec.shape)}.",
                hint="give --resize N to scale all images to N x N.",
            )
        column[row] = pixels
    return column


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _checked(data: bytes, where: str) -> bytes:
    """The same, if it begins as an image does."""
    try:
        Image.open(io.BytesIO(data))
    except Exception as error:  # see decode
        raise _unreadable(where, error) from error
    return data


def _unreadable(where: str, error: Exception) -> Error:
    # Pillow's own words for this one end in an address in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    why = "it has no format that Pillow knows" if unknown else error
    return Error(f"{where} is not a readable image: {why}.", hint="mend it, or remove it.")


def batch_rows(survey: Survey) -> int:
    """Samples to read at a time."""
    total = sum(count for _, count in survey.runs)
    return min(MOST_BATCH, max(1, BLOCK_BYTES * total // max(1, survey.bytes)))


class Images(Importer):
    """What folders and tars of images have in common."""

    what = "images"

    @abstractmethod
    def find(self) -> tuple[list[str], dict[str, Any]]:
        """The names of all files, and what :meth:`fetch` needs beside the images' names."""

    @abstractmethod
    def fetch(self, details: dict[str, Any], items: Items) -> Iterator[tuple[str, bytes]]:
        """What to call each of these images in an error, and the bytes of its file."""

    @abstractmethod
    def encoded_bytes(self, details: dict[str, Any]) -> int:
        """Of all images, as they are encoded."""

    def survey(self) -> Survey:
        """List the images; the first one says what size all must have."""
        names, details = self.find()
        places = [_place(name) for name in names]
        if not places:
            raise Error(
                f"{self.path} holds no images.",
                hint="it should hold [train/]CLASS/NAME.jpg and the like.",
            )
        classes = sorted({label for _, label in places})
        runs = runs_of(split for split, _ in places)
        ((where, first),) = self.fetch(details, np.zeros(1, dtype=np.int64))
        spec = image_spec(first, where, self.options)
        total = self.encoded_bytes(details) if spec.ragged else spec.row_bytes * len(names)
        return Survey(
            runs=runs,
            fields={"image": spec, "label": FieldSpec("<i8")},
            bytes=total + 8 * len(names),
            attributes={"classes": classes},
            details=details,
        )

    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Decode them, or not."""
        numbers = {name: number for number, name in enumerate(survey.attributes["classes"])}
        labels = np.array([numbers[_place(name)[1]] for name in survey.details["names"]])
        images = self.fetch(survey.details, items)
        rows = batch_rows(survey)
        for start in range(0, len(items), rows):
            part = items[start : start + rows]
            batch = islice(images, len(part))
            spec = survey.fields["image"]
            yield {
                "image": image_column(batch, len(part), spec, self.options.resize),
                "label": labels[part],
            }


def _place(name: str) -> tuple[str, str]:
    """Split ("" for none) and class of ``[.../][SPLIT/]CLASS/NAME.jpg``."""
    return _place_of(name.rpartition("/")[0])


@cache
def _place_of(folder: str) -> tuple[str, str]:
    *outer, label = folders_of(f"{folder}/")
    return split_in(outer[-1:]), label


class FolderImages(Images):
    """A folder of images."""

    def find(self) -> tuple[list[str], dict[str, Any]]:
        """Names alone tell one folder from another: an image may be mended between two runs."""
        names = _files(str(self.path), "")
        return names, {"names": names}

    def fetch(self, details: dict[str, Any], items: Items) -> Iterator[tuple[str, bytes]]:
        """Read the files."""
        names = details["names"]
        folder = str(self.path)
        for item in items.tolist():
            path = f"{folder}/{names[item]}"
            yield path, _content(path)

    def encoded_bytes(self, details: dict[str, Any]) -> int:
        """By asking some."""
        names: list[str] = details["names"]
        probes = names[:: max(1, len(names) // PROBES)]
        size = sum((self.path / name).stat().st_size for name in probes)
        return size * len(names) // len(probes)


def _files(folder: str, prefix: str) -> list[str]:
    """The images below a folder that have a class."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise Error(f"cannot list {folder}: {error.strerror}.", hint="may you read it?") from error
    names = []
    for entry in entries:
        if entry.is_dir():
            if entry.is_symlink() and Path(folder).resolve().is_relative_to(Path(entry).resolve()):
                raise Error(f"{entry.path} leads back to where it is.", hint="remove this link.")
            names += _files(entry.path, f"{prefix}{entry.name}/")
        elif prefix and is_image(entry.name):
            names.append(prefix + entry.name)
    return names


def _content(path: str) -> bytes:
    # Three system calls; a file object would take as long as a tenth of decoding a small image.
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            data = part = os.read(file, 2**16)
            if len(part) == 2**16:
                parts = [data]
                while part := os.read(file, 2**20):
                    parts.append(part)
                data = b"".join(parts)
        finally:
            os.close(file)
    except OSError as error:
        raise Error(
            f"cannot read {path}: {error.strerror}.", hint="has it been moved? may you read it?"
        ) from error
    return data


class TarImages(Images):
    """A tar of a folder of images."""

    def find(self) -> tuple[list[str], dict[str, Any]]:
        """By one pass over the headers."""
        found = [
            member
            for member in members(self.path)
            if is_image(member.name) and folders_of(member.name)
        ]
        names = [member.name for member in found]
        return names, {
            "stamp": stamp(self.path),
            "names": names,
            "offsets": [member.offset for member in found],
            "sizes": [member.size for member in found],
        }

    def fetch(self, details: dict[str, Any], items: Items) -> Iterator[tuple[str, bytes]]:
        """By one pass over what is wanted."""
        names, offsets, sizes = (details[key] for key in ("names", "offsets", "sizes"))
        numbers = items.tolist()
        wanted = ((offsets[item], sizes[item]) for item in numbers)
        for item, data in zip(numbers, contents(self.path, wanted), strict=True):
            yield f"{names[item]} in {self.path}", data

    def encoded_bytes(self, details: dict[str, Any]) -> int:
        """As the headers say."""
        return int(sum(details["sizes"]))
