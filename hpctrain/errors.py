"""The errors that hpctrain raises on purpose, and the exit codes they become."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Error(Exception):
    """An error that the caller can put right.

    The command prints it in one line, without a traceback, and exits with ``exit_code``.

    Example:
        >>> print(Error("no shard set at shards/.", hint="give --data."))
        no shard set at shards/. HINT: give --data.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        # One line whatever the parts held, because a log is read line by line.
        text = f"{self.message} HINT: {self.hint}" if self.hint else self.message
        return " ".join(text.split())


class PeerLost(Error):  # noqa: N818 - an event of distributed life, not a mistake
    """The error of a rank whose peer died, hung, or left.

    Raised out of ``optimizer.step()`` and of the world's collectives, whatever engine noticed it.

    Example:
        >>> raise PeerLost("rank 2 on n7 is lost.", hint="see its own log.")
        Traceback (most recent call last):
        hpctrain.errors.PeerLost: rank 2 on n7 is lost. HINT: see its own log.
    """

    exit_code = 1


class Dismissed(Error):  # noqa: N818 - nothing went wrong
    """The run was over before this process could take part in it."""

    exit_code = 0


def nearest(name: str, names: Iterable[str], listing: str = "") -> str:
    """Return a hint that offers the name closest to a misspelt one, or lists the valid ones.

    Args:
        name: As it was given.
        names: The valid ones.
        listing: What shows them, where they are too many for a line.

    Example:
        >>> nearest("horovd", ["single", "horovod"])
        "did you mean 'horovod'?"
    """
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:  # `lr` for `optimizer.lr`
        close = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
    if close:
        return f"did you mean '{close[0]}'?"
    if listing:
        return f"{listing} lists the valid names."
    return "valid names: " + ", ".join(sorted(names)) + "."
