"""Turning what people have into a shard set: image folders and tars, npz, text."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpctrain.data.order import EpochOrder
from hpctrain.data.shards import SHARD_BYTES, ShardSet, ShardWriter
from hpctrain.errors import Error
from hpctrain.progress import progress

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
SPLITS = {
    "train": "train",
    "test": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
BATCH = 1024


@dataclass(frozen=True)
class ImportOptions:
    """How to import.

    Attributes:
        shard_bytes: About the size of a shard.
        resize: Height and width that images are scaled to; None: they must be of one size.
        validation_fraction: Part of the samples that become the split ``validation`` where the
            data have no splits of their own.
        sequence_length: Characters a text sample predicts; it holds one more.
        seed: Chooses the validation samples.
    """

    shard_bytes: int = SHARD_BYTES
    resize: int | None = None
    validation_fraction: float = 0.1
    sequence_length: int = 128
    seed: int = 0


def import_data(source: Path, destination: Path, options: ImportOptions) -> ShardSet:
    """Make a shard set of an image folder, a tar of one, an npz, or a text file.

    Raises:
        Error: The source is none of these, or something in it cannot be read; no index is written.
    """
    if not source.exists():
        raise Error(f"{source} does not exist.", hint="check the path.")
    with ShardWriter(destination, shard_bytes=options.shard_bytes) as writer:
        if source.is_dir():
            _import_images(_folder_images(source), writer, options, str(source))
        elif source.suffix == ".npz":
            _import_npz(source, writer, options)
        elif tarfile.is_tarfile(source):
            _import_images(_tar_images(source), writer, options, str(source))
        elif source.suffix in (".txt", ".md", ""):
            _import_text(source, writer, options)
        else:
            raise Error(
                f"{source} is of a kind that cannot be imported.",
                hint="give a folder of images, a tar of one, an .npz, or a .txt file.",
            )
    return ShardSet(destination)


# An image to come: where it is (for errors), its split or None, its class, and its bytes.
_Image = tuple[str, str | None, str, bytes]


def _place(path: PurePosixPath) -> tuple[str | None, str] | None:
    """Split and class of ``[.../][SPLIT/]CLASS/NAME.jpg``; None where it is no image."""
    if path.suffix.lower() not in IMAGE_SUFFIXES or len(path.parts) < 2:
        return None
    split = SPLITS.get(path.parts[-3].lower()) if len(path.parts) >= 3 else None
    return split, path.parts[-2]


def _folder_images(folder: Path) -> tuple[list[PurePosixPath], Iterator[_Image]]:
    names = sorted(
        PurePosixPath(file.relative_to(folder).as_posix())
        for file in folder.rglob("*")
        if file.is_file()
    )

    def images() -> Iterator[_Image]:
        for name in names:
            if place := _place(name):
                yield (f"{folder / name}", *place, (folder / name).read_bytes())

    return names, images()


def _tar_images(archive: Path) -> tuple[list[PurePosixPath], Iterator[_Image]]:
    with _readable(archive), tarfile.open(archive) as tar:
        names = [PurePosixPath(member.name) for member in tar if member.isfile()]

    def images() -> Iterator[_Image]:
        with _readable(archive), tarfile.open(archive) as tar:
            for member in tar:
                place = _place(PurePosixPath(member.name)) if member.isfile() else None
                file = tar.extractfile(member) if place else None
                if place and file:
                    yield (f"{member.name} in {archive}", *place, file.read())

    return names, images()


class _readable:  # noqa: N801 - reads as a statement
    """Turns the ways in which an archive can be broken into one error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError)):
            raise Error(
                f"{self.path} cannot be read to its end: {error}.",
                hint="it is damaged or incomplete; fetch it again.",
            ) from error


def _import_images(
    found: tuple[list[PurePosixPath], Iterator[_Image]],
    writer: ShardWriter,
    options: ImportOptions,
    source: str,
) -> None:
    names, images = found
    places = [place for name in names if (place := _place(name))]
    if not places:
        raise Error(
            f"{source} holds no images.", hint="it should hold [train/]CLASS/NAME.jpg and the like."
        )
    classes = sorted({label for _, label in places})
    labels = {name: number for number, name in enumerate(classes)}
    writer.attributes = {"classes": classes}
    chosen = _validation(len(places), options) if places[0][0] is None else frozenset()
    batches: dict[str, tuple[list[NDArray[Any]], list[int]]] = {}
    shape: tuple[int, ...] | None = None
    for number, (where, split, label, data) in enumerate(
        progress(images, what="images", total=len(places))
    ):
        array = _decode(data, where, options.resize)
        if shape is not None and array.shape != shape:
            raise Error(
                f"{where} is {array.shape[1]}x{array.shape[0]}, others are {shape[1]}x{shape[0]}.",
                hint="give --resize N to scale all images to N x N.",
            )
        shape = array.shape
        split = split or ("validation" if number in chosen else "train")
        arrays, numbers = batches.setdefault(split, ([], []))
        arrays.append(array)
        numbers.append(labels[label])
        if len(arrays) == BATCH:
            _write_images(writer, split, batches.pop(split))
    for split in list(batches):
        _write_images(writer, split, batches.pop(split))


