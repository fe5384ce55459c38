"""Turn columns of Arrow tables into columns of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from hpctrain.data.index import FieldSpec
from hpctrain.data.writer import Column, Ragged
from hpctrain.errors import Error

CLASS_COLUMNS = ("label", "class", "target", "y")
BYTES = FieldSpec("|u1", ragged=True)


def holds_classes(field: Any) -> bool:
    """Whether an Arrow field names each row's class."""
    return field.name.lower() in CLASS_COLUMNS and _is_text(_plain(field.type))


def counts_classes(field: Any) -> bool:
    """Whether an Arrow field's values are few, and worth counting."""
    kind = _plain(field.type)
    named = field.name.lower() in CLASS_COLUMNS
    return named and (_is_text(kind) or bool(types.is_integer(kind)))


def is_undecided(field: Any) -> bool:
    """Whether the values must be seen to know, or to say, what becomes of an Arrow field."""
    return counts_classes(field) or _is_list(field.type)


def decode(name: Any) -> str:
    """Return a class's name; bytes that are no UTF-8 are kept as Python keeps file names."""
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)


def spec_of_field(
    field: Any, lengths: set[int], lacking: int, missing: str | None, where: str
) -> FieldSpec:
    """Return the field that an Arrow field becomes.

    Args:
        field: Its name and type.
        lengths: Shortest and longest list, where it holds lists.
        lacking: Rows that hold nothing, as far as that is known.
        missing: What stands for them: "nan", a whole number, or nothing.
        where: What to call it in an error.

    Raises:
        Error: Nothing can become of it.
    """
    kind = _plain(field.type)
    if not field.name:
        raise Error(f"{where} has no name.", hint="pandas' to_csv(index=False) leaves it out.")
    if holds_classes(field):
        return FieldSpec("<i8")
    if _is_text(kind):
        if lacking:
            check_missing(kind, missing, f"{lacking} rows of {where}")
        return BYTES
    if lacking and not types.is_floating(kind):
        check_missing(kind, missing, f"{lacking} rows of {where}")
    if _is_number(kind):
        floats = lacking and missing == "nan" and types.is_integer(kind)
        return FieldSpec("<f8" if floats else _numpy(kind))
    if types.is_fixed_size_list(kind) and _is_number(kind.value_type):
        return FieldSpec(_numpy(kind.value_type), (kind.list_size,))
    if _is_list(kind) and _is_number(kind.value_type):
        fixed = len(lengths) == 1
        return FieldSpec(_numpy(kind.value_type), tuple(lengths) if fixed else (), not fixed)
    raise Error(
        f"{where} is of type {kind}, which cannot be a field.",
        hint="numbers, booleans, text, and lists of numbers can: convert it, or leave it out: "
        "--fields A,B takes others.",
    )


def check_missing(kind: Any, missing: str | None, where: str) -> None:
    """Refuse missing values where nothing is to stand for them.

    Args:
        kind: The Arrow type of the column.
        missing: What stands for them; None: nothing.
        where: What to call these rows in an error.

    Raises:
        Error: Nothing does.
    """
    if missing is None and (_is_text(kind) or types.is_integer(kind)):
        raise Error(
            f"{where} hold nothing.",
            hint="--missing -1, say, puts -1 there; --missing nan makes floats of whole numbers; "
            "text becomes empty by either.",
        )
    if not (_is_text(kind) or types.is_integer(kind)):
        raise Error(
            f"{where} hold nothing.", hint="fill them, or leave it out: --fields A,B takes others."
        )


def lengths_of(column: Any) -> set[int]:
    """Return the shortest and longest list of a column; empty where it holds no lists."""
    if not _is_list(column.type) or not len(column):
        return set()
    found = pc.min_max(pc.list_value_length(column)).as_py()
    return {length for length in found.values() if length is not None}


def column_of(
    column: Any, spec: FieldSpec, classes: list[str] | None, missing: str | None, where: str
) -> Column:
    """Return the samples that an Arrow array holds.

    Args:
        column: The array.
        spec: What they are to be.
        classes: Names whose numbers they become; None: they hold no classes.
        missing: What stands for whole numbers and text that are not there; floats are NaN.
        where: What to call it in an error.

    Raises:
        Error: Some rows hold nothing, and nothing stands for it.
    """
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if classes is not None:
        _refuse_nulls(column, where)
        return _class_numbers(column, classes)
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
        if column.null_count:
            check_missing(column.type, missing, f"{column.null_count} rows of {where}")
            column = pc.fill_null(column, b"")
        offsets = np.frombuffer(column.buffers()[1], np.int64)
        offsets = offsets[column.offset : column.offset + len(column) + 1]
        content = column.buffers()[2]
        values = np.frombuffer(content, np.uint8) if content else np.empty(0, np.uint8)
        return Ragged(values[offsets[0] : offsets[-1]], offsets - offsets[0])
    if _is_number(column.type):
        if column.null_count and spec.kind.kind != "f":
            check_missing(column.type, missing, f"{column.null_count} rows of {where}")
            if missing == "nan":
                raise Error(
                    f"{where} lacks numbers, which its file does not tell beforehand.",
                    hint="give --missing a whole number, or make floats of the column.",
                )
            column = _filled(column, missing, where)
        return np.asarray(column.to_numpy(zero_copy_only=False)).astype(spec.kind, copy=False)
    _refuse_nulls(column, where)
    inner = column.flatten()
    _refuse_nulls(inner, f"a list in {where}")
    values = np.asarray(inner.to_numpy(zero_copy_only=False))
    if spec.ragged:
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        return Ragged(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return values.reshape(len(column), *spec.shape)


def _class_numbers(column: Any, classes: list[str]) -> Column:
    if _is_binary(column.type):
        names = pa.array([name.encode("utf-8", "surrogateescape") for name in classes])
        column, names = column.cast(pa.large_binary()), names.cast(pa.large_binary())
    else:
        column, names = column.cast(pa.large_string()), pa.array(classes, pa.large_string())
    return np.asarray(pc.index_in(column, value_set=names).to_numpy()).astype(np.int64)


def _filled(column: Any, missing: str | None, where: str) -> Any:
    try:
        return pc.fill_null(column, pa.scalar(int(missing or 0), column.type))
    except (pa.ArrowException, OverflowError) as error:
        raise Error(
            f"--missing {missing} is no {column.type}, which {where} is.", hint="choose another."
        ) from error


def _refuse_nulls(column: Any, where: str) -> None:
    if column.null_count:
        raise Error(f"{where} holds nulls.", hint="fill them, or leave these rows out.")


def _plain(kind: Any) -> Any:
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_number(kind: Any) -> bool:
    return bool(types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind))


def _is_text(kind: Any) -> bool:
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_fixed_size_binary,
    )
    return any(bool(test(kind)) for test in tests)


def _is_binary(kind: Any) -> bool:
    return not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_list(kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind))


def _numpy(kind: Any) -> str:
    return "|b1" if types.is_boolean(kind) else np.dtype(kind.to_pandas_dtype()).str
