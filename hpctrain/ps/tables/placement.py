"""Which server has which rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpctrain.ps.partition.placement import place
from hpctrain.tables.spec import SHARDS, TableSpec


class RowPlacement:
    """Says where rows are: the parts of each table are placed as slices of parameters are.

    Args:
        servers: All that there were at the beginning.
        method: As in ``ps.placement``.
    """

    def __init__(self, servers: Sequence[int], method: Literal["hash", "greedy"]) -> None:
        owners = place([1] * SHARDS, servers, method=method)
        self._owners = np.array([owner for (owner,) in owners], np.int64)

    def owners(self, spec: TableSpec, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the server of each row.

        Args:
            spec: Of the table.
            ids: Of the rows.
        """
        found: NDArray[np.int64] = self._owners[spec.shards(ids)]
        return found