def _write_images(
    writer: ShardWriter, split: str, batch: tuple[list[NDArray[Any]], list[int]]
) -> None:
    writer.write(split, {"image": np.stack(batch[0]), "label": np.array(batch[1], dtype=np.int64)})


def _decode(data: bytes, where: str, resize: int | None) -> NDArray[np.uint8]:
    """An image's pixels: uint8 of shape (height, width, 3)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.convert("RGB")
            if resize is not None:
                pixels = pixels.resize((resize, resize), Image.Resampling.BICUBIC)
            return np.asarray(pixels)
    except (OSError, SyntaxError, ValueError) as error:
        raise Error(
            f"{where} is not a readable image: {error}.", hint="remove or mend it."
        ) from error


def _validation(samples: int, options: ImportOptions) -> frozenset[int]:
    """Which samples become the validation split."""
    count = round(samples * options.validation_fraction)
    order = EpochOrder(samples, options.seed, epoch=0)
    return frozenset(order.indices(0, count).tolist())


def _import_npz(source: Path, writer: ShardWriter, options: ImportOptions) -> None:
    """Arrays with one row a sample; ``train_x``/``x_test`` style names give the splits."""
    with _readable(source):
        try:
            with np.load(source, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except ValueError as error:
            raise Error(f"{source}: {error}.", hint="store plain arrays, not objects.") from error
    splits: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        split, field = _split_of(name)
        splits.setdefault(split, {})[field] = array
    for split, fields in splits.items():
        lengths = {name: array.shape[0] if array.ndim else 0 for name, array in fields.items()}
        if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
            raise Error(
                f"{source}: arrays of a split must be equally long, but have {lengths} rows.",
                hint="one row a sample, in arrays such as x and y, or x_train, y_train, x_test.",
            )
        if list(splits) == [""]:
            samples = next(iter(lengths.values()))
            held = np.zeros(samples, dtype=bool)
            held[list(_validation(samples, options))] = True
            _write_rows(writer, "train", {name: array[~held] for name, array in fields.items()})
            _write_rows(writer, "validation", {name: array[held] for name, array in fields.items()})
        else:
            _write_rows(writer, split or "train", fields)


def _split_of(name: str) -> tuple[str, str]:
    """``train_x``, ``x_train`` and ``train/x`` are field x of split train; ``x`` has no split."""
    parts = name.replace("/", "_").split("_")
    for place in (0, -1):
        if len(parts) > 1 and parts[place].lower() in SPLITS:
            split = SPLITS[parts.pop(place).lower()]
            return split, "_".join(parts)
    return "", name


def _write_rows(writer: ShardWriter, split: str, fields: dict[str, NDArray[Any]]) -> None:
    rows = len(next(iter(fields.values())))
    for start in _steps(rows, split):
        writer.write(split, {name: array[start : start + BATCH] for name, array in fields.items()})


def _steps(rows: int, what: str) -> Iterable[int]:
    return progress(range(0, rows, BATCH), what=f"{what} (x{BATCH})", total=-(-rows // BATCH))


def _import_text(source: Path, writer: ShardWriter, options: ImportOptions) -> None:
    """Bytes in rows of ``sequence_length + 1``, each row's last byte the next one's first.

    The end of the text is the validation split: text drawn at random would be its neighbours' twin.
    """
    try:
        text = np.frombuffer(source.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise Error(f"cannot read {source}: {error.strerror}.", hint="check the path.") from error
    length = options.sequence_length
    rows = (len(text) - 1) // length
    validation = round(rows * options.validation_fraction)
    if rows - validation < 1:
        raise Error(
            f"{source} is too short for one sample of {length + 1} bytes.",
            hint="give a longer text or a smaller --sequence-length.",
        )
    windows = np.lib.stride_tricks.sliding_window_view(text, length + 1)[::length][:rows]
    _write_rows(writer, "train", {"tokens": windows[: rows - validation]})
    if validation:
        _write_rows(writer, "validation", {"tokens": windows[rows - validation :]})
