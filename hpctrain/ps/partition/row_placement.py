"""Which server has which rows of a table, and who takes them over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpctrain.ps.partition.placement import place
from hpctrain.tables.spec import SHARDS, TableSpec


class RowPlacement:
    """Says where rows are.

    The parts of each table are placed as slices of parameters are. A *group* is what one server has
    of all tables at the beginning, and has that server's number; as a whole it belongs to the
    server itself, or when that is lost to the next one, if that has a copy.

    Args:
        servers: All that there were at the beginning.
        method: As in ``ps.placement``.
        copies: 0 or 1.

    Attributes:
        groups: All groups, ascending.
        holders: By group, the server that it belongs to, then the one with a copy.
    """

    def __init__(
        self, servers: Sequence[int], method: Literal["hash", "greedy"], copies: int
    ) -> None:
        owners = place([1] * SHARDS, servers, method=method)
        self._groups = np.array([owner for (owner,) in owners], np.int64)
        self.groups = sorted(servers)
        count = len(servers)
        self.holders = {
            group: [self.groups[(place + n) % count] for n in range(copies + 1)]
            for place, group in enumerate(self.groups)
        }

    def groups_of(self, spec: TableSpec, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the group of each row.

        Args:
            spec: Of the table.
            ids: Of the rows.
        """
        found: NDArray[np.int64] = self._groups[spec.shards(ids)]
        return found

    def lose(self, server: int) -> list[int]:
        """Go on without a server; return the groups that belonged to it.

        Args:
            server: The one that is lost.
        """
        moved = [group for group, holders in self.holders.items() if holders[:1] == [server]]
        for holders in self.holders.values():
            if server in holders:
                holders.remove(server)
        return moved
