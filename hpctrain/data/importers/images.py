"""Import images in folders by class, unpacked or in a tar: ``[.../][SPLIT/]CLASS/NAME.jpg``."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.folder_tree import HIDDEN, NOWHERE, is_hidden
from hpctrain.data.importers.folders import NO_CLASS, Place, folders_of, places
from hpctrain.data.importers.import_plan import (
    BLOCK_BYTES,
    Columns,
    Importer,
    ImportOptions,
    Items,
    Survey,
    runs_of,
    stamp,
)
from hpctrain.data.importers.pixels import SAID, SUFFIXES, bits, decode, open_image, unreadable
from hpctrain.data.importers.tar import contents, files_in, is_plain
from hpctrain.data.index import FieldSpec
from hpctrain.data.summary import Found
from hpctrain.data.writer import Column, Ragged
from hpctrain.errors import Error

ENCODED = FieldSpec("|u1", ragged=True)
PROBES = 64
"""Images that are looked at for what all are like, where each would have to be opened."""
MOST_BATCH = 1024
NO_IMAGE = "file that is no image by its name"


def is_image(name: str) -> bool:
    """Whether a file's name is an image's."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() in SUFFIXES and bool(stem)


def image_spec(data: bytes, where: str, options: ImportOptions) -> FieldSpec:
    """Return the field that an image is stored as.

    Args:
        data: The bytes of its file.
        where: What to call it in an error.
        options: How it is decoded, resized and stored.
    """
    pixels = decode(data, where, options.pixels, options.resize)
    return ENCODED if options.keep_encoded else FieldSpec(pixels.dtype.str, pixels.shape)


def image_column(
    images: Iterable[tuple[str, bytes]], count: int, spec: FieldSpec, options: ImportOptions
) -> Column:
    """Decode images into a column, each given by what it is called and the bytes of its file.

    Args:
        images: As they come.
        count: Of them.
        spec: What they are stored as.
        options: How they are decoded.

    Raises:
        Error: One cannot be read, or is not of the others' size or kind.
    """
    if spec.ragged:
        return Ragged.of([_checked(data, where) for where, data in images])
    shape, kind = spec.shape, spec.kind
    column = np.empty((count, *shape), kind)
    for row, (where, data) in enumerate(images):
        pixels = decode(data, where, options.pixels, options.resize)
        if pixels.shape != shape or pixels.dtype != kind:
            raise _unlike(pixels, spec, where)
        column[row] = pixels
    return column


def _unlike(pixels: NDArray[Any], spec: FieldSpec, where: str) -> Error:
    if pixels.shape[:2] != spec.shape[:2]:
        return Error(
            f"{where} is {_size(pixels.shape)}, others are {_size(spec.shape)}.",
            hint="give --resize N to scale all images to N x N.",
        )
    return Error(
        f"{where} has {pixels.shape[2]} channels of {pixels.dtype}, others have {spec.shape[2]} of "
        f"{spec.kind}.",
        hint="--pixels rgb or gray makes 8 bits of all but floats and 32-bit integers.",
    )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _checked(data: bytes, where: str) -> bytes:
    """Return the bytes of an image's file, if it begins as an image does."""
    try:
        open_image(data)
    except Exception as error:  # see decode
        raise unreadable(where, error) from error
    return data


def describe_pixels(images: Iterable[tuple[str, bytes]], options: ImportOptions) -> list[str]:
    """Describe for a summary what becomes of images' pixels, and what some of the images are.

    Args:
        images: Each by what it is called and the bytes of its file.
        options: How they are decoded and stored.
    """
    kinds: Counter[str] = Counter()
    frames = 0
    for where, data in images:
        try:
            image = open_image(data)
            kinds[bits(image)] += 1
            frames += getattr(image, "n_frames", 1) > 1
        except Exception as error:  # see decode
            raise unreadable(where, error) from error
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    stored = "the bytes of their files" if options.keep_encoded else SAID[options.pixels]
    if not options.keep_encoded and kinds.keys() & {"float", "32-bit integer"}:
        stored += "; floats and 32-bit integers, which have no range, as they are"
    upright = "" if options.keep_encoded else "; turned upright as EXIF says, of frames the first"
    return [
        f"images are stored as {stored}{upright}",
        f"of {sum(kinds.values())} images looked at: {listed}"
        + (f"; {frames} have several frames" if frames else ""),
    ]


