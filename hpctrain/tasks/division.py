"""Splits made of one set of samples, as ``data.split`` says."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.config import SplitConfig
from hpctrain.data.source import Source
from hpctrain.data.subset import (
    Subset,
    grouped_parts,
    random_parts,
    stratified_parts,
    values_of,
)
from hpctrain.errors import Error

_NAMES = ("train", "validation", "test")


def divided(splits: Mapping[str, Source], config: SplitConfig, seed: int) -> dict[str, Source]:
    """Make splits of one.

    Args:
        splits: As the task gives them.
        config: The key ``data.split``.
        seed: Of the run; used where the key has none of its own.

    Returns:
        The splits that the key makes, and those of the task that it leaves alone.

    Raises:
        Error: The split to be divided is not there, a new one is there already or would be empty,
            or fractions, folds and lists do not go together.
    """
    if config.of not in splits:
        raise Error(
            f"data.split divides '{config.of}', which data() does not give.",
            hint=f"it gives {', '.join(splits)}.",
        )
    source = splits[config.of]
    parts = _parts(source, config, config.seed if config.seed is not None else seed)
    for name, numbers in parts.items():
        # Where there is a test set alone, it is lent as validation.
        lent = name == "validation" and splits.get(name) is splits.get("test")
        if name in splits and name != config.of and not lent:
            raise Error(
                f"data.split makes '{name}', which data() gives already.",
                hint="leave it out there, or here; `hpctrain data import` makes none with "
                "--validation-fraction 0.",
            )
        if not len(numbers):
            raise Error(
                f"data.split leaves nothing for '{name}': {len(source)} samples.",
                hint="give it a larger fraction, or more classes or groups.",
            )
    rest = {name: given for name, given in splits.items() if name != config.of}
    return rest | {name: Subset(source, numbers) for name, numbers in parts.items()}


def _parts(source: Source, config: SplitConfig, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return the numbers of the samples of each split."""
    given = {name: value for name in _NAMES if (value := getattr(config, name)) is not None}
    fractions = {name: value for name, value in given.items() if isinstance(value, float)}
    if config.folds is not None:
        if given or config.fold is None or config.fold >= config.folds:
            raise Error(
                f"data.split: fold {config.fold} of {config.folds}"
                + (f" beside {', '.join(given)}." if given else "."),
                hint="for example {folds = 5, fold = 0}: that fold validates, the others train.",
            )
        folds = _chosen(source, config, [1 / config.folds] * config.folds, seed)
        held = folds.pop(config.fold)
        return {"train": np.concatenate(folds), "validation": held}
    if config.fold is not None or "train" not in given:
        raise Error(
            "data.split has no 'train'."
            if given or config.fold is None
            else "data.split has a fold, and does not say of how many.",
            hint="for example {train = 0.8, validation = 0.2}, or {folds = 5, fold = 0}.",
        )
    if not fractions:
        if config.by != "random" or config.column is not None:
            raise Error(
                "data.split: lists of samples are not drawn by anything.",
                hint="leave `by` and `column` out.",
            )
        lists = {name: _listed(name, value) for name, value in given.items()}
        _check_apart(lists)
        return lists
    if len(fractions) < len(given) or sum(fractions.values()) > 1 + 1e-9:
        what = " + ".join(f"{name} {value}" for name, value in given.items())
        raise Error(
            f"data.split: {what} are no fractions of one set.",
            hint="give fractions that add up to 1 or less, or lists for all.",
        )
    found = _chosen(source, config, list(fractions.values()), seed)
    return dict(zip(fractions, found, strict=True))


def _chosen(
    source: Source, config: SplitConfig, fractions: list[float], seed: int
) -> list[NDArray[np.int64]]:
    if config.by == "random":
        if config.column is not None:
            raise Error(
                f"data.split names the column '{config.column}', and does not say what for.",
                hint='say by = "stratified" or by = "group".',
            )
        return random_parts(len(source), fractions, seed)
    if config.column is None:
        raise Error(
            f"data.split by '{config.by}' does not say by which field.",
            hint='for example column = "label".',
        )
    values = values_of(source, config.column)
    divide = stratified_parts if config.by == "stratified" else grouped_parts
    return divide(values, fractions, seed)


def _listed(name: str, value: Any) -> NDArray[np.int64]:
    """Return the sample numbers of a list, or of a file that has one."""
    if not isinstance(value, Path):
        return np.asarray(value, dtype=np.int64)
    try:
        if value.suffix == ".npy":
            numbers = np.load(value, allow_pickle=False)
        elif value.suffix == ".json":
            numbers = np.asarray(json.loads(value.read_text(encoding="utf-8")))
        else:
            numbers = np.array([int(word) for word in value.read_text(encoding="utf-8").split()])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise Error(
            f"data.split.{name}: cannot read sample numbers from {value}: {error}.",
            hint="name a .npy or .json file of whole numbers, or a text file with one a line.",
        ) from error
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise Error(
            f"data.split.{name}: {value} holds {numbers.dtype} of shape {numbers.shape}.",
            hint="it has to be one list of whole numbers.",
        )
    return np.asarray(numbers, dtype=np.int64)


def _check_apart(lists: Mapping[str, NDArray[np.int64]]) -> None:
    """Refuse a sample that is in two splits."""
    names = list(lists)
    for number, name in enumerate(names):
        for other in names[number + 1 :]:
            both = np.intersect1d(lists[name], lists[other])
            if len(both):
                raise Error(
                    f"data.split: sample {both[0]} is in '{name}' and in '{other}'.",
                    hint="what is trained on says nothing about other samples.",
                )
