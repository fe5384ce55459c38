"""Tables: Parquet and CSV, one file or a folder of them. Columns are fields, rows are samples.

Numbers and booleans stay what they are; text becomes its UTF-8 bytes (ragged), unless it is the
column of classes, which becomes their numbers; lists become rows of fixed or of varying length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hpctrain.data.importers.columns import (
    column_of,
    holds_classes,
    is_undecided,
    lengths_of,
    spec_of_field,
)
from hpctrain.data.importers.plan import (
    BLOCK_BYTES,
    Columns,
    Importer,
    Items,
    Survey,
    stamp,
)
from hpctrain.data.importers.tar import reading
from hpctrain.data.splits import split_in_name
from hpctrain.errors import Error

CSV_BLOCK_BYTES = 16 * 2**20
"""What is parsed at a time; the first tells the types, unless a later one belies it."""
BATCH_ROWS = 65_536


class Tables(Importer):
    """One table, in one file or several."""

    what = "rows"

    def survey(self) -> Survey:
        """Count the rows; read the columns whose values decide what becomes of them."""
        files = _files(self.path)
        schemas = [_schema(file) for file in files]
        schema = self._common(files, schemas)
        undecided = [field.name for field in schema if is_undecided(field)]
        classes: set[Any] = set()
        lengths: dict[str, set[int]] = {name: set() for name in schema.names}
        counts, size = [], 0
        for file in files:
            rows, file_bytes = _extent(file, schema)
            counts.append(rows)
            size += file_bytes
            for _, batch in _batches(file, schema, undecided, 0, rows) if undecided else ():
                for name, column in zip(undecided, batch.columns, strict=True):
                    lengths[name] |= lengths_of(column)
                    if holds_classes(schema.field(name)):
                        classes.update(column.unique().to_pylist())
        if not sum(counts):
            raise Error(f"{self.path} holds no rows.", hint="is it the right file?")
        named = {"classes": sorted(_text(name) for name in classes if name is not None)}
        return Survey(
            runs=[
                (split_in_name(file.stem), count) for file, count in zip(files, counts, strict=True)
            ],
            fields={
                field.name: spec_of_field(
                    field, lengths[field.name], f"column {field.name} of {self.path}"
                )
                for field in schema
            },
            bytes=size,
            attributes=named if any(holds_classes(field) for field in schema) else {},
            details={"stamp": stamp(*files), "schema": schema.serialize().to_pybytes().hex()},
        )

    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Batch by batch; of Parquet only the row groups that hold what is wanted."""
        schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(survey.details["schema"])))
        first = 0
        for file, (_, count) in zip(_files(self.path), survey.runs, strict=True):
            begin, end = np.searchsorted(items, [first, first + count])
            wanted = items[begin:end] - first
            first += count
            if not len(wanted):
                continue
            last = int(wanted[-1]) + 1
            for start, batch in _batches(file, schema, schema.names, int(wanted[0]), last):
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
                f"column {field.name} of {file}",
            )
            for field, column in zip(schema, batch.columns, strict=True)
        }

    def _common(self, files: list[Path], schemas: list[Any]) -> Any:
        """The schema of all files; the types of CSVs are guesses, and give way to wider ones."""
        for file, schema in zip(files, schemas, strict=True):
            if len(set(schema.names)) < len(schema.names):
                raise Error(f"{file} has two columns of one name.", hint="rename one.")
            if set(schema.names) != set(schemas[0].names):
                odd = sorted(set(schema.names) ^ set(schemas[0].names))
                raise Error(
                    f"only one of {file} and {files[0]} has column {odd[0]}.",
                    hint="all files must have the same columns.",
                )
            for name in schema.names:
                alike = schema.field(name).type == schemas[0].field(name).type
                if not alike and file.suffix.lower() == ".parquet":
                    raise Error(
                        f"column {name} of {file} is of type {schema.field(name).type}, that of "
                        f"{files[0]} of {schemas[0].field(name).type}.",
                        hint="all files must have the same types.",
                    )
        with reading(self.path, pa.ArrowException):
            common = pa.unify_schemas(schemas, promote_options="permissive")
        return common.remove_metadata()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [file for file in path.iterdir() if file.suffix.lower() in (".parquet", ".csv")]
    return sorted(file for file in files if not file.name.startswith("."))


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _rows(batch: Any, rows: Items) -> Any:
    if len(rows) == rows[-1] - rows[0] + 1:
        return batch.slice(int(rows[0]), len(rows))
    return batch.take(pa.array(rows))


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with reading(file, pa.ArrowException), pyarrow.parquet.ParquetFile(file) as table:
        yield table


def _csv(file: Path, schema: Any = None, names: list[str] | None = None) -> Any:
    import pyarrow.csv

    kinds = {field.name: field.type for field in schema} if schema is not None else None
    return pyarrow.csv.open_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(block_size=CSV_BLOCK_BYTES),
        convert_options=pyarrow.csv.ConvertOptions(column_types=kinds, include_columns=names),
    )


def _schema(file: Path) -> Any:
    if _is_parquet(file):
        with _parquet(file) as table:
            return table.schema_arrow
    import pyarrow.csv

    with reading(file, pa.ArrowException):
        try:
            with _csv(file) as batches:
                for _ in batches:
                    pass
                return batches.schema
        except pa.ArrowInvalid:
            return pyarrow.csv.read_csv(file).schema  # which tells types from all rows


def _extent(file: Path, schema: Any) -> tuple[int, int]:
    """Rows of a file, and their bytes, about."""
    if _is_parquet(file):
        with _parquet(file) as table:
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            return table.metadata.num_rows, sum(group.total_byte_size for group in groups)
    with reading(file, pa.ArrowException), _csv(file, schema) as batches:
        sizes = [(batch.num_rows, batch.nbytes) for batch in batches]
    return sum(rows for rows, _ in sizes), sum(size for _, size in sizes)


def _batches(
    file: Path, schema: Any, names: list[str], first: int, last: int
) -> Iterator[tuple[int, Any]]:
    """Batches that hold the rows from ``first`` to ``last``, and each one's first row."""
    start = 0
    if not _is_parquet(file):
        with reading(file, pa.ArrowException), _csv(file, schema, names) as batches:
            for batch in batches:
                yield start, batch
                start += batch.num_rows
                if start >= last:
                    return
        return
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
    return sum(table.metadata.row_group(i).total_byte_size for i in groups)
