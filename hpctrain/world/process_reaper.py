"""Kill processes that the others count as lost, so that they cannot hold up the job's end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

IDENTITY_WORDS = 4


class ProcessReaper:
    """Knows the processes of all peers, and ends those of this host that are lost.

    A stopped process would otherwise stay, and its launcher with it, until somebody comes by.

    Args:
        identities: Of each peer, what :func:`identity` says there.
    """

    def __init__(self, identities: Mapping[int, Sequence[int]]) -> None:
        self._near: dict[int, list[int]] = {}
        self._mine = identity()
        self._stopped: dict[int, float] = {}
        self._looked = 0.0
        self.know(identities)

    def know(self, identities: Mapping[int, Sequence[int]]) -> None:
        """Take note of peers that came later."""
        host = self._mine[2:]
        near = {peer: list(its) for peer, its in identities.items() if list(its[2:]) == host}
        self._near |= {peer: its for peer, its in near.items() if its != self._mine}

    def cut_off(self, peer: int) -> None:
        """End that peer's process, if it is of this host and still the same process."""
        its = self._near.get(peer)
        # A number may mean another process by now.
        if its is not None and identity(its[0]) == its:
            with contextlib.suppress(OSError):
                os.kill(its[0], signal.SIGKILL)

    def cut_off_stopped(self, seconds: float) -> None:
        """End the processes of this host that are seen to be stopped for so long; ask often."""
        now = time.monotonic()
        if now - self._looked < seconds / 8:
            return
        if now - self._looked > seconds / 2:  # this process was stopped, too, or looks first
            self._stopped.clear()
        self._looked = now
        for peer, its in self._near.items():
            if _stat(its[0])[0] not in ("T", "t"):
                self._stopped.pop(peer, None)
            elif now - self._stopped.setdefault(peer, now) > seconds:
                self.cut_off(peer)

    @contextlib.contextmanager
    def watch(self, seconds: float) -> Iterator[None]:
        """End processes of this host that are stopped for so long while this one waits blindly."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(seconds / 8):
                self.cut_off_stopped(seconds)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def identity(pid: int | None = None) -> list[int]:
    """Return what identifies a process: number, start, PID namespace, host (``IDENTITY_WORDS``)."""
    pid = pid or os.getpid()
    try:
        began = int(_stat(pid)[19])
        space = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - not a path to open
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return [pid, began, space, int(boot.replace("-", "")[:15], 16)]
    except (OSError, ValueError, IndexError):
        return [pid, 0, 0, 0]


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; a list of one empty text: nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() or [""]
    except OSError:
        return [""]
