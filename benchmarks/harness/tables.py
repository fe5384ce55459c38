"""Records as tables and lines of text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Record = dict[str, Any]
Column = str | tuple[str, Callable[[Record], str]]
"""A measure's key, shown with its spread; or a head, and what gives a record's cell."""

FOOTNOTE = "* more ranks than cores"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def spread(record: Record, key: str) -> str:
    """Return a measure that :func:`benchmarks.harness.rounds.spread_of` made, as a table's cell.

    Args:
        record: A case's.
        key: Of the measure; its ends are beside it, as ``KEY_min`` and ``KEY_max``.
    """
    if key not in record:
        return "failed" if "failed" in record else ""
    if f"{key}_min" not in record:
        return f"{record[key]:.3g}"
    return f"{record[key]:.3g} ({record[f'{key}_min']:.3g}..{record[f'{key}_max']:.3g})"


def table_of(title: str, records: Sequence[Record], name: str, columns: Sequence[Column]) -> str:
    """Return a table with a line a record; a star marks more ranks than cores.

    Args:
        title: The head of the first column.
        records: The lines.
        name: The key of what stands in the first column.
        columns: The others.
    """
    heads = [
        column.replace("_", " ") if isinstance(column, str) else column[0] for column in columns
    ]
    rows = [[title, *heads]]
    for record in records:
        cells = [
            spread(record, column) if isinstance(column, str) else column[1](record)
            for column in columns
        ]
        rows.append([f"{record[name]}{'*' * bool(record.get('oversubscribed'))}", *cells])
    return table(rows)


def by_group(records: Sequence[Record], key: str = "group") -> Iterator[tuple[Any, list[Record]]]:
    """Yield each value of a key with the records that have it, in the order of the first ones."""
    for value in dict.fromkeys(record[key] for record in records if key in record):
        yield value, [record for record in records if record.get(key) == value]


def say(text: str) -> None:
    """Print to standard error, at once: how far a benchmark is."""
    print(text, file=sys.stderr, flush=True)


def tell(record: Record) -> None:
    """Print a record as a line of JSON, at once."""
    print(json.dumps(record), flush=True)
