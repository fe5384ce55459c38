"""The order in which pushes were applied: recorded, and replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpctrain.errors import Error
from hpctrain.ps.layout import Layout

Entry = tuple[int, int, int, int]
"""Version, worker, clock, and version of the weights the worker had read."""


class OrderLog:
    """One server's part of a record, and all of the record to be replayed.

    A record is a folder with a file a server. Workers are noted by their place among the workers,
    so that it can be replayed whatever their ranks.

    Args:
        record: Folder to write to, or None.
        replay: Folder to replay, or None.
        server: Number of this server.

    Attributes:
        divisions: Shares of samples in each round of an epoch, as replayed.

    Raises:
        Error: There is no record to replay.
    """

    def __init__(self, record: Path | None, replay: Path | None, server: int) -> None:
        self._record = record
        self._server = server
        self._replay: dict[int, list[Entry]] | None = None
        self.divisions: dict[tuple[int, int], list[int]] = {}
        self._decided: list[tuple[int, int, list[int]]] = []
        self._digest = ""
        self._workers: list[int] = []
        if replay is not None:
            self._read(replay)

    def open(self, layout: Layout, workers: Sequence[int]) -> None:
        """Say what is recorded, or to be replayed.

        Raises:
            Error: The record is of other parameters or of another number of workers.
        """
        self._workers = list(workers)
        if self._replay is not None and (
            self._digest != layout.digest or self._count != len(workers)
        ):
            raise Error(
                f"the recorded run had {self._count} workers, and other slices than this run "
                f"with {len(workers)}.",
                hint="replay with the model, ps.slice_bytes and number of workers of the record.",
            )
        self._digest = layout.digest

    def recorded(self, index: int) -> list[Entry] | None:
        """What is to be replayed of a slice; None: nothing, the slice is free."""
        if self._replay is None:
            return None
        entries = self._replay.get(index, [])
        return [(version, self._workers[w], clock, read) for version, w, clock, read in entries]

    def decided(self, epoch: int, round_: int, workers: list[int], shares: list[int]) -> None:
        """Note how samples are divided."""
        self._decided.append((epoch, round_, shares))

    def write(self, logs: Mapping[int, Sequence[Entry]]) -> None:
        """Write this server's part.

        Raises:
            Error: The folder cannot be written.
        """
        if self._record is None:
            return
        place = {worker: number for number, worker in enumerate(self._workers)}
        tensors = {
            str(index): torch.tensor(
                [(version, place[w], clock, read) for version, w, clock, read in log],
                dtype=torch.int32,
            ).reshape(-1, 4)
            for index, log in logs.items()
        }
        about = {
            "digest": self._digest,
            "workers": str(len(self._workers)),
            "divisions": json.dumps(self._decided),
        }
        try:
            self._record.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self._record / f"server-{self._server}.safetensors", about)
        except (OSError, SafetensorError) as error:
            raise Error(
                f"cannot write the order of pushes to {self._record}: {error}.",
                hint="make room, or choose another folder.",
            ) from error

    def _read(self, folder: Path) -> None:
        self._replay = {}
        try:
            paths = sorted(folder.glob("server-*.safetensors"))
            for path in paths:
                with safe_open(path, "pt") as file:
                    about = file.metadata()
                    self._digest, self._count = about["digest"], int(about["workers"])
                    for epoch, round_, shares in json.loads(about["divisions"]):
                        self.divisions[epoch, round_] = shares
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        rows = file.get_tensor(name).tolist()
                        self._replay[int(name)] = [tuple(row) for row in rows]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise Error(
                f"{folder} is not a record of the order of pushes: {error}.",
                hint="name the folder that --record-order wrote.",
            ) from error
        if not paths:
            raise Error(
                f"there is no record of the order of pushes in {folder}.",
                hint="name the folder that --record-order wrote.",
            )
