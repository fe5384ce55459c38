"""Telling the split of samples from the names that people give files and arrays."""

from __future__ import annotations

import re
from collections.abc import Iterable

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


def split_in(words: Iterable[str]) -> str:
    """The split that the first of these words names which names one; "" if none does."""
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "")


def split_in_name(name: str) -> str:
    """The split that a word of a file's name names; "" if none does."""
    return split_in(re.split(r"[^A-Za-z]+", name))


def split_and_field(name: str) -> tuple[str, str]:
    """``train_x``, ``x_train`` and ``train/x`` are field x of split train; ``x`` has no split."""
    parts = name.replace("/", "_").split("_")
    for place in (0, -1):
        if len(parts) > 1 and parts[place].lower() in SPLITS:
            split = SPLITS[parts.pop(place).lower()]
            return split, "_".join(parts)
    return "", "_".join(parts)
