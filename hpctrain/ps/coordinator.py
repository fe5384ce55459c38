"""What has to be known in one place: who takes part, how samples are divided, and small sums.

The server with the lowest number coordinates; each of the others is ready to take over. Workers
ask (`wire.Ask`), and none waits for a worker that is gone.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hpctrain.ps import wire
from hpctrain.ps.layout import DTYPES

Reply = Callable[[int, wire.Answer], None]

SHARES = 64
"""Shares by speed are parts of this many: coarse, so that noise does not change them."""

SHIFT = 0.15
"""A division by speed is kept while no worker's share would change by more than this part."""


class Coordinator:
    """Answers workers' questions.

    Args:
        workers: Who takes part.
        shares: Of each of them in a global batch; None: by their speed.
        reply: Sends an answer to a worker.
        timeout_seconds: Longest wait of a collective for a worker that pushes nothing either.

    Attributes:
        stop: Whether a worker wants training to end.
        divisions: Decided so far: (epoch, round) -> workers and their shares.
    """

    def __init__(
        self,
        workers: Iterable[int],
        shares: Sequence[int] | None,
        reply: Reply,
        timeout_seconds: float,
    ) -> None:
        self.workers = sorted(workers)
        self.stop = False
        self.divisions: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        self._by_hand = dict(zip(self.workers, shares, strict=True)) if shares else None
        self._shares = dict.fromkeys(self.workers, 1)
        self._reply = reply
        self._timeout_seconds = timeout_seconds
        self._speeds: dict[int, float] = {}
        self._pools: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._reductions: dict[int, dict[int, wire.Ask]] = {}
        self._broadcasts: dict[int, dict[int, wire.Ask]] = {}
        self._began: dict[int, float] = {}

    def ask(self, worker: int, question: wire.Ask) -> None:
        """Answer, now or when the other workers have come."""
        getattr(self, f"_{question.what}")(worker, question)

    def leave(self, worker: int) -> None:
        """A worker is done or lost."""
        if worker in self.workers:
            self.workers.remove(worker)
        for number in list(self._reductions):
            self._finish_reduction(number)

    def join(self, worker: int) -> None:
        """A worker comes; it has a share from the next round that is not decided yet."""
        self.workers = sorted({*self.workers, worker})
        self._shares.setdefault(worker, max(1, min(self._shares.values(), default=1)))

    def decided(self, message: wire.Decided) -> None:
        """Take over what another coordinator decided."""
        self.divisions[message.epoch, message.round] = (message.workers, message.shares)

    def overdue(self) -> str:
        """Who is waited for, where a collective takes too long; else nothing."""
        for number, given in self._reductions.items():
            if time.monotonic() - self._began[number] > self._timeout_seconds:
                missing = [str(worker) for worker in self.workers if worker not in given]
                return ", ".join(missing)
        return ""

    def postpone(self, worker: int) -> None:
        """The worker pushed something: it lives, and whoever waits for it waits for its work."""
        for number, given in self._reductions.items() if self._reductions else ():
            if worker not in given:
                self._began[number] = time.monotonic()

    def division(self, epoch: int, round_: int) -> tuple[list[int], list[int]]:
        """Who has which share of the global batches of a round; decided when first asked."""
        if (epoch, round_) not in self.divisions:
            self._divide()
            shares = [self._shares[worker] for worker in self.workers]
            self.divisions[epoch, round_] = (list(self.workers), shares)
        return self.divisions[epoch, round_]

    def _divide(self) -> None:
        if self._by_hand is not None:
            self._shares = {w: self._by_hand.get(w, 1) for w in self.workers}
            return
        known = [self._speeds[worker] for worker in self.workers if worker in self._speeds]
        if len(known) < len(self.workers):
            return
        total = sum(known)
        wanted = {w: max(1, round(SHARES * self._speeds[w] / total)) for w in self.workers}
        present = sum(self._shares[worker] for worker in self.workers)
        for worker in self.workers:
            before, now = self._shares[worker] / present, wanted[worker] / sum(wanted.values())
            if abs(now - before) > SHIFT * before:
                self._shares |= wanted
                return

    def _division(self, worker: int, question: wire.Ask) -> None:
        epoch, round_, speed = question.value
        if speed is not None:
            self._speeds[worker] = float(speed)
        workers, shares = self.division(int(epoch), int(round_))
        self._answer(worker, question, [workers, shares, self.stop])

    def add(self, pool: str, values: Mapping[str, float]) -> None:
        """Put values into a pool."""
        self._pools[pool].update(values)

    def _give(self, worker: int, question: wire.Ask) -> None:
        pool, values = question.value
        self.add(pool, values)
        sums: dict[str, float] = {}
        if worker == min(self.workers, default=worker):
            sums = dict(self._pools.pop(pool))
        self._answer(worker, question, [sums, self.stop])

    def _stop(self, worker: int, question: wire.Ask) -> None:
        self.stop = True
        self._answer(worker, question, None)

    def _reduce(self, worker: int, question: wire.Ask) -> None:
        number, _ = question.value
        self._reductions.setdefault(number, {})[worker] = question
        self._began.setdefault(number, time.monotonic())
        self._finish_reduction(number)

    def _finish_reduction(self, number: int) -> None:
        given = self._reductions[number]
        if any(worker not in given for worker in self.workers):
            return
        del self._reductions[number], self._began[number]
        dtype = DTYPES.get(next(iter(given.values())).value[1], torch.int64)
        total: torch.Tensor | None = None
        for worker in sorted(given):  # in this order, so that the sum is the same each time
            if given[worker].data:
                value = torch.frombuffer(bytearray(given[worker].data), dtype=dtype)
                total = value if total is None else total + value
        data = b"" if total is None else total.numpy().tobytes()
        for worker, question in given.items():
            self._answer(worker, question, None, data)

    def _broadcast(self, worker: int, question: wire.Ask) -> None:
        number, root = question.value
        asked = self._broadcasts.setdefault(number, {})
        asked[worker] = question
        if root not in asked:
            return
        if worker == root:
            for listener, waiting in asked.items():
                self._answer(listener, waiting, None, b"" if listener == root else question.data)
        else:
            self._answer(worker, question, None, asked[root].data)
        if all(other in asked for other in self.workers):
            del self._broadcasts[number]

    def _answer(self, worker: int, question: wire.Ask, value: Any, data: bytes = b"") -> None:
        self._reply(worker, wire.Answer(question.number, value, data))
