"""Read Arrow files: the IPC file format, which Feather is, and the stream format.

https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format. Hugging Face's datasets keep
their rows as streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from hpctrain.data.importers.tar import reading
from hpctrain.errors import Error

SUFFIXES = (".arrow", ".feather", ".ipc")
_MAGIC = b"ARROW1"


def batches(file: Path) -> Iterator[Any]:
    """Yield the record batches of a file, in order; one is mapped or decompressed at a time.

    Args:
        file: To read.

    Raises:
        Error: It cannot be read.
    """
    with _opened(file) as table:
        whole = isinstance(table, pa.RecordBatchFileReader)
        each = map(table.get_batch, range(table.num_record_batches)) if whole else iter(table)
        for batch in each:
            batch.validate()
            yield batch


def schema(file: Path) -> Any:
    """Return the types of a file's columns.

    Args:
        file: To read.

    Raises:
        Error: It cannot be read.
    """
    with _opened(file) as table:
        return table.schema


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with reading(file, pa.ArrowException, ValueError), pa.memory_map(str(file)) as mapped:
        head = mapped.read(len(_MAGIC))
        mapped.seek(0)
        if head.startswith(b"FEA1"):
            raise Error(
                f"{file} is Feather of version 1, which is no Arrow file.",
                hint="write it anew: pyarrow.feather.write_feather(read_table(old), new).",
            )
        yield pa.ipc.open_file(mapped) if head == _MAGIC else pa.ipc.open_stream(mapped)
