"""Checkpoints: atomic, verified, written while training goes on.

A checkpoint is a folder ``step-NNNNNNNN`` with the tensors (safetensors) and the rest (JSON), which
also holds both files' SHA-256. It is written under another name and renamed, so whatever happens at
whatever instant, each folder of that name is whole, and older ones are untouched until it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from hpctrain.checkpoint import state_tree
from hpctrain.errors import Error
from hpctrain.files import open_regular, read_json, sha256, sync

TENSORS = "tensors.safetensors"
REST = "state.json"
BEST = "best"
FORMAT = "hpctrain-checkpoint"
VERSION = 2
READABLE = (1, 2)
"""Version 1 did not keep the versions of a module's layers, nor tuples as such."""


def save(folder: Path, state: Any) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        folder: Where; replaced if it exists.
        state: A tree of tensors and plain values.

    Raises:
        OSError: It could not be written; nothing that was there is lost.
    """
    tensors, rest = state_tree.split(state)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary / TENSORS)
        head = {
            "format": FORMAT,
            "version": VERSION,
            "tensors_sha256": sha256(temporary / TENSORS),
            "state": rest,
        }
        with (temporary / REST).open("w", encoding="utf-8") as file:
            json.dump({**head, "sha256": _digest(head)}, file)
        for path in (temporary / TENSORS, temporary / REST, temporary):
            sync(path)
        if folder.exists():
            discard(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except SafetensorError as error:  # the library's wrapper around what the disk said
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_verified(folder: Path) -> Any:
    """Read a checkpoint and check that every byte is what was written.

    Raises:
        Error: It is missing, incomplete or damaged; the file at fault is named.
    """
    try:
        head = read_json(folder / REST)
        expected = head.pop("sha256")
        if head["format"] != FORMAT or _digest(head) != expected:
            raise Error(f"checkpoint {folder / REST} is damaged: its checksum differs.")
        if head["version"] not in READABLE:
            raise Error(
                f"checkpoint {folder} is of version {head['version']}, not {VERSION}.",
                hint="use the hpctrain that wrote it.",
            )
        with open_regular(folder / TENSORS) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != head["tensors_sha256"]:
            raise Error(f"checkpoint {folder / TENSORS} is damaged: its checksum differs.")
        return state_tree.join(load(data), head["state"])
    except OSError as error:
        raise Error(
            f"checkpoint {error.filename or folder} cannot be read: {error.strerror}."
        ) from error
    except Error:
        raise
    except Exception as error:  # whatever it makes its readers say
        raise Error(f"checkpoint {folder} is damaged: {type(error).__name__}: {error}.") from error


def discard(folder: Path) -> None:
    """Remove a checkpoint: out of sight in one step, then in pieces."""
    doomed = folder.with_name(f".{folder.name}.discarded.{os.getpid()}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class CheckpointStore:
    """The checkpoints of one run: the newest few and the best. One process writes them.

    Args:
        folder: Holds ``step-NNNNNNNN`` folders and the link ``best``.
        keep: How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saved_step = -1

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending."""
        names = [path.name for path in self.folder.glob("step-*")] if self.folder.is_dir() else []
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: Any, *, best: bool = False) -> None:
        """Copy a state now and write it in the background, after the one before is written.

        Args:
            step: Names the checkpoint; one that is there already is only marked best.
            state: A tree; its tensors may change once this returns.
            best: Keep it until a better one comes.

        Raises:
            Error: The checkpoint before this one could not be written.
        """
        self.wait()
        copy = state_tree.join(*_copied(state)) if step != self._saved_step else None
        self._saved_step = step

        def write() -> None:
            try:
                if copy is not None:
                    save(self.path(step), copy)
                if best:
                    self._mark_best(step)
                self._prune()
            except BaseException as error:  # handed to the thread that waits
                self._failure = error

        self._writer = threading.Thread(target=write, name="hpctrain-checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Return when the last checkpoint is on disk.

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

    def newest(self, complain: Callable[[str], None]) -> Any | None:
        """The newest checkpoint that is good, or None where there are none at all.

        Args:
            complain: Told of each one that is passed over.

        Raises:
            Error: There are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return load_verified(self.path(step))
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
        """The best checkpoint's folder, or None."""
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


def _copied(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    tensors, rest = state_tree.split(state)
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }, rest


def _digest(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
