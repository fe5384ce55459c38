"""Supervising a run from within its job's batch script: ``hpctrain job``.

It starts the launcher and passes its output on; forwards the signal by which Slurm announces the
time limit; accepts only the run's ``result.json`` as proof of success; requeues the job if the run
was interrupted; and otherwise reports the root cause of the failure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Literal, TypeVar

from hpctrain.elastic import selftest
from hpctrain.elastic.preload import library
from hpctrain.errors import Error
from hpctrain.files import write_text
from hpctrain.process import search_path
from hpctrain.run_folder import INTERRUPTED, INTERRUPTED_CODE, RESULT, STOP
from hpctrain.slurm import commands, hosts, owner, probe, requeue
from hpctrain.slurm.diagnosis import root_cause
from hpctrain.slurm.orphan import SUPERVISOR, watched
from hpctrain.world.failure_record import FOLDER, Failure, read_notes

FAILURE, SUBMISSION = "failure.json", "submission.json"
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM)
LOOK_SECONDS = 0.1
NOTES_SECONDS = 1.0
HICCUP_SECONDS = 60.0
"""How long a file system may fail before its error is raised."""

TAIL_BYTES = 2**16
GRACE_SECONDS = 15.0
"""How long the launcher may take to end the other ranks when one has failed."""

EXPIRED_SECONDS = 60.0
"""How long srun may be too late with its credentials: a node may be busy, or its clock be wrong."""

KILL_SECONDS = 5.0
ENDING_SECONDS = 10.0
MODE = "HPCTRAIN__ELASTIC__MODE"
OUTLIVING = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"]
"""Options by which srun lets a step continue without the processes and nodes it loses."""

Engine = Literal["ulfm", "gloo", "restart"]
GROWING = {
    "ulfm": "a node that comes back takes part when the job is started again",
    "gloo": "lost ranks are started again on the nodes that are left",
    "restart": "at a loss the run is started again from its last checkpoint",
}

LOSSES = ("node lost", "rank lost", "SIGKILL", "exit code", "srun")
"""Kinds of failure that the loss of a node may appear as."""

T = TypeVar("T")


def steadily(what: Callable[[], T]) -> T:
    """Call a function, again and again while a shared file system fails, and return its result.

    Raises:
        OSError: The function has failed for longer than ``HICCUP_SECONDS``.
    """
    deadline = time.monotonic() + HICCUP_SECONDS
    while True:
        try:
            return what()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(NOTES_SECONDS)


class Job:
    """The supervisor of a run within its Slurm job.

    Args:
        command: The launcher's command line, with the ranks' command.
        run: The run folder.
        max_requeues: How often the job may be put back into the queue.
        relaunches: How often the run may be restarted within this job, on the nodes left.
        elastic: Whether ranks should outlive the loss of others in the same processes, if possible.
        told_by: A further signal that announces the time limit, such as ``INT``.
        watch: Called about once a second while the launcher runs.
        home: The folder that the batch script takes for its run, if not the run folder itself.

    Raises:
        Elsewhere: The run continues as another job.
        Error: This is no Slurm job, the folder cannot be made, or it belongs to another job.
    """

    def __init__(
        self,
        command: list[str],
        run: Path,
        *,
        max_requeues: int,
        relaunches: int,
        elastic: bool = False,
        told_by: str = "USR1",
        watch: Callable[[], None] = lambda: None,
        home: Path | None = None,
    ) -> None:
        self.number = commands.this_job()
        self._command = command
        self._run = run
        self._notes = run / "ranks"
        self._max_requeues = max_requeues
        self._relaunches = relaunches
        self._nodes = hosts.nodes()
        self._told: signal.Signals | None = None
        self._relaunched = False
        self._elastic = elastic
        self._engine: Engine = "restart"
        self._tail = bytearray()
        self._signals = {*SIGNALS, catchable(told_by)}
        self._watch = watch
        self._home = home or run
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Error(
                f"cannot make {run}: {error.strerror}.", hint="choose another --run."
            ) from error
        self._restarts = int(os.environ.get("SLURM_RESTART_COUNT") or "0")
        continues = os.environ.get(requeue.CONTINUES)
        if continues is not None and continues == self.number:
            continues = None
        self._again = owner.claim(run, self.number, self._restarts, continues).again

    def supervise(self) -> int:
        """Run the launcher to the end of the run, and return the exit code for the scheduler."""
        if self._again and _there(self._run / RESULT):
            self._say("the run is completed")  # by ranks that outlived the node of this script
            return 0
        before = {number: signal.signal(number, self._hear) for number in self._signals}
        try:
            if self._elastic:
                self._engine = self._choose()
            with self._watched():
                return self._go_on()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        """Watch this host from another node, unless ranks outlive it and end the job themselves."""
        if self._elastic and self._engine != "ulfm" and len(self._nodes) > 1:
            return watched([node.name for node in self._nodes[:0:-1]])
        return contextlib.nullcontext()

    def _go_on(self) -> int:
        refused_since: float | None = None
        while True:
            returncode = self._launch()
            if _there(self._run / RESULT):
                if returncode != 0:
                    self._say(f"the run is completed, though its launcher ended with {returncode}")
                return 0
            if _there(self._run / INTERRUPTED):
                return self._interrupted()
            failure = self._why(returncode)
            if failure.what == "srun" and (patience := _patience(failure.message)):
                refused_since = refused_since or time.monotonic()
                if time.monotonic() - refused_since < patience:
                    self._say(f"{str(failure).partition('. HINT')[0]}; asking again")
                    time.sleep(requeue.PAUSE_SECONDS)
                    continue
            try:
                present = self._present(failure)
            except probe.Doubt as doubt:
                if failure.what not in ("srun", "exit code"):
                    self._say(f"srun starts nothing here: {doubt}")
                elif failure.what == "exit code":
                    failure = replace(failure, what="srun", message=str(doubt))
                return self._fail(failure)
            if self._relaunch(failure, present):
                continue
            if present != self._nodes and self._told is None:
                return self._requeue(f"{failure}; {_without(self._nodes, present)} lost")
            return self._fail(failure)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._told is None or number == signal.SIGTERM:
            self._told = signal.Signals(number)
        with contextlib.suppress(OSError):
            (self._run / STOP).touch()

    # The launch.

    def _choose(self) -> Engine:
        """Choose how ranks are to outlive the loss of others in this job."""
        launcher = self._launcher()
        ranks = sum(node.tasks for node in self._nodes)
        chosen = os.environ.get(MODE, "auto")
        if not launcher or Path(launcher[0]).name != "srun" or ranks < 2:
            return "restart"
        engine: Engine = "restart"
        seen = "as asked for"
        if chosen in ("auto", "ulfm"):
            outlives, seen = self._try(launcher)
            engine = "ulfm" if outlives else "restart"
        if chosen == "gloo" or (chosen == "auto" and engine == "restart" and not _has_gpus()):
            engine = "gloo"
        self._say(f"elastic: {engine}: {seen}; {GROWING[engine]}")
        return engine

    def _launcher(self) -> list[str]:
        return list(itertools.takewhile(lambda word: word != "hpctrain", self._command))

    def _try(self, launcher: list[str]) -> tuple[bool, str]:
        """Try MPI's fault tolerance by a small launch; whether it works, and what was seen."""
        launcher = [*launcher, *OUTLIVING, f"--nodes={min(2, len(self._nodes))}", "--ntasks=2"]
        try:
            return selftest.works(launcher, {**self._environment(), **_preload()})
        except Error as error:
            return False, str(error)

    def _words(self) -> list[str]:
        """Return the command that starts the ranks, with the engine's options."""
        if self._engine == "ulfm":
            return self._command[:1] + OUTLIVING + self._command[1:]
        if self._engine == "gloo":
            return ["hpctrain", "launch", "--", *self._command[len(self._launcher()) :]]
        return self._command

    def _launch(self) -> int:
        steadily(self._clear)
        self._tail.clear()
        try:
            process = subprocess.Popen(
                self._words(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise Error(
                f"cannot start {self._command[0]}: {error.strerror}.",
                hint="load the module that brings it; see `hpctrain doctor`.",
            ) from error
        reader = threading.Thread(target=self._pass_on, args=(process,), daemon=True)
        reader.start()
        try:
            self._wait(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        reader.join(KILL_SECONDS)
        return process.returncode

    def _clear(self) -> None:
        """Remove the files that an earlier start of the run has left."""
        shutil.rmtree(self._notes, ignore_errors=True)
        self._notes.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, INTERRUPTED, FAILURE):
            (self._run / name).unlink(missing_ok=True)
        if self._told is None:
            (self._run / STOP).unlink(missing_ok=True)

    def _pass_on(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while block := os.read(process.stdout.fileno(), 2**16):
            with contextlib.suppress(OSError):  # the log's disk is full
                os.write(sys.stdout.fileno(), block)
            self._tail += block
            del self._tail[:-TAIL_BYTES]

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the launcher; end it if it still runs a while after the run is over."""
        ended = False
        looked = 0.0
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            if time.monotonic() - looked < NOTES_SECONDS:
                continue
            looked = time.monotonic()
            with contextlib.suppress(OSError):
                self._watch()
            if self._told is not None:
                with contextlib.suppress(OSError):
                    (self._run / STOP).touch()  # it may have failed when the signal came
            over = [] if ended else self._over()
            if over and time.time() - over[0] > GRACE_SECONDS:
                self._say("the run is over, and its launcher does not end; ending it")
                ended = True
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(KILL_SECONDS)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _over(self) -> list[float]:
        """Return the times at which the run failed or completed, as far as they can be read."""
        found: list[float] = []
        with contextlib.suppress(OSError):
            found += [each.time for each in read_notes(self._notes) if not each.consequence]
        with contextlib.suppress(OSError):
            found.append((self._run / RESULT).stat().st_mtime)
        return sorted(found)

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PATH": search_path(), FOLDER: str(self._notes.resolve())}
        names = [node.name for node in self._nodes]
        counts = [str(node.tasks) for node in self._nodes]
        ranks = str(sum(node.tasks for node in self._nodes))
        # As they are now: a node may be lost.
        for name, value in {
            "SLURM_JOB_NODELIST": ",".join(names),
            "SLURM_NODELIST": ",".join(names),
            "SLURM_JOB_NUM_NODES": str(len(names)),
            "SLURM_NNODES": str(len(names)),
            "SLURM_NTASKS": ranks,
            "SLURM_NPROCS": ranks,
            "SLURM_TASKS_PER_NODE": ",".join(counts),
            "HPCTRAIN__WORLD_SIZE": ranks,
        }.items():
            environment[name] = value
        environment[SUPERVISOR] = os.uname().nodename
        if self._elastic:
            environment.setdefault(MODE, "auto")
        if self._engine == "ulfm":
            environment |= _preload()
        else:
            environment.setdefault("SLURM_KILL_BAD_EXIT", "1")
        if self._relaunched:  # a step that has lost a node keeps the others' cores for a while
            environment["SLURM_OVERLAP"] = "1"
        defaults = {"PMIX_MCA_psec": "native"}  # what PMIx and Open MPI of any make have in common
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            defaults["OMP_NUM_THREADS"] = cores
            defaults["SRUN_CPUS_PER_TASK"] = cores  # srun does not go by the other, since 22.05
        mine = os.environ.get("SLURMD_NODENAME")
        wire = os.environ.get("HPCTRAIN_INTERFACE")
        if wire is None and len(names) > 1:
            wire = hosts.interface([name for name in names if name != mine])
        if wire is not None:
            defaults |= dict.fromkeys(
                ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE"), wire
            )
        return {**defaults, **environment}

    def _say(self, text: str) -> None:
        """Write a line to the log, even where the launcher's last one is incomplete."""
        start = "" if not self._tail or self._tail.endswith(b"\n") else "\n"
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), f"{start}hpctrain job: {text}\n".encode())
        self._tail.clear()

    # The end.

    def _why(self, returncode: int) -> Failure:
        output = self._tail.decode(errors="replace")
        launcher = Path(self._command[0]).name
        if self._told is signal.SIGTERM:
            return Failure("SIGTERM", "Slurm ended the job: cancelled, preempted, or out of time",
                           None, os.uname().nodename, 143)  # fmt: skip
        return root_cause(self._notes, output, returncode, launcher)

    def _fail(self, failure: Failure) -> int:
        code = failure.exit_code or 1
        with contextlib.suppress(OSError):
            write_text(self._run / FAILURE, json.dumps(asdict(failure), indent=2) + "\n")
        self._say(f"failed: {failure}")
        return code

    def _interrupted(self) -> int:
        progress = _progress(self._run)
        if self._told is None:
            self._say(f"{progress}, by nobody's signal; not started again")
            return INTERRUPTED_CODE
        if self._told is signal.SIGTERM:
            if self._ends():
                self._say(progress)
                return self._fail(self._why(0))
            self._told = None  # the next one will be
        return self._requeue(progress)

    def _ends(self) -> bool:
        """Return whether Slurm is ending this job, as opposed to a stray SIGTERM."""
        deadline = time.monotonic() + ENDING_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(commands.Unanswered):
                return not requeue.runs(self.number, self._restarts)
            time.sleep(LOOK_SECONDS)
        return True

    def _requeue(self, why: str) -> int:
        if self._again >= self._max_requeues:
            self._say(f"{why}; not started again: it has been, {self._again} times")
            return INTERRUPTED_CODE
        self._say(f"{why}; to be started again, for the {self._again + 1}. time")

        def ended() -> bool:
            return self._told is signal.SIGTERM

        try:
            refusal = requeue.requeue(self.number, self._restarts, ended)
            if refusal is not None:
                self._say(f"{refusal.message} Submitting a job of its own instead")
                number = requeue.chain(self.number, self._run, self._home, ended)
                if number is not None:
                    self._say(f"goes on as job {number}")
        except (Error, OSError) as error:
            return self._fail(Failure("requeue", str(error), None, None, 1, False, time.time()))
        return INTERRUPTED_CODE

    def _present(self, failure: Failure) -> list[hosts.Node]:
        """Return the nodes that are left after a failure that the loss of one may have caused.

        Raises:
            Doubt: srun does not work on any node, so it cannot be determined.
        """
        if self._told is not None or not (failure.consequence or failure.what in LOSSES):
            return self._nodes
        return probe.present(self._nodes)

    def _relaunch(self, failure: Failure, present: list[hosts.Node]) -> bool:
        """Prepare to restart the run within this job, on the nodes that are left.

        Args:
            failure: Why the last launch ended.
            present: The nodes that are left.

        Returns:
            False if the run cannot be restarted here.
        """
        lost = present != self._nodes or failure.consequence or failure.what in LOSSES
        if failure.what == "srun" and present == self._nodes:
            return False  # it would say the same again
        if self._relaunches == 0 or self._told is not None or not present or not lost:
            return False
        self._relaunches -= 1
        self._relaunched = True
        gone = _without(self._nodes, present)
        names = ", ".join(node.name for node in present)
        self._say(f"{failure}; going on with {names}" + (f", without {gone}" if gone else ""))
        self._nodes = present
        return True


def _patience(words: str) -> float:
    """Return for how many seconds to try again what srun has refused to start, by its output."""
    if commands.not_started(words):
        return requeue.SILENCE_SECONDS
    return EXPIRED_SECONDS if commands.expired(words) else 0.0


def _preload() -> dict[str, str]:
    """Return the environment that keeps Slurm from cancelling a step when a rank is lost."""
    before = os.environ.get("LD_PRELOAD", "")
    return {
        "LD_PRELOAD": f"{library()} {before}".strip(),
    }


def _has_gpus() -> bool:
    """Return whether this job has GPUs, on which the Gloo engine has not been tried."""
    return any(os.environ.get(name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"))


def _without(nodes: list[hosts.Node], present: list[hosts.Node]) -> str:
    return ", ".join(node.name for node in nodes if node not in present)


def _there(path: Path) -> bool:
    """Return whether a file exists, by listing its folder: NFS caches attributes for longer."""

    def look() -> bool:
        try:
            return path.name in os.listdir(path.parent)  # noqa: PTH208
        except FileNotFoundError:
            return False

    return steadily(look)


def _progress(run: Path) -> str:
    try:
        where = json.loads(steadily((run / INTERRUPTED).read_text))
        return f"interrupted at step {where['step']} of {where['steps']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "interrupted"


def catchable(name: str) -> signal.Signals:
    """Return the signal of this name if a process can catch it.

    Raises:
        Error: There is no signal of this name, or it cannot be caught.
    """
    short = name.upper().removeprefix("SIG")
    if short in ("KILL", "STOP"):
        raise Error(f"signal {short} ends a process before it can save anything.",
                    hint="USR1 is usual; USR2, HUP, INT and TERM will do.")  # fmt: skip
    try:
        return signal.Signals[f"SIG{short}"]
    except KeyError:
        raise Error(f"there is no signal {name}.", hint="USR1 is usual.") from None
