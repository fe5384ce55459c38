"""Read JSON Lines: an object a line, its members the columns.

https://jsonlines.org
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json

from hpctrain.data.importers.tar import reading
from hpctrain.errors import Error

BLOCK_BYTES = 16 * 2**20
MOST_LINE_BYTES = 2**28
MOST_LEVELS = 50


def batches(file: Path, schema: Any = None) -> Iterator[Any]:
    """Yield tables of some rows each, in order.

    Args:
        file: To read.
        schema: What its columns are; None: as each block's values say.

    Raises:
        Error: It cannot be read.
    """
    parse = pyarrow.json.ParseOptions(
        explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "ignore"
    )
    read = pyarrow.json.ReadOptions(use_threads=False, block_size=2 * MOST_LINE_BYTES)
    with reading(file, pa.ArrowException, ValueError):
        for block in _blocks(file):
            yield pyarrow.json.read_json(pa.BufferReader(block), read, parse)


def _blocks(file: Path) -> Iterator[bytes]:
    """Whole lines, about as many bytes at a time."""
    rest = b""
    with pa.input_stream(str(file)) as stream:
        while part := stream.read(BLOCK_BYTES):
            whole, newline, left = part.rpartition(b"\n")
            if newline:
                yield from _checked(rest + whole + newline, file)
                rest = left
            else:
                rest += part
            if len(rest) > MOST_LINE_BYTES:
                raise Error(f"{file} has a line of {len(rest):,} bytes.", hint="one object a line.")
    yield from _checked(rest, file)


def _checked(block: bytes, file: Path) -> Iterator[bytes]:
    if not block.strip():
        return
    # The parser goes as deep as the text; how deep that is may be a matter of a few bytes.
    for bracket in (b"[", b"{"):
        if bracket * MOST_LEVELS in block.translate(None, b' \t\r":,'):
            raise Error(f"{file} is nested too deeply.", hint="members are numbers, text or lists.")
    yield block
