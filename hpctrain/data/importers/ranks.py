"""Ranks that import together and meet in one folder: files are all they need of each other.

Every rank has a file there, which holds a word of its own and grows as long as the rank lives. Rank
0 starts a run by publishing the words of all ranks, so none takes what an earlier run left for its
own. A rank that fails says so in another file, and the others stop.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from hpctrain.data.writer import writing
from hpctrain.errors import Error
from hpctrain.files import write_text
from hpctrain.world.launcher import Launch

POLL_SECONDS = 0.02
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 60.0
FAREWELL_SECONDS = 1.0
"""How long rank 0 waits for the others when it has only bad news for them."""

T = TypeVar("T")


def put(path: Path, what: Any) -> None:
    """Write JSON, whole or not at all.

    Args:
        path: Of the file.
        what: What JSON can hold.
    """
    with writing(path):
        write_text(path, json.dumps(what))


class Ranks:
    """One rank among those of an import, with a heartbeat; use it as a context manager.

    Args:
        folder: Where they meet; rank 0 may find there what an earlier run has left.
        launch: Who this rank is.
    """

    def __init__(self, folder: Path, launch: Launch) -> None:
        self.folder = folder
        self.rank, self.size = launch.rank, launch.size
        self._word = secrets.token_hex(8)
        self._left = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, daemon=True)
        self._words: dict[str, str] = {}
        self._checked = 0.0

    def __enter__(self) -> Ranks:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for old in (*self.folder.glob("rank-*"), *self.folder.glob("failed-*")):
                old.unlink(missing_ok=True)
            (self.folder / "run").unlink(missing_ok=True)
        if self.size > 1:
            self._say_here()
            self._beat.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.size == 1:
            return
        if error is not None:
            with contextlib.suppress(OSError, Error):
                self._fail(error)
        self._left.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            self._file(self.rank).unlink()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, _StoppedElsewhereError):
            return
        if self.rank == 0 and not self._words:
            deadline = time.monotonic() + FAREWELL_SECONDS
            while len(self._present()) < self.size and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            self._words = self._present()
        why = error.message if isinstance(error, Error) else f"{type(error).__name__}: {error}"
        put(self.folder / f"failed-{self.rank}", {"words": self._words, "why": why})

    def publish(self, what: dict[str, Any]) -> None:
        """Wait for all ranks, then start the run and give them what they need; on rank 0."""
        if self.size > 1:
            self._words = self.wait(
                lambda: words if len(words := self._present()) == self.size else None,
                set(range(1, self.size)),
            )
        put(self.folder / "run", {"words": self._words, "what": what})

    def receive(self) -> Any:
        """Wait for what rank 0 publishes, and return it; on the other ranks."""

        def published() -> Any:
            self._say_here()  # rank 0 may have taken the file for an old one's
            run = self._read("run")
            return run if run and run["words"].get(str(self.rank)) == self._word else None

        run = self.wait(published, {0})
        self._words = run["words"]
        return run["what"]

    def check(self) -> None:
        """Look now and then whether another rank has failed.

        Raises:
            Error: It has.
        """
        if self.size == 1 or time.monotonic() < self._checked + 1.0:
            return
        self._checked = time.monotonic()
        for file in self.folder.glob("failed-*"):
            failed = self._read(file.name)
            if failed and failed["words"].get(str(self.rank)) == self._word:
                raise _StoppedElsewhereError(
                    f"rank {file.name.partition('-')[2]} stopped: {failed['why']}",
                    hint="mend that, and give the same command again: finished shards are kept.",
                )

    def wait(self, done: Callable[[], T | None], whom: set[int]) -> T:
        """Wait until ``done`` gives something, as long as the ranks it depends on show a heartbeat.

        Args:
            done: What is waited for.
            whom: The ranks it depends on.

        Raises:
            Error: A rank failed, or one of those depended on gave no sign of life for a minute.
        """
        heard = dict.fromkeys(whom, ("", time.monotonic()))
        asked = 0.0
        while (result := done()) is None:
            self.check()
            now = time.monotonic()
            if now > asked + BEAT_SECONDS:
                asked = now
                for rank, (before, _) in heard.items():
                    if (sign := self._sign(rank)) != before:
                        heard[rank] = (sign, now)
            silent = [rank for rank, (_, when) in heard.items() if now > when + SILENCE_SECONDS]
            if silent:
                raise Error(
                    f"no sign of life from rank {', '.join(map(str, sorted(silent)))} of "
                    f"{self.size} in {SILENCE_SECONDS:.0f} s, in {self.folder}.",
                    hint="do all ranks see this folder? Start again: finished shards are kept.",
                )
            time.sleep(POLL_SECONDS)
        return result

    def others_left(self) -> bool | None:
        """Whether no other rank is at work any more; None if one is."""
        return True if self._present().keys() <= {str(self.rank)} else None

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}"

    def _sign(self, rank: int) -> str:
        try:
            return self._file(rank).read_text()
        except OSError:
            return ""

    def _present(self) -> dict[str, str]:
        signs = {str(rank): self._sign(rank) for rank in range(self.size)}
        return {rank: sign.split()[0] for rank, sign in signs.items() if sign.strip()}

    def _say_here(self) -> None:
        if not self._file(self.rank).exists():
            with writing(self.folder):
                write_text(self._file(self.rank), f"{self._word} ")

    def _keep_beating(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError), self._file(self.rank).open("r+") as file:
                file.seek(0, 2)
                file.write(".")

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


class _StoppedElsewhereError(Error):
    """Another rank failed; it says so itself."""
