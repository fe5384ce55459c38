"""List the files below a folder, and what of them is not looked at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.data.summary import Found
from hpctrain.errors import Error

SYSTEM = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "Thumbs.db"})
"""What file systems and archivers leave behind."""

MOST_LEVELS = 50
HIDDEN = "hidden"
SPECIAL = "not a file (a pipe, socket or device)"
NOWHERE = "link that leads nowhere"


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name is none of the data."""
    return part.startswith(".") or part in SYSTEM


@dataclass(frozen=True)
class Tree:
    """The files below a folder, by name, and what was left out.

    Attributes:
        files: Their names with the folders below the source, in order.
        left_out: Why, and names, of what is no file that could be looked at.
    """

    files: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def found(self, kind: str) -> Found:
        """Return the beginning of a source's summary: what was left out so far."""
        found = Found(kind)
        for why, name in self.left_out:
            found.leave(why, name)
        return found


def walk(folder: Path) -> Tree:
    """List the files below a folder; linked files and folders are taken for what they lead to.

    Raises:
        Error: A folder cannot be listed, or leads back to where it is.
    """
    tree = Tree([])
    _walk(str(folder), "", tree, [folder.resolve()])
    return tree


def _walk(folder: str, prefix: str, tree: Tree, within: Sequence[Path]) -> None:
    if prefix.count("/") > MOST_LEVELS:
        raise Error(
            f"{folder} is more than {MOST_LEVELS} folders deep.", hint="is it the right folder?"
        )
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if is_hidden(entry.name):
                tree.left_out.append((HIDDEN, name))
            elif entry.is_dir():
                inner = within
                if entry.is_symlink():
                    inner = [*within, Path(folder).resolve(), Path(entry).resolve()]
                    if any(place.is_relative_to(inner[-1]) for place in inner[:-1]):
                        raise Error(
                            f"{entry.path} leads back to where it is.", hint="remove this link."
                        )
                _walk(entry.path, f"{name}/", tree, inner)
            elif entry.is_file():
                tree.files.append(name)
            else:
                nowhere = entry.is_symlink() and not Path(entry).exists()
                tree.left_out.append((NOWHERE if nowhere else SPECIAL, name))
    except OSError as error:
        raise Error(f"cannot list {folder}: {error.strerror}.", hint="may you read it?") from error
