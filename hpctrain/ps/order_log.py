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


_ABOUT = {"digest", "slice_bytes", "workers", "divisions", "asked", "snapshots"}


class OrderLog:
    """One server's part of a record, and all of the record to be replayed.

    A record is a folder with a file a server. Workers are noted by their place among the workers,
    so that it can be replayed whatever their ranks.

    Args:
        record: Folder to write to, or None.
        replay: Folder to replay, or None.
        server: Number of this server.
        workers: Numbers of the workers.

    Attributes:
        divisions: Shares of samples in each round of an epoch, as replayed.
        snapshots: By number, of each slice the version to be held; None: nothing is replayed.
        asked_at: By number of the snapshot: which worker asked, at which clock.

    Raises:
        Error: There is no record to replay, or it is of another number of workers.
    """

    def __init__(
        self, record: Path | None, replay: Path | None, server: int, workers: Sequence[int]
    ) -> None:
        self._record = record
        self._server = server
        self._workers = list(workers)
        self._replay: dict[int, list[Entry]] | None = None
        self.divisions: dict[tuple[int, int], list[int]] = {}
        self.snapshots: dict[int, dict[int, int]] | None = None
        self.asked_at: dict[int, tuple[int, int]] = {}
        self._decided: list[tuple[int, int, list[int]]] = []
        self._asked: list[tuple[int, int, int]] = []
        self._digest, self._slice_bytes = "", 0
        if replay is not None:
            self._load(replay)

    def open(self, layout: Layout) -> None:
        """Say what is recorded, or to be replayed.

        Raises:
            Error: The record is of other parameters.
        """
        if self._replay is not None and self._digest != layout.digest:
            raise Error(
                "the recorded run had other parameters than this one.",
                hint="replay with the task, options and optimizer of the recorded run.",
            )
        self._digest, self._slice_bytes = layout.digest, layout.slice_bytes

    def recorded(self, index: int) -> list[Entry] | None:
        """What is to be replayed of a slice; None: nothing, the slice is free."""
        if self._replay is None:
            return None
        entries = self._replay.get(index, [])
        return [(version, self._workers[w], clock, read) for version, w, clock, read in entries]

    def decided(self, epoch: int, round_: int, workers: list[int], shares: list[int]) -> None:
        """Note how samples are divided."""
        self._decided.append((epoch, round_, shares))

    def asked(self, number: int, worker: int, clock: int) -> None:
        """Note at which clock a worker asked for a snapshot."""
        self._asked.append((number, self._workers.index(worker), clock))

    def write(
        self, logs: Mapping[int, Sequence[Entry]], snapshots: Mapping[int, Mapping[int, int]]
    ) -> None:
        """Write this server's part.

        Args:
            logs: Of each slice.
            snapshots: By number: of each slice, the version that it holds.

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
        taken = [(n, i, v) for n, versions in snapshots.items() for i, v in versions.items()]
        about = {
            "digest": self._digest,
            "slice_bytes": str(self._slice_bytes),
            "workers": str(len(self._workers)),
            "divisions": json.dumps(self._decided),
            "asked": json.dumps(self._asked),
            "snapshots": json.dumps(taken),
        }
        try:
            self._record.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self._record / f"server-{self._server}.safetensors", about)
        except (OSError, SafetensorError) as error:
            raise Error(
                f"cannot write the order of pushes to {self._record}: {error}.",
                hint="make room, or choose another folder.",
            ) from error

    def _load(self, folder: Path) -> None:
        self._replay, self.snapshots = {}, {}
        for about, logs in _read(folder):
            if int(about["workers"]) != len(self._workers):
                raise Error(
                    f"the recorded run had {about['workers']} workers, this one has "
                    f"{len(self._workers)}.",
                    hint="start as many; the number of servers is free.",
                )
            self._digest = about["digest"]
            for epoch, round_, shares in json.loads(about["divisions"]):
                self.divisions[epoch, round_] = shares
            for number, worker, clock in json.loads(about["asked"]):
                self.asked_at[number] = (self._workers[worker], clock)
            for number, index, version in json.loads(about["snapshots"]):
                self.snapshots.setdefault(number, {})[index] = version
            for index, rows in logs.items():
                self._replay[index] = [tuple(row) for row in rows.tolist()]


def recorded_slice_bytes(folder: Path) -> int:
    """How the recorded run cut its parameters.

    Raises:
        Error: There is no record.
    """
    return int(_read(folder)[0][0]["slice_bytes"])


def _read(folder: Path) -> list[tuple[dict[str, str], dict[int, torch.Tensor]]]:
    found = []
    try:
        for path in sorted(folder.glob("server-*.safetensors")):
            with safe_open(path, "pt") as file:
                logs = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = file.metadata()
                if about is None or set(about) != _ABOUT:
                    raise ValueError(f"{path.name} is another kind of file")
                found.append((about, logs))
    except (OSError, SafetensorError, ValueError) as error:
        raise Error(
            f"{folder} is not a record of the order of pushes: {error}.",
            hint="name the folder that --record-order wrote.",
        ) from error
    if not found:
        raise Error(
            f"there is no record of the order of pushes in {folder}.",
            hint="name the folder that --record-order wrote.",
        )
    return found
