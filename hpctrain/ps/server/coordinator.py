"""What has to be known in one place: who takes part, how samples are divided, and small sums.

The server with the lowest number coordinates; each of the others is ready to take over. Workers
ask (`messages.Ask`), and none waits for a worker that is gone.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hpctrain.ps.partition.layout import DTYPES
from hpctrain.ps.protocol import messages

Reply = Callable[[int, messages.Answer], None]

FINENESS = 1024
"""Shares by speed are multiples of this part of an equal share: rounded, they hardly change."""

SHIFT = 0.15
"""A division by speed is kept while no worker's share is off by more than this part."""


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
        self._since = dict.fromkeys(self.workers, 0)  # the clock of their first collectives
        self.stop = False
        self.divisions: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        self._by_hand = dict(zip(self.workers, shares, strict=True)) if shares else None
        self._shares = dict.fromkeys(self.workers, 1)
        self._reply = reply
        self._timeout_seconds = timeout_seconds
        self._speeds: dict[int, float] = {}
        self._pools: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._reductions: dict[str, dict[int, messages.Ask]] = {}
        self._broadcasts: dict[str, dict[int, messages.Ask]] = {}
        self._began: dict[str, float] = {}
        self._known: dict[str, messages.Ask] = {}
        self._noted: Any = None

    def ask(self, worker: int, question: messages.Ask) -> None:
        """Answer a worker's question, now or when the other workers have come.

        Args:
            worker: Who asks.
            question: Its ``what`` is one of division, give, note, recall, joined, stop, reduce and
                broadcast.
        """
        getattr(self, f"_{question.what}")(worker, question)

    def leave(self, worker: int) -> None:
        """Wait no longer for a worker that is done or lost."""
        if worker in self.workers:
            self.workers.remove(worker)
        self._since.pop(worker, None)
        for number in list(self._reductions):
            self._finish_reduction(number)
        for number in list(self._broadcasts):
            self._finish_broadcast(number)

    def known(self, question: messages.Ask) -> None:
        """Take over a result of the lost coordinator, for workers that do not have it yet."""
        number, _ = question.value
        self._known[number] = question
        for waiting in (self._reductions, self._broadcasts):
            for worker, asked in waiting.pop(number, {}).items():
                self._tell_known(worker, asked)
        self._began.pop(number, None)

    def _tell_known(self, worker: int, question: messages.Ask) -> bool:
        known = self._known.get(question.value[0])
        if known is not None:
            self._answer(worker, question, known.value[1], known.data)
        return known is not None

    def expect(self, worker: int, since: int = 0) -> None:
        """Wait for a worker in all collectives from this clock on.

        Args:
            worker: Who comes.
            since: The clock of its first collectives.
        """
        self._since.setdefault(worker, since)

    def join(self, worker: int, since: int = 0) -> None:
        """Let a worker take part: it has a share from the next round not decided yet.

        Args:
            worker: Who.
            since: The clock of the first collectives that it comes to: where all take each step
                together the others may still be about those of the step before its first.
        """
        self.expect(worker, since)
        self.workers = sorted({*self.workers, worker})
        self._shares.setdefault(worker, max(1, min(self._shares.values(), default=1)))

    def decided(self, message: messages.Decided) -> None:
        """Take over what another coordinator decided; shares stay so until speeds are known."""
        self.divisions[message.epoch, message.round] = (message.workers, message.shares)
        self._shares |= dict(zip(message.workers, message.shares, strict=True))

    def overdue(self) -> str:
        """Return who is waited for, where a collective takes too long; else an empty string."""
        for number, given in self._reductions.items():
            if time.monotonic() - self._began[number] > self._timeout_seconds:
                missing = [str(worker) for worker in self._expected(number) if worker not in given]
                return ", ".join(missing)
        for number, asked in self._broadcasts.items():
            late = time.monotonic() - self._began[number] > self._timeout_seconds
            if late and _giver(asked) is None:
                return ", ".join(sorted({str(each.value[1]) for each in asked.values()}))
        return ""

    def postpone(self, worker: int) -> None:
        """Be patient with collectives that wait for this worker: it has just pushed something."""
        for waiting in (self._reductions, self._broadcasts):
            for number, given in waiting.items() if waiting else ():
                if worker not in given:
                    self._began[number] = time.monotonic()

    def division(self, epoch: int, round_: int) -> tuple[list[int], list[int]]:
        """Return who has which share of a round's global batches; decided when first asked.

        Args:
            epoch: Which epoch.
            round_: Which round of it.
        """
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
        present = sum(self._shares[worker] for worker in self.workers)
        parts = {w: (self._shares[w] / present, self._speeds[w] / total) for w in self.workers}
        if any(abs(now - before) > SHIFT * before for before, now in parts.values()):
            whole = FINENESS * len(self.workers)
            self._shares |= {w: max(1, round(whole * now)) for w, (_, now) in parts.items()}

    def _division(self, worker: int, question: messages.Ask) -> None:
        epoch, round_, speed = question.value
        if speed is not None:
            self._speeds[worker] = float(speed)
        workers, shares = self.division(int(epoch), int(round_))
        self._answer(worker, question, [workers, shares, self.stop])

    def add(self, pool: str, values: Mapping[str, float]) -> None:
        """Add values to those that ``give`` sums up.

        Args:
            pool: Which sums.
            values: By name.
        """
        self._pools[pool].update(values)

    def _give(self, worker: int, question: messages.Ask) -> None:
        pool, values = question.value
        self.add(pool, values)
        sums: dict[str, float] = {}
        if worker == min(self.workers, default=worker):
            sums = dict(self._pools.pop(pool))
        self._answer(worker, question, [sums, self.stop])

    def _note(self, worker: int, question: messages.Ask) -> None:
        self._noted = question.value
        self._answer(worker, question, None)

    def _recall(self, worker: int, question: messages.Ask) -> None:
        self._answer(worker, question, self._noted)

    def _joined(self, worker: int, question: messages.Ask) -> None:
        self.join(worker, int(question.value))
        self._answer(worker, question, sorted(self._since.items()))

    def _stop(self, worker: int, question: messages.Ask) -> None:
        self.stop = True
        self._answer(worker, question, None)

    def _reduce(self, worker: int, question: messages.Ask) -> None:
        number, _ = question.value
        if self._tell_known(worker, question):
            return
        self._reductions.setdefault(number, {})[worker] = question
        self._began.setdefault(number, time.monotonic())
        self._finish_reduction(number)

    def _expected(self, number: str) -> list[int]:
        """Who comes to a collective: its name begins with its clock."""
        clock = int(number.partition(".")[0])
        return [worker for worker, since in self._since.items() if since <= clock]

    def _finish_reduction(self, number: str) -> None:
        given = self._reductions[number]
        if any(worker not in given for worker in self._expected(number)):
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

    def _broadcast(self, worker: int, question: messages.Ask) -> None:
        number, _ = question.value
        if self._tell_known(worker, question):
            return
        asked = self._broadcasts.setdefault(number, {})
        self._began.setdefault(number, time.monotonic())
        # Who does not know yet that the root is lost names it; another gives in its place.
        before, asked[worker] = _giver(asked), question
        giver = _giver(asked)
        if giver is None:
            self._finish_broadcast(number)
            return
        for listener in asked if before is None else (worker,):
            data = b"" if listener in (giver, asked[listener].value[1]) else asked[giver].data
            self._answer(listener, asked[listener], None, data)
        self._finish_broadcast(number)

    def _finish_broadcast(self, number: str) -> None:
        asked = self._broadcasts[number]
        if any(worker not in asked for worker in self._expected(number)):
            return
        del self._broadcasts[number], self._began[number]
        if _giver(asked) is None:  # the root was lost before it gave
            for worker, question in asked.items():
                self._answer(worker, question, messages.AGAIN)

    def _answer(self, worker: int, question: messages.Ask, value: Any, data: bytes = b"") -> None:
        self._reply(worker, messages.Answer(question.number, value, data))


def _giver(asked: Mapping[int, messages.Ask]) -> int | None:
    """Who of those that asked for a broadcast is its root, and so has given."""
    return next((worker for worker, each in asked.items() if each.value[1] == worker), None)
