"""What a table is: the plain value that all ranks, and its checkpoints, agree on."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.data.random import key, mix
from hpctrain.errors import Error
from hpctrain.tables.rules import AnyRule

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SHARDS = 256
"""A table is cut into so many parts, by a hash of the row's id: what is placed on servers.

No more than a byte tells apart, by which rows are sorted.
"""

_SHARD, _START = range(2)  # what a key is for
_STEP = 0x9E3779B97F4A7C15


class Start(msgspec.Struct, frozen=True):
    """What rows begin with: a pure function of the table's seed and name, and the row's id.

    Attributes:
        kind: ``zeros``, ``uniform`` or ``normal``.
        scale: Uniform values are between ``-scale`` and ``scale``; of normal ones it is the
            deviation. Those are sums of 12 uniform ones, so that they are the same bits everywhere.
    """

    kind: str
    scale: float

    @classmethod
    def of(cls, text: str) -> Start:
        """Return what a text says, such as ``uniform:0.05``.

        Raises:
            Error: It says nothing of that kind.

        Example:
            >>> Start.of("uniform:0.05")
            Start(kind='uniform', scale=0.05)
        """
        if text == "zeros":
            return cls("zeros", 0.0)
        found = re.fullmatch(r"(uniform|normal):(\d*\.?\d+(?:e-?\d+)?)", text)
        if found is None:
            raise Error(
                f"a table cannot start from '{text}'.",
                hint="say zeros, uniform:SCALE or normal:DEVIATION.",
            )
        return cls(found[1], float(found[2]))


class TableSpec(msgspec.Struct, frozen=True):
    """What a table is.

    Attributes:
        name: Its name, one of the model's tables.
        dim: Values of a row.
        rows: How many rows there are; None: ids are any 64-bit integers.
        dtype: Of the values, by name.
        rule: What rows change by.
        start: What rows begin with.
        seed: Likewise.
        admit_after: Sights of an id after which it has a row.
        evict_after: Updates without a sight after which a row is forgotten; None: never.
        evict_below: Only rows that were seen less often are; None: all.
    """

    name: str
    dim: int
    rows: int | None
    dtype: str
    rule: AnyRule
    start: Start
    seed: int
    admit_after: int = 1
    evict_after: int | None = None
    evict_below: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the values."""
        return DTYPES[self.dtype]

    def describe(self) -> str:
        """Return a text that is the same where tables are."""
        return msgspec.json.encode(self).decode()

    def shards(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the part of the table that each row is in, 0 to ``SHARDS - 1``.

        Args:
            ids: Of the rows.
        """
        hashed = mix(ids.view(np.uint64) ^ np.uint64(self._key(_SHARD)))
        return (hashed % np.uint64(SHARDS)).astype(np.int64)

    def start_values(self, ids: NDArray[np.int64]) -> torch.Tensor:
        """Return what rows begin with, ``[n, dim]``.

        Args:
            ids: Of the rows.
        """
        shape = (len(ids), self.dim)
        if self.start.kind == "zeros":
            return torch.zeros(shape, dtype=self.torch_dtype)
        row = mix(ids.view(np.uint64) ^ np.uint64(self._key(_START)))[:, None]
        if self.start.kind == "uniform":
            unit = (_words(row, self.dim, 0, 1) >> np.uint64(11)) * 2.0**-53
            values: Any = (2 * unit - 1) * self.start.scale
        else:
            total: Any = np.zeros(shape)
            for number in range(3):
                words = _words(row, self.dim, number, 3)
                for part in range(4):
                    total += ((words >> np.uint64(16 * part)) & np.uint64(0xFFFF)) + 0.5
            values = (total / 2**16 - 6) * self.start.scale
        return torch.from_numpy(values).to(self.torch_dtype)

    def _key(self, purpose: int) -> int:
        return key(self.seed, purpose, *self.name.encode())


def _words(row: NDArray[np.uint64], dim: int, number: int, each: int) -> NDArray[np.uint64]:
    """Return a random word for each value of rows: its word ``number``, of ``each`` it has."""
    places = np.arange(dim, dtype=np.uint64) * np.uint64(each) + np.uint64(number + 1)
    return mix(row + places[None, :] * np.uint64(_STEP))
