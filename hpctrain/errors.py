"""The errors that hpctrain raises on purpose, and the exit codes they become."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Error(Exception):
    """Something that the caller can put right.

    Args:
        message: What failed, and which file, rank or host it was.
        hint: What to do about it; printed after ``HINT:``.
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
    """A rank that this one depends on died, hung, or left.

    Raised out of ``optimizer.step()`` and of the world's collectives, whatever engine noticed it.
    """

    exit_code = 1


class Dismissed(Error):  # noqa: N818 - nothing went wrong
    """The run was over before this process could take part in it."""

    exit_code = 0


def nearest(name: str, names: Iterable[str], listing: str = "") -> str:
    """A hint that offers the name closest to a misspelt one, or says which there are.

    Args:
        name: As it was given.
        names: The valid ones.
        listing: What shows them, where they are too many for a line.
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
