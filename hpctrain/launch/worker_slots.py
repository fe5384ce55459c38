"""Keep as many ranks started as there should be."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpctrain.launch.driver import LOOK_SECONDS, Driver
from hpctrain.launch.starters import RankProcess, Starter

PAUSE_SECONDS = (0.5, 60.0)
"""A seat is empty so long after a loss; twice as long after each start that came to nothing, up to
the second. No host is given up for good."""

MOST_FAILURES = 3
"""Starts of a seat that came to nothing, after which the run ends if nobody takes part yet."""


@dataclass
class _WorkerSlot:
    running: asyncio.Task[int] | None = None
    not_before: float = 0.0
    failures: int = 0
    came: bool = False


class WorkerSlots:
    """Starts the ranks of a driver, and starts them again where they are lost.

    Args:
        driver: Tells which ranks are lost.
        way: How to start one.
        task: What a rank runs, by its seat.
        say: Tells the person who watches.
    """

    def __init__(
        self,
        driver: Driver,
        way: Starter,
        task: Callable[[int], RankProcess],
        say: Callable[[str], None],
    ) -> None:
        self._driver = driver
        self._way = way
        self._task = task
        self._say = say
        self._seats = [_WorkerSlot() for _ in way.hosts]
        driver.lost = self.clear

    def clear(self, seat: int) -> None:
        """End what is left of a seat's rank."""
        if 0 <= seat < len(self._seats):
            running = self._seats[seat].running
            if running is not None:
                running.cancel()

    async def ended(self, seconds: float) -> None:
        """Wait until ranks have ended by themselves, for so long at most."""
        running = [seat.running for seat in self._seats if seat.running is not None]
        if running:
            await asyncio.wait(running, timeout=seconds)

    async def keep(self) -> None:
        """Start ranks until this is cancelled; then end them all."""
        try:
            while True:
                taken = {rank.seat for rank in self._driver.ranks}
                for number, seat in enumerate(self._seats):
                    seat.came = seat.came or number in taken
                    if seat.running is None:
                        if time.monotonic() >= seat.not_before and number not in taken:
                            await self._start(number, seat)
                    elif seat.running.done():
                        self._ended(number, seat)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            running = [seat.running for seat in self._seats if seat.running is not None]
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _start(self, number: int, seat: _WorkerSlot) -> None:
        again = seat.came or seat.failures
        if again and not await self._way.usable(number):
            self._pause(seat, failed=True)
            return
        if again:
            self._say(f"starting a rank on {self._way.hosts[number] or 'another node'}")
        seat.came = False
        seat.running = asyncio.ensure_future(self._way.run(number, self._task(number)))

    def _ended(self, number: int, seat: _WorkerSlot) -> None:
        running, seat.running = seat.running, None
        assert running is not None
        code = 1
        with contextlib.suppress(asyncio.CancelledError):
            if (error := running.exception()) is not None:
                self._say(str(error))
            else:
                code = running.result()
        self._pause(seat, failed=not seat.came)
        if seat.came or self._driver.generation >= 0:
            return
        if code == 2 or seat.failures >= MOST_FAILURES:
            where = self._way.hosts[number] or "a node"
            why = f"a rank on {where} did not start: exit code {code}."
            self._driver.end(code or 1, f"{why} HINT: what it said stands above, or in --logs.")

    def _pause(self, seat: _WorkerSlot, *, failed: bool) -> None:
        first, most = PAUSE_SECONDS
        seat.failures = seat.failures + 1 if failed else 0
        seat.not_before = time.monotonic() + min(most, first * 2**seat.failures)


def place_variables(hosts: list[str], seat: int) -> Mapping[str, str]:
    """Return the variables that tell a rank its place before there is a world.

    Args:
        hosts: Of each seat; an empty name: not known.
        seat: The rank's.
    """
    host = hosts[seat]
    local = [number for number, each in enumerate(hosts) if each == host and host]
    values = {
        "RANK": seat,
        "SIZE": len(hosts),
        "LOCAL_RANK": local.index(seat) if local else 0,
        "LOCAL_SIZE": len(local) or 1,
    }
    return {f"HPCTRAIN_{name}": str(value) for name, value in values.items()}
