"""What happened to each slice, in which order: recorded, and replayed.

A slice is what it is by the pushes applied to it, in their order. A worker's gradient is what it is
by the version of each slice that it was last answered with. So these two are recorded, with what
was asked of the coordinator, and a run that repeats them computes the same numbers, whoever holds
which slice. A few digests tell where it does not.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpctrain.errors import Error
from hpctrain.ps.partition.layout import Layout

Entry = tuple[int, int, int, int]
"""A push that was applied: version before, worker, clock, and version the worker had read."""

Answered = tuple[int, int, int]
"""An answer to a push or pull: version of the slice then, worker, and clock of its last push."""

Division = tuple[int, int, list[int]]
"""How samples are divided: epoch, round, and shares of the workers."""

FILES = "server-*.safetensors"
SAME = (
    "replay with the task, data, options, software and number of steps of the recorded run, and "
    "its settings for validation and checkpoints (on a GPU, both with train.deterministic=true)."
)


@dataclass
class SliceLog:
    """What happened to one slice.

    Attributes:
        pushes: Those that were applied.
        answers: To all pushes, applied or not, and pulls.
        copies: By number of the snapshot: the version it holds, and a digest.
        first: Digest of the first update, if there was one.
    """

    pushes: Sequence[Entry] = ()
    answers: list[Answered] = field(default_factory=list)
    copies: dict[int, tuple[int, int]] = field(default_factory=dict)
    first: int | None = None


class About(msgspec.Struct):
    """What a server writes of the run; workers are known by their place among the workers.

    Attributes:
        layout: Digest of the layout.
        slices: How many there are on all servers.
        slice_bytes: Of the layout.
        consistency: How pushes became updates.
        workers: How many.
        whole: Whether no worker or server was lost.
        divisions: All that were decided.
        asked: Of each worker, its clock whenever it wanted a snapshot.
        clocks: Of each worker, its clock at the end.
        threads: Of each worker, the threads it computed with.
    """

    layout: str
    slices: int
    slice_bytes: int
    consistency: str
    workers: int
    whole: bool
    divisions: list[Division]
    asked: list[list[int]]
    clocks: list[int]
    threads: list[int]


class Record:
    """A recorded run: a folder with a file a server.

    Args:
        folder: Where ``--record-order`` wrote it.

    Attributes:
        about: What all files say of it together.

    Raises:
        Error: There is no whole record.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, Any] = {}  # by slice; open, because there may be thousands
        found = []
        for path in sorted(folder.glob(FILES)):
            try:
                file: Any = safe_open(path, "pt")
                found.append(msgspec.json.decode((file.metadata() or {})["about"], type=About))
            except (OSError, SafetensorError, KeyError, msgspec.MsgspecError) as error:
                raise self._unreadable(error) from error
            names = file.keys()
            self._files |= {int(name.partition(".")[0]): file for name in names}
        if not found:
            raise Error(
                f"there is no record of the order of pushes in {folder}.",
                hint="name the folder that --record-order wrote.",
            )
        about = self.about = found[0]
        complete = set(self._files) == set(range(about.slices))
        if not complete or len({(each.layout, each.workers) for each in found}) > 1:
            raise Error(
                f"the record in {folder} is not whole, or of several runs.",
                hint="keep what each server wrote together; record each run in its own folder.",
            )
        for other in found[1:]:
            about.whole &= other.whole
            for mine, theirs in zip(about.asked, other.asked, strict=True):
                mine += theirs  # one server alone was asked
            about.clocks = [*map(max, about.clocks, other.clocks)]

    def check(self, workers: int, consistency: str) -> None:
        """Refuse to replay the record with other workers or another consistency.

        Args:
            workers: How many there are now.
            consistency: As it is configured now.

        Raises:
            Error: They are others, or the recorded run lost a rank.
        """
        about = self.about
        if not about.whole:
            raise Error(
                f"the run recorded in {self._folder} lost a worker or server.",
                hint="only a run that kept all of them can be repeated.",
            )
        if about.workers != workers:
            raise Error(
                f"the recorded run had {about.workers} workers, this one has {workers}.",
                hint="start as many; the number of servers is free.",
            )
        if about.consistency != consistency:
            raise Error(
                f"the recorded run was {about.consistency}, this one is {consistency}.",
                hint=f"replay with --consistency {about.consistency}.",
            )

    def check_layout(self, layout: Layout) -> None:
        """Refuse to replay the record with other parameters.

        Raises:
            Error: They are others.
        """
        if self.about.layout != layout.digest:
            raise Error("the recorded run had other parameters than this one.", hint=SAME)

    def slice(self, index: int, workers: Sequence[int]) -> SliceLog:
        """Return what happened to a slice, with the workers' numbers of now.

        Args:
            index: Which slice.
            workers: Their numbers, in order.

        Raises:
            Error: The record cannot be read.
        """
        file = self._files[index]
        try:
            pushes, answers, copies, first = (
                file.get_tensor(f"{index}.{kind}").tolist() for kind in _KINDS
            )
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        return SliceLog(
            [(version, workers[place], clock, read) for version, place, clock, read in pushes],
            [(version, workers[place], clock) for version, place, clock in answers],
            {number: (version, digest) for number, version, digest in copies},
            first[0] if first else None,
        )

    def _unreadable(self, error: Exception) -> Error:
        return Error(
            f"{self._folder} is not a record of the order of pushes: {error}.",
            hint="name the folder that --record-order wrote.",
        )


