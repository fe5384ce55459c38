"""Import tables: Parquet, Arrow, CSV, JSON Lines; a file or a folder.

Columns are fields, rows samples. Numbers and booleans stay what they are; text becomes its UTF-8
bytes (ragged), unless it is the column of classes, which becomes their numbers; lists become rows
of fixed or of varying length.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hpctrain.data.importers import arrow_files, delimited, json_lines
from hpctrain.data.importers.columns import (
    column_of,
    counts_classes,
    decode,
    holds_classes,
    is_undecided,
    lengths_of,
    spec_of_field,
)
from hpctrain.data.importers.import_plan import BLOCK_BYTES, Columns, Importer, Items, Survey, stamp
from hpctrain.data.importers.tar import reading
from hpctrain.data.splits import splits_of_files
from hpctrain.data.summary import MOST_COUNTED, Found
from hpctrain.errors import Error

DELIMITED = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
TABLES = (".parquet", *arrow_files.SUFFIXES, *DELIMITED, *JSON_LINES)
BATCH_ROWS = 65_536
MOST_ROWS_A_BYTE = 2**13
"""Of a Parquet file: columns of one value take few bytes, but a damaged file may claim anything."""


class Tables(Importer):
    """An importer of one table, in one file or several."""

    what = "rows"

    @cached_property
    def _names(self) -> list[str]:
        if not self.path.is_dir():
            return [""]
        return [name for name in self.tree.files if name.lower().endswith(TABLES)]

    @cached_property
    def _files(self) -> list[Path]:
        return [self.path / name for name in self._names]

    def survey(self) -> Survey:
        """Count the rows; read the columns whose values decide what becomes of them."""
        found = Found("a table, a row a sample")
        if self.path.is_dir():
            tree = self.tree
            found = tree.found(f"{len(self._files)} files of a table, a row a sample")
            for name in sorted(set(tree.files) - set(self._names)):
                found.leave("no table", name)
        splits = splits_of_files(
            self._names if self.path.is_dir() else [self.path.name],
            str(self.path),
            told=self.options.names_tell_splits,
        )
        schema, counts, size, missing = self._look(found)
        if not sum(counts):
            raise Error(f"{self.path} holds no rows.", hint="is it the right file?")
        lengths, counted = self._decide(schema, counts)
        fields = {}
        for field in schema:
            where = f"column {field.name} of {self.path}"
            lacking = missing.get(field.name, 0)
            fields[field.name] = spec_of_field(
                field, lengths[field.name], lacking, self.options.missing, where
            )
            if lacking and fields[field.name].kind.kind == "f":
                found.notes.append(f"{lacking} missing values of {field.name} are NaN")
            elif lacking:
                stands = "empty" if fields[field.name].ragged else self.options.missing
                found.notes.append(f"{lacking} missing values of {field.name} are {stands}")
        named = [field.name for field in schema if holds_classes(field)]
        if len(named) > 1:
            raise Error(
                f"{self.path} has several columns of classes: {', '.join(named)}.",
                hint="--fields A,B takes one of them, or rename the others.",
            )
        if named and (lacking := counted[named[0]][""] + counted[named[0]][b""]):
            raise Error(
                f"{lacking} rows of column {named[0]} of {self.path} hold no class.",
                hint="give them one, or leave these rows out.",
            )
        if named or len(counted) == 1:
            classes = counted[named[0]] if named else next(iter(counted.values()))
            key = decode if named else None
            if named or len(classes) <= MOST_COUNTED:
                found.classes = {decode(name): classes[name] for name in sorted(classes, key=key)}
        details = {
            "stamp": stamp(*self._files),
            "names": self._names,
            "schema": schema.serialize().to_pybytes().hex(),
        }
        return Survey(
            runs=list(zip(splits, counts, strict=True)),
            fields=fields,
            bytes=size,
            attributes={"classes": list(found.classes)} if named else {},
            details=details,
            found=found,
        )

    def _look(self, found: Found) -> tuple[Any, list[int], int, dict[str, int]]:
        """Return the schema of all files, rows of each, bytes of all, and how much columns lack."""
        schemas = [self._schema(file) for file in self._files]
        names = self._common_names(schemas)
        texts = [file for file in self._files if _is_delimited(file)]
        if not texts:
            counts, size, missing = [], 0, Counter[str]()
            schema = self._common(schemas, names)
            for file in self._files:
                rows, file_bytes, lacking = _extent(file, schema)
                counts.append(rows)
                size += file_bytes
                missing.update(lacking)
            return schema, counts, size, missing
        if len(texts) < len(self._files):
            raise Error(
                f"{self.path} holds tables of several kinds: {texts[0].name} and others.",
                hint="keep one kind, or import them one by one.",
            )
        cuts = [(file, self._dialect(file)) for file in texts]
        columns, counts = delimited.infer(cuts, names)
        kinds = [
            (name, column.kind(f"column {name} of {self.path}", cuts[0][1]))
            for name, column in columns.items()
        ]
        if cuts[0][1].header:
            found.notes.append("the first line names the columns")
        missing = Counter(
            {name: columns[name].missing for name, kind in kinds if not pa.types.is_binary(kind)}
        )
        return pa.schema(kinds), counts, sum(file.stat().st_size for file in texts), missing

    def _decide(
        self, schema: Any, counts: list[int]
    ) -> tuple[dict[str, set[int]], dict[str, Counter[Any]]]:
        """Lengths of lists, and rows of each class, by column."""
        undecided = [field.name for field in schema if is_undecided(field)]
        lengths: dict[str, set[int]] = {name: set() for name in schema.names}
        classes = {field.name: Counter[Any]() for field in schema if counts_classes(field)}
        for file, rows in zip(self._files, counts, strict=True):
            for _, batch in self._batches(file, schema, undecided, 0, rows) if undecided else ():
                for name, column in zip(undecided, batch.columns, strict=True):
                    lengths[name] |= lengths_of(column)
                    if name in classes:
                        for entry in column.value_counts().to_pylist():
                            if entry["values"] is not None:
                                classes[name][entry["values"]] += entry["counts"]
        return lengths, classes

    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Yield the samples of these numbers; of Parquet only the row groups with some are read.

        Args:
            survey: As found.
            items: Numbers of rows, rising.
        """
        schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(survey.details["schema"])))
        files = [self.path / name for name in survey.details["names"]]
        first = 0
        for file, (_, count) in zip(files, survey.runs, strict=True):
            begin, end = np.searchsorted(items, [first, first + count])
            wanted = items[begin:end] - first
            first += count
            if not len(wanted):
                continue
            last = int(wanted[-1]) + 1
            for start, batch in self._batches(file, schema, schema.names, int(wanted[0]), last):
                low, high = np.searchsorted(wanted, [start, start + batch.num_rows])
                rows = wanted[low:high] - start
                if len(rows):
                    yield self._columns(_rows(batch, rows), schema, survey, file)

    def _columns(self, batch: Any, schema: Any, survey: Survey, file: Path) -> Columns:
        classes = survey.attributes.get("classes")
        return {
            field.name: column_of(
                column,
                survey.fields[field.name],
                classes if holds_classes(field) else None,
                self.options.missing,
                f"column {field.name} of {file}",
            )
            for field, column in zip(schema, batch.columns, strict=True)
        }

    def _dialect(self, file: Path) -> delimited.Dialect:
        return delimited.dialect(file, self.options)

    def _schema(self, file: Path) -> Any:
        """Return the schema of one file; the types of delimited text are not known yet."""
        if _is_parquet(file):
            with _parquet(file) as table:
                return table.schema_arrow
        if _is_delimited(file):
            cut = self._dialect(file)
            with reading(file, pa.ArrowException, ValueError), cut.open(file, None, None) as table:
                return table.schema
        if _is_arrow(file):
            return arrow_files.schema(file)
        schemas = [batch.schema for batch in json_lines.batches(file)]
        return _unified(schemas, file) if schemas else pa.schema([])

    def _common_names(self, schemas: list[Any]) -> list[str]:
        """Return the columns to take, which all files must have."""
        for file, schema in zip(self._files, schemas, strict=True):
            twice = [name for name, count in Counter(schema.names).items() if count > 1]
            if twice:
                raise Error(f"{file} has two columns of one name.", hint=f"rename one {twice[0]}.")
            if set(schema.names) != set(schemas[0].names):
                odd = sorted(set(schema.names) ^ set(schemas[0].names))
                raise Error(
                    f"only one of {file} and {self._files[0]} has column {odd[0]}.",
                    hint="all files must have the same columns.",
                )
        for name in self.options.fields:
            if name not in schemas[0].names:
                raise Error(
                    f"{self.path} has no column {name}.",
                    hint=f"--fields takes some of {', '.join(schemas[0].names)}.",
                )
        return [
            name for name in schemas[0].names if name in (self.options.fields or schemas[0].names)
        ]

    def _common(self, schemas: list[Any], names: list[str]) -> Any:
        """Return the schema of all files that say their types; those of JSON may be widened."""
        chosen = [pa.schema([schema.field(name) for name in names]) for schema in schemas]
        for file, schema in zip(self._files, chosen, strict=True):
            for name in names if _is_parquet(file) or _is_arrow(file) else ():
                if schema.field(name).type != chosen[0].field(name).type:
                    raise Error(
                        f"column {name} of {file} is of type {schema.field(name).type}, that of "
                        f"{self._files[0]} of {chosen[0].field(name).type}.",
                        hint="all files must have the same types.",
                    )
        return _unified(chosen, self.path)

    def _batches(
        self, file: Path, schema: Any, names: list[str], first: int, last: int
    ) -> Iterator[tuple[int, Any]]:
        """Batches that hold the rows from ``first`` to ``last``, and each one's first row."""
        if _is_parquet(file):
            yield from _parquet_batches(file, names, first, last)
            return
        if _is_delimited(file):
            kinds = {field.name: field.type for field in schema}
            found = delimited.batches(file, self._dialect(file), kinds, names)
        elif _is_arrow(file):
            found = (batch.select(names) for batch in arrow_files.batches(file))
        else:
            found = (
                batch
                for table in json_lines.batches(file, schema)
                for batch in table.select(names).to_batches()
            )
        start = 0
        for batch in found:
            yield start, batch
            start += batch.num_rows
            if start >= last:
                return


