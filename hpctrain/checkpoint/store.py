"""Checkpoints: atomic, verified, written while training goes on.

A checkpoint is a folder ``step-NNNNNNNN`` with tensors (safetensors) and the rest (JSON), which
also holds the tensors' checksums: see ``pieces``. It is written under another name and renamed, so
whatever happens at whatever instant, each folder of that name is whole, and older ones are
untouched until it is.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpctrain.checkpoint.pieces import (
    INDEX,
    TENSORS,
    Box,
    Checkpoint,
    Piece,
    Range,
    commit,
    copy_piece,
    discard,
    publish,
    write_file,
    write_index,
    write_piece,
)
from hpctrain.checkpoint.tensor_file import Memory
from hpctrain.errors import Error

REST = INDEX
BEST = "best"


def save(folder: Path, state: Any) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        folder: Where; replaced if it exists.
        state: A tree of tensors and plain values.

    Raises:
        OSError: It could not be written; nothing that was there is lost.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Path(folder, "checkpoint"), {"weight": torch.ones(2), "step": 7})
        ...     load_verified(Path(folder, "checkpoint"))
        {'weight': tensor([1., 1.]), 'step': 7}
    """
    _write(folder, copy_piece(state, Memory()))


def _write(folder: Path, piece: Piece, beside: Path | None = None) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        if beside is None:
            temporary.mkdir(parents=True)
        else:
            beside.rename(temporary)
        write_index(temporary, [write_file(temporary, TENSORS, piece)])
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_verified(folder: Path, into: Any = None) -> Any:
    """Read a checkpoint and check that every byte is what was written.

    Args:
        folder: Of the checkpoint.
        into: A tree with tensors that may be written to where they fit, such as those that training
            goes on with: ``pieces.Checkpoint.state`` has the conditions.

    Raises:
        Error: It is missing, incomplete or damaged; the file at fault is named. Tensors of ``into``
            may have been written to.
    """
    with Checkpoint(folder) as checkpoint:
        return checkpoint.state(into=into)


class CheckpointStore:
    """The checkpoints of one run: the newest few and the best. One process writes them.

    Args:
        folder: Holds ``step-NNNNNNNN`` folders and the link ``best``.
        keep: How many of the newest to keep.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CheckpointStore(Path(folder), keep=2)
        ...     for step in (10, 20, 30):
        ...         store.save(step, {"weight": torch.full((2,), float(step))}, best=step == 10)
        ...     store.wait()
        ...     store.steps(), store.best().name, store.newest(print)
        ([10, 20, 30], 'step-00000010', {'weight': tensor([30., 30.])})
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._memory = Memory()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saved_step = -1

    def steps(self) -> list[int]:
        """List the steps of the checkpoints that are there, ascending."""
        names = [path.name for path in self.folder.glob("step-*")] if self.folder.is_dir() else []
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def has(self, step: int) -> bool:
        """Whether the last checkpoint that was saved is of this step."""
        return step == self._saved_step

    def pending(self, step: int) -> Path:
        """Return a new place for files that are to be part of a checkpoint: see ``save``."""
        folder = self.folder / f".{self.path(step).name}.beside.{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def save(
        self, step: int, state: Any, *, best: bool = False, beside: Path | None = None
    ) -> None:
        """Copy a state now and write it in the background, after the one before is written.

        Args:
            step: Names the checkpoint; one that is there already is only marked best.
            state: A tree; its tensors may change once this returns.
            best: Keep it until a better one comes.
            beside: A folder from ``pending``, whose files are on disk and become part of the
                checkpoint.

        Raises:
            Error: The checkpoint before this one could not be written.
        """
        self.wait()
        piece = None if self.has(step) else copy_piece(state, self._memory)

        def write() -> None:
            if piece is not None:
                _write(self.path(step), piece, beside)
            if best:
                self._mark_best(step)
            self._prune()

        self._in_background(step, write)

    def save_piece(
        self,
        step: int,
        state: Any,
        *,
        rank: int,
        ranks: int,
        attempt: str,
        timeout_seconds: float,
        shares: Mapping[str, Box | Range] | None = None,
        best: bool = False,
    ) -> None:
        """Copy this rank's piece of a checkpoint now and write it in the background.

        All ranks call this, with a store of the same shared folder; none has to wait for others.
        When all pieces are on disk, rank 0's thread makes them a checkpoint.

        Args:
            step: Names the checkpoint.
            state: A tree of what this rank owns; what another owns is left out.
            rank: Of this process.
            ranks: How many write.
            attempt: The same on all ranks, and on no others that ever tried to save this step: what
                a run left that was killed is not taken for part of this.
            timeout_seconds: How long rank 0's thread waits for the other pieces.
            shares: Where tensors lie that are parts of larger ones, by path.
            best: Keep it until a better one comes.

        Raises:
            Error: The checkpoint before this one could not be written.
        """
        self.wait()
        piece = copy_piece(state, self._memory, shares)
        pending = self.folder / f".{self.path(step).name}.{attempt}"

        def write() -> None:
            pending.mkdir(parents=True, exist_ok=True)
            write_piece(pending, rank, piece)
            if rank != 0:
                return
            commit(pending, self.path(step), ranks, timeout_seconds=timeout_seconds)
            if best:
                self._mark_best(step)
            self._prune()

        self._in_background(step, write)

    def _in_background(self, step: int, write: Callable[[], None]) -> None:
        self._saved_step = step

        def run() -> None:
            try:
                write()
            except BaseException as error:  # handed to the thread that waits
                self._failure = error

        self._writer = threading.Thread(target=run, name="hpctrain-checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            Error: It could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            if not isinstance(failure, OSError):
                raise failure
            raise Error(
                f"cannot write checkpoint {self.path(self._saved_step)}: {failure}.",
                hint="make room (or raise the quota), then go on with --resume auto: the "
                "checkpoints before it are whole.",
            ) from failure

    def newest(self, complain: Callable[[str], None], into: Any = None) -> Any | None:
        """Read the newest checkpoint that is whole; None: there are none at all.

        Args:
            complain: Told of each one that is passed over.
            into: A tree with tensors that may be written to, as ``load_verified`` has it.

        Raises:
            Error: There are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return load_verified(self.path(step), into)
            except Error as error:
                complain(str(error))
        if steps:
            raise Error(
                f"all {len(steps)} checkpoints in {self.folder} are damaged.",
                hint="start a new run with another --out, or restore them from a backup.",
            )
        return None

    def clean(self) -> None:
        """Remove what a killed run left half-written."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def best(self) -> Path | None:
        """Return the best checkpoint's folder, or None."""
        link = self.folder / BEST
        return link.resolve() if link.exists() else None

    def _mark_best(self, step: int) -> None:
        link = self.folder / f".{BEST}.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(self.path(step).name)
        link.replace(self.folder / BEST)

    def _prune(self) -> None:
        best = self.best()
        for step in self.steps()[: -self.keep]:
            if self.path(step).resolve() != best:
                discard(self.path(step))
