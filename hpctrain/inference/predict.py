"""Predict: write what a trained model gives for each sample of a split to an HDF5 file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import torch

from hpctrain.errors import Error
from hpctrain.files import sync
from hpctrain.inference.passes import Passes
from hpctrain.tasks.task import Task
from hpctrain.train.set_metrics import Rows, gather_parts, joined, predicted


def predict(passes: Passes, out: Path) -> None:
    """Write what ``predictions()`` gives: a dataset for each name, a row for each sample, in order.

    Rank 0 writes, round by round; the file is there when it is whole. Its bytes are the same on any
    number of ranks.

    Args:
        passes: Over the samples.
        out: The file; replaced if it exists.

    Raises:
        Error: ``predictions()`` gives what it must not, or the file cannot be written.
        PeerLost: Another rank is gone.
    """
    task, device, comm = passes.task, passes.world.device, passes.world.comm
    file = _Predictions(out, task, len(passes.samples)) if passes.world.rank == 0 else None
    try:
        for batch in passes.rounds():
            mine = []
            if batch is not None:
                mine = [predicted(task, passes.model, batch, device, passes.dtype)]
            for rows in gather_parts(comm, task, mine):
                if file is not None:
                    file.add(rows)
        if file is not None:
            file.finish()
    finally:
        if file is not None:
            file.close()


class _Predictions:
    """An HDF5 file with a row for each sample, under another name until it is whole."""

    def __init__(self, path: Path, task: Task, samples: int) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        self._task = task
        self._samples = samples
        self._written = 0
        self._like: Rows = {}
        try:
            self._file = h5py.File(self._part, "w")
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, rows: Rows) -> None:
        """Write the rows of the samples that follow."""
        if not self._like:
            self._like = {name: tensor[:0] for name, tensor in rows.items()}
        joined(self._task, [self._like, rows])
        stop = self._written + len(next(iter(rows.values())))
        try:
            for name, tensor in rows.items():
                self._dataset(name, tensor)[self._written : stop] = _array(tensor)
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error
        self._written = stop

    def _dataset(self, name: str, tensor: torch.Tensor) -> Any:
        if name in self._file:
            return self._file[name]
        shape = (self._samples, *tensor.shape[1:])
        return self._file.create_dataset(name, shape, _array(tensor[:0]).dtype)

    def finish(self) -> None:
        """Give the file its name."""
        try:
            self._file.close()
            sync(self._part)
            self._part.replace(self._path)
            sync(self._path.parent)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Leave nothing behind that is not whole."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def _unwritable(self, error: Exception) -> Error:
        return Error(f"cannot write {self._path}: {error}.", hint="check the folder, and its room.")


def _array(tensor: torch.Tensor) -> Any:
    """Return a tensor as an array that HDF5 has a type for: it knows no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
