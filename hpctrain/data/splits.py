"""Tell splits and fields from the names that people give files, folders and arrays: one rule.

The words are those of Hugging Face's datasets:
https://huggingface.co/docs/datasets/en/repository_structure#splits-and-file-names
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpctrain.data.index import FieldSpec
from hpctrain.errors import Error

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}

Array = tuple[int | None, FieldSpec]
"""Its rows, None if it is a single value, and what they are."""


@dataclass(frozen=True)
class Told:
    """The splits and fields that the names of a source's arrays tell.

    Attributes:
        splits: Split -> field -> array; the split is "" where names tell none.
        left_out: Array that is no field -> why.
    """

    splits: dict[str, dict[str, str]]
    left_out: dict[str, str] = field(default_factory=dict)


def split_of_word(word: str) -> str:
    """Return the split that a word names; "" if it names none."""
    return SPLITS.get(word.lower(), "")


def splits_of_files(names: Sequence[str], where: str, *, told: bool = True) -> list[str]:
    """Tell the split of each file: by a folder that is one's word, or else a word of its own name.

    Args:
        names: With the folders below the source.
        where: The source, for errors.
        told: Whether names tell splits at all.

    Returns:
        Splits; "" where a name tells none.

    Raises:
        Error: Two words, such as val and valid, stand for one split.
    """
    words = [_file_word(name) if told else "" for name in names]
    refuse_twins(words, where)
    return [split_of_word(word) for word in words]


def refuse_twins(words: Iterable[str], where: str) -> None:
    """Refuse a split that goes by two names, of which one might be meant for something else.

    Args:
        words: Of splits, as they were found; "" is none.
        where: The source, for errors.

    Raises:
        Error: One does.
    """
    seen: dict[str, str] = {}
    for word in sorted({word.lower() for word in words if word}):
        if (other := seen.setdefault(SPLITS[word], word)) != word:
            raise Error(
                f"{where}: both '{other}' and '{word}' name the split {SPLITS[word]}.",
                hint="rename one, or give --no-splits: then names tell no splits.",
            )


def _file_word(name: str) -> str:
    *folders, base = name.split("/")
    stem = base.partition(".")[0]
    words = [*folders, *re.split(r"[^A-Za-z]+", stem)]
    return next((word for word in words if split_of_word(word)), "")


def tell(
    arrays: Mapping[str, Array], where: str, *, told: bool = True, chosen: bool = False
) -> Told:
    """Tell which arrays are the fields of which split.

    ``train/x``, ``data/train/x``, ``train_x`` and ``x_train`` are of split train, if every array
    says its split, or if those which do are the same fields in each split, of the same types, and
    differ in length from what says none. Else such words are part of a field's name. The fields of
    a split have as many rows as each other: arrays that have fewer, and are fewer, are left out.

    Args:
        arrays: Name -> rows, and what they are; a name may have groups, with slashes.
        where: The source, for errors.
        told: Whether names tell splits at all.
        chosen: The arrays were asked for by name, so that none may be left out.

    Raises:
        Error: Two arrays would be one field, splits differ in their fields, or it cannot be told
            which lengths belong together.
    """
    left_out = {name: "a single value" for name, (rows, _) in arrays.items() if rows is None}
    if left_out and chosen:
        raise Error(
            f"{where}: {next(iter(left_out))} is a single value, not one a sample.",
            hint="leave it out of --fields.",
        )
    names = [name for name in arrays if name not in left_out]
    parts = {name: _parts(name) if told else ("", _joined(name)) for name in names}
    unsaid = {name: ("", _joined(name)) for name in names}
    if all(word for word, _ in parts.values()):
        refuse_twins((word for word, _ in parts.values()), where)
        splits = _group(parts, where)
        _same_length(splits, arrays, where, left_out, chosen)
        _same_fields(splits, arrays, where)
        return Told(splits, left_out)
    named = {name: part for name, part in parts.items() if part[0]}
    if named and len({arrays[name][0] for name in names}) > 1:
        try:
            splits = _group(named, where)
            _same_length(splits, arrays, where, {}, chosen=True)
            _same_fields(splits, arrays, where)
            rest = _group({n: part for n, part in parts.items() if not part[0]}, where)[""]
        except Error:
            splits, rest = {}, {}
        same = [{f: arrays[n][1] for f, n in names.items()} for names in (rest, *splits.values())]
        if len(same) > 1 and same[0] == same[1] and "train" not in splits:
            refuse_twins((word for word, _ in parts.values()), where)
            splits = {"train": rest, **splits}
            _same_length(splits, arrays, where, left_out, chosen)
            return Told(splits, left_out)
        if len(splits) > 1 and not chosen:
            refuse_twins((word for word, _ in parts.values()), where)
            return Told(splits, left_out | dict.fromkeys(rest.values(), "its name tells no split"))
    splits = _group(unsaid, where) if names else {}
    _same_length(splits, arrays, where, left_out, chosen)
    return Told(splits, left_out)


def _parts(name: str) -> tuple[str, str]:
    """Return the word of a split in a name, "" if there is none, and the field."""
    *groups, base = name.split("/")
    for place, group in enumerate(groups):
        if split_of_word(group):
            return group, _joined("/".join([*groups[:place], *groups[place + 1 :], base]))
    words = base.split("_")
    for place in (0, -1):
        if len(words) > 1 and split_of_word(words[place]):
            word = words.pop(place)
            return word, _joined("/".join([*groups, "_".join(words)]))
    return "", _joined(name)


def _joined(name: str) -> str:
    return name.replace("/", "_")


def _group(parts: Mapping[str, tuple[str, str]], where: str) -> dict[str, dict[str, str]]:
    splits: dict[str, dict[str, str]] = {}
    for name, (word, of) in parts.items():
        fields = splits.setdefault(split_of_word(word), {})
        if of in fields:
            raise Error(
                f"{where}: both {fields[of]} and {name} would be field {of}.",
                hint="rename one, or say which ones to take: --fields A,B.",
            )
        fields[of] = name
    return splits


def _same_length(
    splits: dict[str, dict[str, str]],
    arrays: Mapping[str, Array],
    where: str,
    left_out: dict[str, str],
    chosen: bool,
) -> None:
    """Leave out what is shorter than most; refuse what could be meant in several ways."""
    for fields in splits.values():
        lengths = {name: arrays[name][0] or 0 for name in fields.values()}
        counts = Counter(lengths.values())
        if len(counts) < 2:
            continue
        rows = max(counts)
        if chosen or any(counts[other] >= counts[rows] for other in counts if other != rows):
            listing = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise Error(
                f"{where}: arrays of a split differ in length: {listing}.",
                hint="one row a sample; say which ones belong together: --fields A,B.",
            )
        for of, name in [*fields.items()]:
            if lengths[name] != rows:
                left_out[name] = f"{lengths[name]} rows, not {rows}"
                del fields[of]


def _same_fields(
    splits: Mapping[str, Mapping[str, str]], arrays: Mapping[str, Array], where: str
) -> None:
    first: dict[str, FieldSpec] = {}
    for split, names in splits.items():
        found = {of: arrays[name][1] for of, name in names.items()}
        if first and found != first:
            raise Error(
                f"{where}: split '{split}' has {listing(found)}, but another has {listing(first)}.",
                hint="all splits must have the same arrays, of the same types and row shapes; if "
                "these words name no splits, give --no-splits.",
            )
        first = first or found


def listing(fields: Mapping[str, FieldSpec]) -> str:
    """Return fields and what they are, in a line."""
    return ", ".join(f"{name} {spec}" for name, spec in fields.items())
