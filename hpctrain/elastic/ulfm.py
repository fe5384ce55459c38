"""Membership by MPI's fault tolerance (ULFM), as Open MPI 5 has it: the world is shrunk in place.

Bland, Bouteiller, Herault, Bosilca and Dongarra, "Post-failure recovery of MPI communication
capability", IJHPCA 2013. Under ``mpirun --with-ft ulfm`` it outlives the loss of processes; under
``srun --mpi=pmix --no-kill`` also that of hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from mpi4py import MPI

from hpctrain import process
from hpctrain.elastic.membership import MEET_SECONDS, Meeting, Member, Progress
from hpctrain.elastic.newcomers import Recruiter, admit, ask_to_join, join
from hpctrain.errors import PeerLost
from hpctrain.process import ended_after
from hpctrain.world import pmix
from hpctrain.world.process_reaper import ProcessReaper, identity

CARD_BYTES = 512


class Ulfm:
    """Membership by ULFM. MPI must have been started, with ``choose.set_parameters``.

    Args:
        hang_seconds: Silence after which a process is lost.

    Attributes:
        comm: The communicator of who takes part.
        welcome: What a process that joins a run under way was told; None: it began with the run.
        folder: Where parts of a network that fell apart claim to be the one that goes on. All hosts
            see it; None: not known yet.
    """

    name = "ulfm"

    def __init__(self, hang_seconds: float) -> None:
        self.generation = 0
        self.members: list[Member] = []
        self.lost_hosts: set[str] = set()
        self.folder: Path | None = None
        self._hang_seconds = hang_seconds
        self._fence = ProcessReaper({})
        self._recruits: Recruiter | None = None
        self._next = 0  # what nobody was called yet
        self.comm = self._mine(self._mine(MPI.COMM_WORLD).Dup())
        self.welcome = ask_to_join()
        self._outside = self.welcome is not None
        self.number = self.comm.rank if self.welcome is None else self.welcome.number
        if not self._outside:
            self._introduce(Progress(0, -1, -1))

    def connect(self, begin: Callable[[], None]) -> None:
        """Start Horovod on the first world."""
        begin()

    def begin(self, out: Path, wanted: int | None) -> None:
        """Take note that training begins, and of how many ranks there are to be.

        Args:
            out: The run folder.
            wanted: How many ranks to have: new ones are started where there are fewer.
        """
        self.folder = out
        if wanted is not None and self._recruits is None:
            self._recruits = Recruiter(wanted, str(out.resolve()))

    def waiting(self) -> bool:
        """Whether somebody wants to join, as far as this rank knows; it starts who is missing."""
        if self._recruits is None or self.comm.rank != 0:
            return False
        self._recruits.look(self.comm.size, self._next)
        return self._recruits.ready()

    def watch(self) -> None:
        """End processes of this host that are seen to be stopped; to be called while waiting."""
        self._fence.cut_off_stopped(self._hang_seconds)

    def leave(self) -> None:
        """End this rank's part in good order."""
        if self._recruits is not None:
            self._recruits.close()
        if self.generation > 0:
            pmix.leave()

    def abort(self, code: int) -> None:
        """End all ranks, with that exit code: this one has failed."""
        self.comm.Abort(code)

    @staticmethod
    def _mine(comm: MPI.Intracomm) -> MPI.Intracomm:
        """Have a communicator give errors back, instead of ending the job."""
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        return comm

    def meet(self, progress: Progress, begin: Callable[[], None]) -> Meeting:
        """Form a new world of those that are alive, and of those that want to join.

        Args:
            progress: How far this rank has come.
            begin: Starts Horovod on the new world.
        """
        before = self.members
        newcomer = join() if self._outside else None
        late = PeerLost(
            f"rank {self.number} on {os.uname().nodename} could not meet the others within "
            f"{MEET_SECONDS:.0f} s after a loss.",
            hint="they have gone on without it, or --resume auto goes on from the last checkpoint.",
        )
        with ended_after(MEET_SECONDS, late):
            while True:
                try:
                    cards = self._form(progress, before, newcomer)
                    break
                except MPI.Exception:  # another loss meanwhile
                    continue
        lost = [member for member in before if member not in self.members]
        self.lost_hosts |= {member.host for member in lost}
        for member in lost:
            self._fence.cut_off(member.number)
        self.generation = 1 + max(card["generation"] for card in cards)
        process.mpi_is_whole = False
        begin()
        return Meeting(
            self.generation,
            [Progress(*card["progress"]) for card in cards],
            lost,
            [member for member in self.members if before and member not in before],
        )

    def _form(
        self, progress: Progress, before: list[Member], joined: MPI.Intracomm | None
    ) -> list[dict[str, Any]]:
        if self._outside:
            assert joined is not None
            self.comm = self._mine(joined)
            self._outside = False
            return self._introduce(progress)
        with contextlib.suppress(MPI.Exception):
            self.comm.Revoke()  # whoever still waits in it comes here
        self.comm = self._mine(cast(MPI.Intracomm, self.comm.Shrink()))
        cards = self._introduce(progress)
        if self._goes_on(before) and cards[0]["ready"]:
            newcomer = self._recruits.take() if self._recruits and self.comm.rank == 0 else None
            taken = None
            with contextlib.suppress(MPI.Exception):
                taken = self._mine(admit(self.comm, newcomer))
            # All members take the new one in, or none does.
            if self.comm.Agree(int(taken is not None)):
                assert taken is not None
                self.comm = taken
                cards = self._introduce(progress)
        return cards

    def _introduce(self, progress: Progress) -> list[dict[str, Any]]:
        """Tell all members who this is, and hear it of them."""
        card = {
            "number": self.number,
            "host": os.uname().nodename[:100],
            "identity": identity(),
            "generation": self.generation,
            "progress": progress,
            "ready": self._recruits is not None and self._recruits.ready(),
        }
        mine = np.zeros(CARD_BYTES, np.uint8)
        text = json.dumps(card).encode()
        mine[: len(text)] = np.frombuffer(text, np.uint8)
        all_ = np.zeros((self.comm.size, CARD_BYTES), np.uint8)
        self.comm.Allgather(mine, all_)
        cards = [json.loads(bytes(row).rstrip(b"\0")) for row in all_]
        self.members = [Member(each["number"], each["host"]) for each in cards]
        self._next = max(self._next, *(member.number + 1 for member in self.members))
        self._fence.know({each["number"]: each["identity"] for each in cards})
        return cards

    def _goes_on(self, before: list[Member]) -> bool:
        """Refuse to go on where other hosts may do so without these: there must not be two worlds.

        Where a host is gone with all of its ranks, it may be alive behind a broken network. Then
        most of the ranks go on; of two halves, the one that is the first to make a file.

        Raises:
            PeerLost: This is the smaller part.
        """
        hosts = {member.host for member in self.members}
        kept = sum(member in self.members for member in before)
        gone = {member.host for member in before} - hosts
        verdict = np.ones(1, np.int64)
        if gone and 2 * kept <= len(before):
            verdict[:] = 2 * kept == len(before) and self.comm.rank == 0 and self._claim()
            self.comm.Bcast(verdict)
        if not verdict[0]:
            raise PeerLost(
                f"rank {self.number} on {os.uname().nodename} is among {kept} of {len(before)} "
                f"ranks that still reach one another, without {', '.join(sorted(gone))}.",
                hint="the others may go on; where not, --resume auto goes on from the last "
                "checkpoint.",
            )
        return True

    def _claim(self) -> bool:
        if self.folder is None:
            return False
        try:
            (self.folder / f"world-{self.generation + 1}").touch(exist_ok=False)
        except OSError:
            return False
        return True