def batch_rows(survey: Survey) -> int:
    """Return how many samples to read at a time."""
    total = sum(count for _, count in survey.runs)
    return min(MOST_BATCH, max(1, BLOCK_BYTES * total // max(1, survey.bytes)))


class Images(Importer):
    """An importer of images: what folders and tars of them have in common."""

    what = "images"

    @abstractmethod
    def find(self, found: Found) -> dict[str, list[Any]]:
        """List the images: what :meth:`fetch` needs of each, one list of which is "names".

        Args:
            found: Where to note what is no image.
        """

    @abstractmethod
    def fetch(self, details: dict[str, Any], items: Items) -> Iterator[tuple[str, bytes]]:
        """Yield what to call each of these images in an error, and the bytes of its file.

        Args:
            details: As :meth:`find` returned them.
            items: Numbers of images, rising.
        """

    @abstractmethod
    def seeks(self) -> bool:
        """Whether some images can be fetched without reading all that are before them."""

    @abstractmethod
    def stamp(self) -> list[list[Any]]:
        """Return what tells the source from what it was before."""

    @abstractmethod
    def encoded_bytes(self, details: dict[str, Any]) -> int:
        """Return the bytes of all images, as they are encoded."""

    def survey(self) -> Survey:
        """List the images; the first one says what size and kind all must have."""
        found = Found("images, the class by folder")
        lists = self.find(found)
        names: list[str] = lists["names"]
        if not names:
            seen = [f"{n} {why}" for why, (n, _) in found.left_out.items()]
            raise Error(
                f"{self.path} holds no images" + (f", but {', '.join(seen)}." if seen else "."),
                hint="it should hold [train/]CLASS/NAME.jpg and the like.",
            )
        heads = [name.rpartition("/")[0] for name in names]
        folders = {head: folders_of(f"{head}/") for head in sorted(set(heads))}
        where = places(
            list(folders.values()),
            str(self.path),
            classes=self.options.classes,
            told=self.options.names_tell_splits,
        )
        told = {head: where[folder] for head, folder in folders.items()}
        placed, kept = [], []
        for number, head in enumerate(heads):
            if (place := told[head]) is None:
                found.leave(NO_CLASS, names[number])
            else:
                placed.append(place)
                kept.append(number)
        details: dict[str, Any] = dict(lists)
        if len(kept) < len(names):
            details = {key: [values[number] for number in kept] for key, values in lists.items()}
        details["stamp"] = self.stamp()
        fields, attributes = self._labelled(placed, found, details)
        step = max(1, len(kept) // PROBES)
        some = np.arange(0, len(kept), step, dtype=np.int64)[: PROBES if self.seeks() else 1]
        probes = list(self.fetch(details, some))
        found.notes += describe_pixels(probes, self.options)
        spec = image_spec(probes[0][1], probes[0][0], self.options)
        total = self.encoded_bytes(details) if spec.ragged else spec.row_bytes * len(kept)
        return Survey(
            runs=runs_of(place.split for place in placed),
            fields={"image": spec, **fields},
            bytes=total + 8 * len(kept),
            attributes=attributes,
            details=details,
            found=found,
        )

    def _labelled(
        self, placed: list[Place], found: Found, details: dict[str, Any]
    ) -> tuple[dict[str, FieldSpec], dict[str, Any]]:
        counts = Counter(place.label for place in placed if place.label is not None)
        if not counts:
            found.kind = "images without classes"
            return {}, {}
        classes = sorted(counts)
        numbers = {label: number for number, label in enumerate(classes)}
        details["labels"] = [numbers[place.label] for place in placed if place.label is not None]
        found.classes = {label: counts[label] for label in classes}
        return {"label": FieldSpec("<i8")}, {"classes": classes}

    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Yield the samples of these numbers: images, decoded or not, and labels.

        Args:
            survey: As found.
            items: Numbers in the source's own order, rising.
        """
        images = self.fetch(survey.details, items)
        labels = np.array(survey.details.get("labels", ()), dtype=np.int64)
        rows = batch_rows(survey)
        for start in range(0, len(items), rows):
            part = items[start : start + rows]
            batch = islice(images, len(part))
            spec = survey.fields["image"]
            columns: Columns = {"image": image_column(batch, len(part), spec, self.options)}
            if "label" in survey.fields:
                columns["label"] = labels[part]
            yield columns


class FolderImages(Images):
    """An importer of a folder of images."""

    def find(self, found: Found) -> dict[str, list[Any]]:
        """List the images by walking through the folder."""
        for why, name in self.tree.left_out:
            if why == NOWHERE and is_image(name):
                raise Error(
                    f"{self.path / name} is a link that leads nowhere.",
                    hint="mend it, or remove it.",
                )
            found.leave(why, name)
        names = []
        for name in self.tree.files:
            if is_image(name):
                names.append(name)
            else:
                found.leave(NO_IMAGE, name)
        return {"names": names}

    def seeks(self) -> bool:
        """Tell that any file can be read without reading those before it."""
        return True

    def stamp(self) -> list[list[Any]]:
        """Return nothing: names alone tell one folder from another.

        An image may be mended between two runs.
        """
        return []

    def fetch(self, details: dict[str, Any], items: Items) -> Iterator[tuple[str, bytes]]:
        """Read the images' files one by one.

        Args:
            details: As :meth:`find` returned them.
            items: Numbers of images.
        """
        names = details["names"]
        folder = str(self.path)
        for item in items.tolist():
            path = f"{folder}/{names[item]}"
            yield path, _content(path)

    def encoded_bytes(self, details: dict[str, Any]) -> int:
        """Estimate the bytes of all images from the sizes of some files."""
        names: list[str] = details["names"]
        probes = names[:: max(1, len(names) // PROBES)]
        size = sum((self.path / name).stat().st_size for name in probes)
        return size * len(names) // len(probes)


def _content(path: str) -> bytes:
    # Three system calls; a file object would take as long as a tenth of decoding a small image.
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # nor wait at a pipe
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
    """An importer of a tar of a folder of images."""

    def find(self, found: Found) -> dict[str, list[Any]]:
        """List the images by one pass over the headers, in the order in which a pass reads them."""
        members = []
        for member in files_in(self.path, found):
            if any(map(is_hidden, member.name.removeprefix("./").split("/"))):
                found.leave(HIDDEN, member.name)
            elif is_image(member.name):
                members.append(member)
            else:
                found.leave(NO_IMAGE, member.name)
        members.sort(key=lambda member: member.offset)
        return {
            "names": [member.name for member in members],
            "offsets": [member.offset for member in members],
            "sizes": [member.size for member in members],
        }

    def fetch(self, details: dict[str, Any], items: Items) -> Iterator[tuple[str, bytes]]:
        """Read the images in one pass over the tar.

        Args:
            details: As :meth:`find` returned them.
            items: Numbers of images, rising.
        """
        names, offsets, sizes = (details[key] for key in ("names", "offsets", "sizes"))
        numbers = items.tolist()
        wanted = ((offsets[item], sizes[item]) for item in numbers)
        for item, data in zip(numbers, contents(self.path, wanted), strict=True):
            yield f"{names[item]} in {self.path}", data

    def seeks(self) -> bool:
        """Tell whether the tar is not compressed, so that any image can be read by itself."""
        return is_plain(self.path)

    def stamp(self) -> list[list[Any]]:
        """Return what tells the tar from what it was before."""
        return stamp(self.path)

    def encoded_bytes(self, details: dict[str, Any]) -> int:
        """Return the bytes of all images, as the headers give them."""
        return int(sum(details["sizes"]))
