"""Moving clients and servers on: spinning while there is work, sleeping more and more without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hpctrain.errors import Error

SPIN_SECONDS = 300e-6
SHORTEST_SLEEP, LONGEST_SLEEP = 20e-6, 0.5e-3
PATIENT_SLEEP, PATIENT_LOOKS = 150e-6, 4
BLIND_SECONDS = 0.05
"""How long a worker with nothing under way does not look for messages."""


class Pollable(Protocol):
    """Something that a loop moves on."""

    def poll(self) -> bool:
        """Move on without blocking; return whether something happened."""


class Waiter:
    """Waits for the next look, longer the longer nothing happens.

    A server that looked all the time would take a core from the workers of its host; this one
    answers a busy worker at once and an idle one within a millisecond. To look takes longer the
    more peers there are, so it also waits for a multiple of what the look before took, within a
    bound.
    """

    def __init__(self) -> None:
        self._since = self._woke = time.monotonic()
        self._sleep = SHORTEST_SLEEP

    def wait(self, moved: bool, *, patient: bool = False) -> None:
        """Sleep until the next look, unless something has just happened.

        Args:
            moved: Whether something has.
            patient: Nobody waits for this thread, and somebody else could use its core.
        """
        now = time.monotonic()
        looked = min(now - self._woke, LONGEST_SLEEP)
        if moved:
            self._since, self._sleep = now, SHORTEST_SLEEP
        elif patient:
            time.sleep(max(PATIENT_SLEEP, PATIENT_LOOKS * looked))
        elif now - self._since > SPIN_SECONDS:
            time.sleep(max(self._sleep, looked))
            self._sleep = min(LONGEST_SLEEP, self._sleep * 1.2)
        self.woke()

    def woke(self) -> None:
        """Note that a look begins now; to be said where something else was waited for."""
        self._woke = time.monotonic()


class Loop(threading.Thread):
    """A thread that moves parts on.

    Args:
        parts: Clients and servers of this process.
        busy: Whether messages are expected; else the thread sleeps until it is woken.
        awaited: Whether somebody waits for them.
        failed: Told about an error, which ends the loop.
    """

    def __init__(
        self,
        parts: Sequence[Pollable],
        busy: Callable[[], bool],
        awaited: Callable[[], bool],
        failed: Callable[[Error], None],
    ) -> None:
        super().__init__(name="hpctrain-ps", daemon=True)
        self._parts = parts
        self._busy = busy
        self._awaited = awaited
        self._failed = failed
        self._woken = threading.Event()
        self._ended = False

    def wake(self) -> None:
        """Wake the thread, because there is something to do."""
        self._woken.set()

    def run(self) -> None:
        """Move all parts on until ``end``."""
        waiter = Waiter()
        try:
            with torch.no_grad():
                while not self._ended:
                    moved = False
                    for part in self._parts:
                        moved |= part.poll()
                    if moved or self._busy():
                        waiter.wait(moved, patient=not self._awaited())
                    else:
                        self._woken.wait(BLIND_SECONDS)
                        self._woken.clear()
                        waiter.woke()
        except Error as error:
            self._failed(error)
        except Exception as error:
            self._failed(Error(f"the communication thread failed: {error!r}."))
            raise

    def end(self) -> None:
        """Stop moving on, and wait for the thread."""
        self._ended = True
        self.wake()
        self.join()