def _unified(schemas: list[Any], path: Path) -> Any:
    with reading(path, pa.ArrowException, ValueError):
        return pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()


def _rows(batch: Any, rows: Items) -> Any:
    if len(rows) == rows[-1] - rows[0] + 1:
        return batch.slice(int(rows[0]), len(rows))
    return batch.take(pa.array(rows))


def _is_parquet(file: Path) -> bool:
    return file.name.lower().endswith(".parquet")


def _is_arrow(file: Path) -> bool:
    return file.name.lower().endswith(arrow_files.SUFFIXES)


def _is_delimited(file: Path) -> bool:
    return file.name.lower().endswith(DELIMITED)


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with reading(file, pa.ArrowException, ValueError), pyarrow.parquet.ParquetFile(file) as table:
        yield table


def _extent(file: Path, schema: Any) -> tuple[int, int, dict[str, int]]:
    """Rows of a file, their bytes, about, and how much its columns lack, where that is known."""
    lacking: Counter[str] = Counter()
    if not _is_parquet(file):
        rows = size = 0
        tables = arrow_files.batches(file) if _is_arrow(file) else json_lines.batches(file, schema)
        for table in tables:
            rows += table.num_rows
            size += table.nbytes
            lacking.update({name: table[name].null_count for name in schema.names})
        return rows, size, lacking
    with _parquet(file) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        rows = table.metadata.num_rows
        counted = sum(group.num_rows for group in groups)
        if not 0 <= rows == counted <= MOST_ROWS_A_BYTE * file.stat().st_size:
            raise EOFError(f"it says it has {rows} rows, and {counted} in its groups")
        for group in groups:
            for place in range(group.num_columns):
                column = group.column(place)
                if column.path_in_schema in schema.names and column.statistics is not None:
                    lacking[column.path_in_schema] += column.statistics.null_count or 0
        return rows, sum(max(0, group.total_byte_size) for group in groups), lacking


def _parquet_batches(
    file: Path, names: list[str], first: int, last: int
) -> Iterator[tuple[int, Any]]:
    with _parquet(file) as table:
        counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        ends = np.cumsum(counts).tolist()
        wanted = [i for i, end in enumerate(ends) if end > first and end - counts[i] < last]
        rows = max(1, min(BATCH_ROWS, BLOCK_BYTES * sum(counts) // max(1, _weight(table))))
        start = ends[wanted[0]] - counts[wanted[0]] if wanted else 0
        for batch in table.iter_batches(rows, row_groups=wanted, columns=names):
            yield start, batch.select(names)
            start += batch.num_rows


def _weight(table: Any) -> int:
    groups = range(table.num_row_groups)
    return sum(max(0, table.metadata.row_group(i).total_byte_size) for i in groups)
