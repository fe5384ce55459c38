"""Backup workers (Chen et al., "Revisiting Distributed Synchronous SGD", 2016)."""

from __future__ import annotations

from collections.abc import Iterable

from hpctrain.ps.consistency.base import Consistency, Schedule
from hpctrain.ps.consistency.schedules import Rounds


class BackupWorkers(Consistency):
    """``backup:B``: as sync, but each step does without the pushes of the B slowest workers."""

    name = "backup"
    example = "backup:1"
    takes_number = True
    rounds = True

    @property
    def backups(self) -> int:
        """How many stragglers a step does not wait for."""
        return self.number

    def schedule(self, workers: Iterable[int]) -> Schedule:
        """Return a schedule of rounds that are closed without the slowest."""
        return Rounds(workers, self.number)
