"""Exchanges under way: waited for within a bound, and moved on while others compute."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpctrain.distributed.call import Call
from hpctrain.errors import PeerLost

YIELDING_SECONDS = 2e-3
"""How long a wait only yields its core; waking from a sleep would delay a short one too much."""

LOOK_SECONDS = 2e-4
"""How often exchanges that nobody waits for are moved on."""

IDLE_SECONDS = 1.0
"""After so long without an exchange the thread that moves them on sleeps until there is one."""


class Exchange(dist.Work):
    """A started collective, or a message on its way.

    Args:
        call: Its requests, memory, and what is left to be done.
        result: The tensors that hold the outcome then.
        about: What this is and whom it is with, for the error of one who waits too long.
        seconds: Longest wait.
    """

    def __init__(
        self,
        call: Call,
        result: Any,
        about: Callable[[], str],
        seconds: float,
    ) -> None:
        super().__init__()
        self._call: Call | None = call
        self._result = result
        self._about = about
        self._seconds = seconds
        self._statuses = [MPI.Status() for _ in call.requests]
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._error: PeerLost | None = None
        self._lock = threading.RLock()  # a future's callback may ask this very exchange

    def is_completed(self) -> bool:
        """Return whether it has ended, well or not."""
        with self._lock:
            self._look()
        return self._call is None

    def is_success(self) -> bool:
        """Return whether it has ended well."""
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        """Return what it failed with, if it did."""
        return self._error

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it has ended.

        Args:
            timeout: Longest wait; that of the group where none is given.

        Raises:
            PeerLost: The time is up, or MPI says that a peer is gone.
        """
        given = timeout.total_seconds() if timeout else 0.0
        bound = given or self._seconds
        start = time.monotonic()
        with self._lock:
            while not self._look():
                waited = time.monotonic() - start
                if waited > bound:
                    raise PeerLost(
                        f"{self._about()} did not end within {bound:.0f} s.",
                        hint="one of them hangs, was stopped, or takes no part in it; its own log "
                        "says where.",
                    )
                _rest(waited)
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """Wait until it has ended."""
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future that is completed when it has ended."""
        return self._future

    def result(self) -> Any:
        """Return the tensors that hold the outcome."""
        self.wait()
        return self._result

    def get_future_result(self) -> torch.futures.Future[Any]:
        """Return a future of the outcome."""
        return self._future

    def _source_rank(self) -> int:
        """Return which rank of the group a received message is from; torch asks for it."""
        return int(self._statuses[0].source)

    def advance(self) -> bool:
        """Move it on unless somebody waits for it; return whether it has ended."""
        if self._call is not None and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._call is None

    def _look(self) -> bool:
        if self._call is None:
            return True
        try:
            if not MPI.Request.Testall(self._call.requests, self._statuses):
                return False
            self._call.finish()
        except MPI.Exception as error:
            self._error = PeerLost(
                f"{self._about()} failed: {error}.",
                hint="look for the first error of another rank.",
            )
        self._call = None
        if self._error is None:
            self._future.set_result(self._result)
        else:
            self._future.set_exception(self._error)
        return True


def _rest(waited: float) -> None:
    if waited < YIELDING_SECONDS:
        os.sched_yield()
    else:
        time.sleep(min(waited / 8, 1e-3))


class Mover:
    """Keeps exchanges alive until they have ended, and moves them on while nobody waits for them.

    MPI works on a message only while it is called, so without a thread that calls it nothing would
    overlap with computing. That needs an MPI which several threads may call; where it is not such,
    exchanges are moved on by waits, and when another one begins.
    """

    def __init__(self) -> None:
        self._under_way: list[Exchange] = []
        self._lock = threading.Lock()
        self._awake = threading.Event()
        self._thread: threading.Thread | None = None
        self._able = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._ends = False

    def take(self, exchange: Exchange) -> None:
        """Keep this one, and move it on, until it has ended."""
        with self._lock:
            self._under_way.append(exchange)
            if self._able and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mpi-mover", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
        if not self._able:
            self._move()
        elif not self._awake.is_set():
            self._awake.set()

    def stop(self) -> None:
        """End the thread; MPI may be finalized afterwards."""
        self._ends = True
        self._awake.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ends:
            if self._move():
                last = time.monotonic()
            elif time.monotonic() - last > IDLE_SECONDS:
                self._awake.clear()
                if not self._under_way:
                    self._awake.wait()
                last = time.monotonic()
            time.sleep(LOOK_SECONDS)

    def _move(self) -> bool:
        """Return whether there was anything to move on."""
        with self._lock:
            mine, self._under_way = self._under_way, []
        left = [exchange for exchange in mine if not exchange.advance()]
        with self._lock:
            self._under_way = left + self._under_way
        return bool(mine)