_KINDS = ("pushes", "answers", "copies", "first")


class OrderLog:
    """What a server notes for a record, and compares with the one that it replays.

    Args:
        record: Folder to write to, or None.
        replay: Folder to replay, or None.
        server: Number of this server.
        workers: Numbers of the workers.
        consistency: How pushes become updates.

    Attributes:
        keeps: Whether there is to be a record.
        replayed: What is repeated, or None.
        watches: Whether there is either.

    Raises:
        Error: There is no record to replay, or not of such a run.
    """

    def __init__(
        self,
        record: Path | None,
        replay: Path | None,
        server: int,
        workers: Sequence[int],
        consistency: str,
    ) -> None:
        self.keeps = record is not None
        self.replayed = Record(replay) if replay is not None else None
        if self.replayed is not None:
            self.replayed.check(len(workers), consistency)
        self.watches = self.keeps or self.replayed is not None
        self._record = record
        self._server = server
        self._workers = list(workers)
        self._consistency = consistency
        self._layout: Layout | None = None
        self._noted: defaultdict[int, SliceLog] = defaultdict(SliceLog)
        self._recorded: dict[int, SliceLog] = {}
        self._asked: list[list[int]] = [[] for _ in workers]
        self._clocks = [0] * len(workers)
        self._threads = [1] * len(workers)

    def open(self, layout: Layout) -> None:
        """Say of which layout the record is, or is to be.

        Raises:
            Error: The record is of other parameters.
        """
        self._layout = layout
        if self.replayed is not None:
            self.replayed.check_layout(layout)

    def recorded(self, index: int) -> SliceLog | None:
        """Return what is to be replayed of a slice; None: nothing, the slice is free."""
        if self.replayed is None:
            return None
        if index not in self._recorded:
            self._recorded[index] = self.replayed.slice(index, self._workers)
        return self._recorded[index]

    def divisions(self) -> list[Division]:
        """Return how samples are to be divided, as far as that is recorded."""
        return [] if self.replayed is None else self.replayed.about.divisions

    def answered(self, index: int, version: int, worker: int, clock: int) -> None:
        """Note that a worker was answered.

        Args:
            index: Of which slice.
            version: Updates that the slice has had.
            worker: Who was answered.
            clock: Of its last push.
        """
        if self.keeps:
            self._noted[index].answers.append((version, worker, clock))

    def updated(
        self, index: int, numbers: Iterable[float], tensors: Iterable[torch.Tensor]
    ) -> None:
        """Note what a slice's first update is made of, and compare it with the recorded one.

        Args:
            index: Which slice.
            numbers: The update rule's.
            tensors: Weights before the update, and the gradient.

        Raises:
            Error: The recorded update was another one.
        """
        if not self.watches or self._noted[index].first is not None:
            return
        found = self._noted[index].first = _digest(tensors, numbers)
        recorded = self.recorded(index)
        if recorded is not None and recorded.first != found:
            raise Error(
                f"the first update of slice {index} of the parameters is not the recorded one.",
                hint=SAME,
            )

    def copied(
        self, index: int, number: int, version: int, tensors: Iterable[torch.Tensor]
    ) -> None:
        """Note that a slice was copied for a snapshot, and compare it with the recorded one.

        Args:
            index: Which slice.
            number: Of the snapshot.
            version: Updates that the slice has had.
            tensors: Its weights and state.

        Raises:
            Error: The recorded snapshot holds something else.
        """
        if not self.watches:
            return
        found = self._noted[index].copies[number] = (version, _digest(tensors))
        recorded = self.recorded(index)
        if recorded is not None and recorded.copies[number] != found:
            raise Error(
                f"slice {index} of the parameters at version {version} is not what snapshot "
                f"{number} of the recorded run holds.",
                hint=SAME,
            )

    def asked(self, worker: int, clock: int) -> None:
        """Note that a worker wants a snapshot.

        Args:
            worker: Who.
            clock: Its steps until then.

        Raises:
            Error: It did not want one there in the recorded run.
        """
        if not self.watches:
            return
        place = self._workers.index(worker)
        mine = self._asked[place]
        mine.append(clock)
        if self.replayed is None:
            return
        recorded = self.replayed.about.asked[place]
        if mine != recorded[: len(mine)]:
            raise Error(
                f"worker {worker} wants a snapshot after {clock} steps, where it did not in the "
                "recorded run.",
                hint=SAME,
            )

    def rested(self, worker: int, clock: int) -> None:
        """Note that a worker pushes nothing more.

        Args:
            worker: Who.
            clock: Its steps.
        """
        if self.watches:
            place = self._workers.index(worker)
            self._clocks[place] = max(clock, self._clocks[place])

    def left(self, worker: int, threads: int) -> None:
        """Note that a worker is done.

        Args:
            worker: Who.
            threads: With how many it computed.
        """
        if self.watches:
            self._threads[self._workers.index(worker)] = threads

    def write(
        self, pushes: Mapping[int, Sequence[Entry]], divisions: list[Division], *, whole: bool
    ) -> None:
        """Write this server's part of the record.

        Args:
            pushes: By slice, those that were applied.
            divisions: All that were decided.
            whole: Whether no worker or server was lost.

        Raises:
            Error: The folder cannot be written.
        """
        if self._record is None or self._layout is None:
            return
        place = {worker: number for number, worker in enumerate(self._workers)}
        tensors = {}
        for index, applied in pushes.items():
            log = self._noted[index]
            rows: list[list[tuple[int, ...]]] = [
                [(version, place[w], clock, read) for version, w, clock, read in applied],
                [(version, place[w], clock) for version, w, clock in log.answers],
                [(number, *copy) for number, copy in log.copies.items()],
                [(log.first,)] if log.first is not None else [],
            ]
            for kind, some, width in zip(_KINDS, rows, (4, 3, 3, 1), strict=True):
                tensor = torch.tensor(some, dtype=torch.int64).reshape(-1, width)
                tensors[f"{index}.{kind}"] = tensor.view(-1) if width == 1 else tensor
        about = About(
            self._layout.digest, len(self._layout.slices), self._layout.slice_bytes,
            self._consistency, len(self._workers), whole, divisions, self._asked, self._clocks,
            self._threads,
        )  # fmt: skip
        try:
            self._record.mkdir(parents=True, exist_ok=True)
            path = self._record / FILES.replace("*", str(self._server))
            save_file(tensors, path, {"about": msgspec.json.encode(about).decode()})
        except (OSError, SafetensorError) as error:
            raise Error(
                f"cannot write the order of pushes to {self._record}: {error}.",
                hint="make room, or choose another folder.",
            ) from error


def check_unused(folder: Path) -> None:
    """Refuse a folder that already holds a record.

    Raises:
        Error: The folder holds a record.
    """
    if any(folder.glob(FILES)):
        raise Error(
            f"{folder} already holds a record of the order of pushes.",
            hint="choose another --record-order.",
        )


def _digest(tensors: Iterable[torch.Tensor], numbers: Iterable[float] = ()) -> int:
    """Of the bytes, as a number that fits into an int64."""
    digest = hashlib.blake2b(json.dumps(list(numbers)).encode(), digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little", signed=True)
