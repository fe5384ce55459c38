"""Import text for a language model, as rows of bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hpctrain.data.importers.import_plan import (
    BLOCK_BYTES,
    Columns,
    Importer,
    Items,
    Survey,
    blocks,
    stamp,
)
from hpctrain.data.index import FieldSpec
from hpctrain.data.summary import Found
from hpctrain.errors import Error


class Text(Importer):
    """An importer of text: rows of ``sequence_length + 1`` bytes that overlap by one byte.

    The end of the text is the validation split: text drawn at random would be its neighbours' twin.
    """

    what = "rows of text"

    def survey(self) -> Survey:
        """Count the rows of the text, and divide them into splits."""
        length = self.options.sequence_length
        rows = (self.path.stat().st_size - 1) // length
        validation = round(rows * self.options.validation_fraction)
        if rows - validation < 1:
            raise Error(
                f"{self.path} is too short for one sample of {length + 1} bytes.",
                hint="give a longer text or a smaller --sequence-length.",
            )
        return Survey(
            runs=[("train", rows - validation), ("validation", validation)],
            fields={"tokens": FieldSpec("|u1", (length + 1,))},
            bytes=rows * (length + 1),
            details={"stamp": stamp(self.path)},
            found=Found("text, rows of its bytes; the end of it is the validation split"),
        )

    def read(self, survey: Survey, items: Items) -> Iterator[Columns]:
        """Cut the rows of these numbers out of the file.

        Args:
            survey: As found.
            items: Numbers of rows, rising.
        """
        length = self.options.sequence_length
        try:
            with self.path.open("rb") as file:
                for part in blocks(items, max(1, BLOCK_BYTES // length)):
                    first = int(part[0])
                    file.seek(first * length)
                    data = file.read((int(part[-1]) - first + 1) * length + 1)
                    text = np.frombuffer(data, dtype=np.uint8)
                    rows = np.lib.stride_tricks.sliding_window_view(text, length + 1)[::length]
                    yield {"tokens": rows[part - first]}
        except (OSError, ValueError, IndexError) as error:
            raise Error(
                f"cannot read {self.path}: {error}.", hint="was it changed while it was read?"
            ) from error
