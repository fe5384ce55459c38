"""Tell an image's split and class from the folders it is in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.data.importers.import_plan import Classes
from hpctrain.data.splits import refuse_twins, split_of_word
from hpctrain.errors import Error

Folders = tuple[str, ...]

NO_CLASS = "image in no folder of a class"
_NO_CLASSES = re.compile(
    r"(.*[^a-z])?(images?|imgs?|pics|pictures?|photos?|masks?|labels?|annotations?|annots?|anns?"
    r"|gt|ground_?truths?|targets?|segs?|segmentations?|mattes?|trimaps?|contours?|inputs?"
    r"|jpegimages|segmentation(class|object)(raw|aug)?|leftimg8bit|gtfine|gtcoarse)([^a-z].*)?"
)
"""Folders that say what their files are, rather than of which class."""


@dataclass(frozen=True)
class Place:
    """Where an image belongs: its split, "" if folders tell none, and its class, None if none."""

    split: str
    label: str | None


def folders_of(name: str) -> Folders:
    """Return the folders that a file is in, from a path within the source."""
    return tuple(part for part in name.split("/")[:-1] if part not in ("", "."))


def places(
    folders: Sequence[Folders], where: str, *, classes: Classes | None, told: bool
) -> dict[Folders, Place | None]:
    """Tell what each of the folders that hold images stands for; None: it is of no class.

    A folder's level whose names are all words of splits tells them. Of the others, those that are
    the same everywhere tell nothing; what is left is the class, if it is one level.

    Args:
        folders: Each once.
        where: The source, for errors.
        classes: Which level to take where there are several; "none": there are no classes.
        told: Whether folders tell splits at all.

    Raises:
        Error: They can be read in several ways, or as nothing.
    """
    level = _split_level(folders, where, classes, told)
    words = {f: f[level] if level is not None and len(f) > level else "" for f in folders}
    refuse_twins(words.values(), where)
    splits = {folder: split_of_word(word) for folder, word in words.items()}
    if classes == "none":
        return {folder: Place(split, None) for folder, split in splits.items()}
    rest = {f: f if level is None else f[:level] + f[level + 1 :] for f in folders}
    labels = _labels({f: parts for f, parts in rest.items() if parts and f}, where, classes)
    if not labels:
        raise Error(
            f"{where} holds images, but no folders of classes.",
            hint="it should hold [train/]CLASS/NAME.jpg and the like; --classes none takes images "
            "without labels.",
        )
    return {f: Place(splits[f], labels[f]) if f in labels else None for f in folders}


def _split_level(
    folders: Sequence[Folders], where: str, classes: Classes | None, told: bool
) -> int | None:
    """Find the level whose folders' names are words of splits; None: there is none."""
    if not told:
        return None
    for level in range(max(map(len, folders), default=0)):
        here = [folder for folder in folders if len(folder) > level]
        named = [folder for folder in here if split_of_word(folder[level])]
        if not named:
            continue
        others = [f for f in folders if f and (len(f) <= level or f not in named)]
        if not others:
            return level
        if classes == "none" or any(len(folder) > level + 1 for folder in named):
            one, other = "/".join(named[0]), "/".join(others[0])
            raise Error(
                f"{where}: {one} names a split, but {other} names none.",
                hint="rename or remove what is of no split, or give --no-splits: then folders tell "
                "classes alone.",
            )
    return None


def _labels(
    rest: dict[Folders, Folders], where: str, classes: Classes | None
) -> dict[Folders, str]:
    """Folder -> class, from the levels that tell no split."""
    if not rest:
        return {}
    same = _same_at_first(list(rest.values()))
    inner = {folder: parts[same:] for folder, parts in rest.items()}
    if classes in ("first", "last", "path"):
        take = {"first": lambda p: p[0], "last": lambda p: p[-1], "path": "/".join}[classes]
        return {folder: take(parts) for folder, parts in inner.items()}
    depths = {len(parts) for parts in inner.values()}
    levels = [
        level
        for level in range(max(depths))
        if len({parts[level] for parts in inner.values() if len(parts) > level}) > 1
    ] or list(range(max(depths)))
    if len(depths) > 1 or len(levels) > 1:
        one = max(inner, key=lambda folder: len(inner[folder]))
        parts = inner[one]
        raise Error(
            f"{where}: which folder names the class of {'/'.join(one)}/...: "
            f"{', '.join(dict.fromkeys([parts[0], parts[-1], '/'.join(parts)]))}?",
            hint="--classes first, last, path (all of them) or none (no labels) says so.",
        )
    labels = {folder: parts[levels[0]] for folder, parts in inner.items()}
    odd = [label for label in labels.values() if _NO_CLASSES.fullmatch(label.lower())]
    if odd:
        raise Error(
            f"{where}: folder {odd[0]} seems to say what its images are, not of which class.",
            hint="--classes last takes it for a class, --classes none takes images without labels; "
            "pairs of images and masks can be imported as a WebDataset: 1.jpg, 1.mask.png.",
        )
    return labels


def _same_at_first(parts: list[Folders]) -> int:
    """Levels at the beginning that are the same in all, so that each has one left."""
    least = min(map(len, parts))
    return next((i for i in range(least) if len({p[i] for p in parts}) > 1), least - 1)
