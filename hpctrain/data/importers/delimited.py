"""Delimited text (CSV, TSV): how its lines are cut, and what its columns are.

pyarrow's own guess at a column's type sees the first block, takes 007 for 7 and 2**64 for a float;
here the text of every row is looked at before anything is converted.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from hpctrain.data.importers.import_plan import ImportOptions
from hpctrain.data.importers.tar import reading
from hpctrain.errors import Error

BLOCK_BYTES = 16 * 2**20
"""What is parsed at a time."""
HEAD_BYTES = 2**20
MISSING = pyarrow.csv.ConvertOptions().null_values
"""What is written for a number that is not there: nothing, NA, NaN, null and the like."""
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}
_INTEGER = r"^\s*-?(0|[1-9]\d*)\s*$"
_PADDED = r"^\s*-?0\d+\s*$"
_FLOAT = r"(?i)^\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*$|^\s*[+-]?inf(inity)?\s*$"
_BOOLEAN = r"(?i)^(true|false)$"
_DAY = r"(\d{4}[-/.]\d\d?[-/.]\d\d?|\d\d?[-/.]\d\d?[-/.](\d{4}|\d\d))"
_HOUR = r"\d\d?:\d\d(:\d\d(\.\d+)?)?"
_TIME = rf"^\s*({_DAY}([T ]+{_HOUR}.*)?|{_HOUR})\s*$"
_COMMA = r"^\s*[+-]?\d+(,\d+)?\s*$"
_WORDLESS = re.compile(f"{_INTEGER}|{_PADDED}|{_TIME}")
_NUMBERS = re.compile(r"\s*[-+.\deE]+(\s+[-+.\deE]+)+\s*")


@dataclass(frozen=True)
class Dialect:
    """How a file of delimited text is cut into rows and columns."""

    delimiter: str
    header: bool
    decimal: str

    def open(self, file: Path, kinds: dict[str, Any] | None, names: list[str] | None) -> Any:
        """Open a file to be read in batches of rows.

        Args:
            file: To read.
            kinds: Column -> type; None: bytes, as they are written.
            names: Columns to read; None: all.
        """
        head = pyarrow.csv.ReadOptions(
            block_size=BLOCK_BYTES, autogenerate_column_names=not self.header
        )
        # Text in quotes may hold line breaks, also where a block happens to end.
        parse = pyarrow.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True)
        if kinds is None:
            with pyarrow.csv.open_csv(file, head, parse) as table:
                kinds = dict.fromkeys(table.schema.names, pa.binary())
        convert = pyarrow.csv.ConvertOptions(
            column_types=kinds, include_columns=names, decimal_point=self.decimal
        )
        return pyarrow.csv.open_csv(file, head, parse, convert)


def dialect(file: Path, options: ImportOptions) -> Dialect:
    """Find out how a file is cut into rows and columns, from its first bytes.

    Args:
        file: To look at.
        options: What the user says of it, which has the last word.

    Raises:
        Error: It is not UTF-8, seems to be cut in another way, or to have no header.
    """
    with reading(file, pa.ArrowException, ValueError), pa.input_stream(str(file)) as stream:
        head = stream.read(HEAD_BYTES)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Error(f"{file} is in UTF-16.", hint=f"iconv -f UTF-16 -t UTF-8 {file} > OTHER")
    text = head.decode("utf-8-sig", "replace")
    if not text.strip():
        raise Error(f"{file} is empty.", hint="is it the right file?")
    delimiter = options.delimiter or ("\t" if ".tsv" in file.name.lower() else ",")
    if options.delimiter is None:
        _check_delimiter(text.lstrip().splitlines(), delimiter, file)
    header = options.header
    if header is None:
        try:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
            _check_header(next(row for row in rows if row), file)
        except (csv.Error, StopIteration) as error:
            raise Error(
                f"the first line of {file} cannot be read: {error}.", hint="is it a table?"
            ) from error
    return Dialect(delimiter, header is not False, options.decimal)


def _check_delimiter(lines: list[str], delimiter: str, file: Path) -> None:
    counts = {other: lines[0].count(other) for other in _DELIMITERS if other != " "}
    likely = max(counts, key=lambda other: counts[other])
    if counts[likely] <= counts[delimiter]:
        blanks = not counts[delimiter] and len(lines) > 1 and _NUMBERS.fullmatch(lines[1])
        if not blanks:
            return
        likely = " "
    raise Error(
        f"{file} seems to have {_DELIMITERS[likely]} between its columns, not "
        f"{_DELIMITERS[delimiter]}.",
        hint=f"say which: --delimiter '{_said(likely)}' or --delimiter '{_said(delimiter)}'.",
    )


def _said(delimiter: str) -> str:
    return "\\t" if delimiter == "\t" else delimiter


def _check_header(cells: list[str], file: Path) -> None:
    odd = [cell for cell in cells if _WORDLESS.match(cell) or re.match(_FLOAT, cell)]
    if odd or cells[0].startswith("#"):
        raise Error(
            f"the first line of {file} seems not to name the columns: {(odd or cells)[0][:30]}",
            hint="--no-header calls them f0, f1, ...; --header takes it for their names; lines of "
            "comments have to be removed.",
        )


class Inference:
    """Type inference of one column, from the text of all its rows."""

    def __init__(self) -> None:
        self.rows = self.missing = 0
        self._possible = {_INTEGER, _FLOAT, _BOOLEAN, _TIME, _COMMA}
        self._padded = self._comma = False
        self._least = self._most = 0

    def see(self, column: Any, decimal: str) -> None:
        """Take account of some more rows.

        Args:
            column: An Arrow array of bytes.
            decimal: The decimal mark in them, as a regular expression.
        """
        self.rows += len(column)
        values = column.filter(pc.invert(pc.is_in(column, pa.array(MISSING, pa.binary()))))
        self.missing += len(column) - len(values)
        if not len(values):
            return
        for pattern in sorted(self._possible):
            written = pattern.replace(r"\.", decimal) if pattern == _FLOAT else pattern
            if not pc.all(pc.match_substring_regex(values, written)).as_py():
                self._possible.remove(pattern)
        if _COMMA in self._possible:
            self._comma |= pc.any(pc.match_substring(values, ",")).as_py()
        if _FLOAT in self._possible:
            self._padded |= pc.any(pc.match_substring_regex(values, _PADDED)).as_py()
        if _INTEGER in self._possible and pc.max(pc.binary_length(values)).as_py() > 18:
            for number in map(int, values.to_pylist()):
                self._least, self._most = min(number, self._least), max(number, self._most)

    def kind(self, where: str, dialect: Dialect) -> Any:
        """Return the narrowest Arrow type that all rows seen fit.

        Args:
            where: What to call the column in an error.
            dialect: Of the files.

        Raises:
            Error: It can be none, or there is nothing in the column.
        """
        if self.rows == self.missing:
            raise Error(f"{where} is empty.", hint="leave it out: --fields A,B takes others.")
        if _TIME in self._possible:
            raise Error(
                f"{where} holds dates or times.",
                hint="make numbers of them, or leave it out: --fields A,B takes others.",
            )
        if self._padded:
            return pa.binary()
        if _INTEGER in self._possible:
            if self._least >= -(2**63) and self._most < 2**63:
                return pa.int64()
            return pa.uint64() if self._least >= 0 and self._most < 2**64 else pa.binary()
        if _FLOAT in self._possible:
            return pa.float64()
        if _BOOLEAN in self._possible:
            return pa.bool_()
        if self._comma and _COMMA in self._possible and dialect.delimiter != ",":
            raise Error(
                f"{where} seems to hold numbers with decimal commas.",
                hint="--decimal , says so.",
            )
        return pa.binary()


def infer(
    files: list[tuple[Path, Dialect]], names: list[str]
) -> tuple[dict[str, Inference], list[int]]:
    """Read all rows of some columns, and return what each is, and how many rows each file has.

    Args:
        files: Each with how it is cut.
        names: Of the columns.

    Raises:
        Error: A file cannot be read.
    """
    columns = {name: Inference() for name in names}
    counts = []
    for file, cut in files:
        rows = 0
        for batch in batches(file, cut, None, names):
            rows += batch.num_rows
            for name, column in zip(names, batch.columns, strict=True):
                columns[name].see(column, re.escape(cut.decimal))
        counts.append(rows)
    return columns, counts


def batches(
    file: Path, cut: Dialect, kinds: dict[str, Any] | None, names: list[str]
) -> Iterator[Any]:
    """Yield batches of some columns, in this order.

    Args:
        file: To read.
        cut: Its dialect.
        kinds: Column -> Arrow type; None: bytes, as they are written.
        names: Of the columns.
    """
    with reading(file, pa.ArrowException, ValueError), cut.open(file, kinds, names) as table:
        yield from table
