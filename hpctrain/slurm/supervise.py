"""Looking after a run from within its job's batch script: ``hpctrain job``.

It starts the launcher and passes on what that prints; hands on the signal by which Slurm says that
time is up; proves success by the run's ``result.json``; puts the job back into the queue where the
run was interrupted; and else names the root cause.
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
"""So long a file system may fail before it counts."""

TAIL_BYTES = 2**16
GRACE_SECONDS = 15.0
"""So long the launcher may take to end the other ranks when one has failed."""

KILL_SECONDS = 5.0
ENDING_SECONDS = 10.0
MODE = "HPCTRAIN__ELASTIC__MODE"
OUTLIVING = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"]
"""By which srun lets a step go on without the processes and nodes that it loses."""

Engine = Literal["ulfm", "gloo", "restart"]
GROWING = {
    "ulfm": "a node that comes back takes part when the job is started again",
    "gloo": "lost ranks are started again on the nodes that are left",
    "restart": "at a loss the run is started again from its last checkpoint",
}

LOSSES = ("node lost", "rank lost", "SIGKILL", "exit code", "srun")
"""Failures that the loss of a node may look like."""

T = TypeVar("T")


def steadily(what: Callable[[], T]) -> T:
    """What a function returns, tried again while a shared file system has a hiccup.

    Raises:
        OSError: It lasts for longer than ``HICCUP_SECONDS``.
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
    """One job's run.

    Args:
        command: The launcher with all it starts.
        run: The run folder.
        max_requeues: How often the job may be put back into the queue.
        relaunches: How often the run may be started again within this job, on the nodes left.
        elastic: Whether ranks are to outlive others' loss in the same processes, where they can.
        told_by: One more signal that tells that time is up, such as ``INT``.
        watch: Called now and then while the launcher runs.
        home: The folder that the batch script calls its run, where it is another one.

    Raises:
        Elsewhere: The run went on as another job.
        Error: This is no job, the folder cannot be made, or it is another job's.
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
        """Run to the end; the exit code that tells the scheduler the truth."""
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
        """Ranks that outlive this host end the job themselves; where they do not, a watcher."""
        if self._elastic and self._engine != "ulfm" and len(self._nodes) > 1:
            return watched(self._nodes[-1].name)
        return contextlib.nullcontext()

    def _go_on(self) -> int:
        silent_since: float | None = None
        while True:
            returncode = self._launch()
            if _there(self._run / RESULT):
                if returncode != 0:
                    self._say(f"the run is completed, though its launcher ended with {returncode}")
                return 0
            if _there(self._run / INTERRUPTED):
                return self._interrupted()
            failure = self._why(returncode)
            if failure.what == "srun" and commands.not_started(failure.message):
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since < requeue.SILENCE_SECONDS:
                    self._say("Slurm does not answer; asking again")
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
        """How ranks that srun starts here outlive one another."""
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
        """Whether they do by MPI's fault tolerance: by a small launch."""
        launcher = [*launcher, *OUTLIVING, f"--nodes={min(2, len(self._nodes))}", "--ntasks=2"]
        try:
            return selftest.works(launcher, {**self._environment(), **_preload()})
        except Error as error:
            return False, str(error)

    def _words(self) -> list[str]:
        """The command that starts the ranks."""
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
        """Take away what an earlier start has left."""
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
        """Return when the launcher has ended; it is made to where it hangs on a rank's failure."""
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
        """Since when the launcher should be about to end, as far as the folder can be read."""
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
        """A line of the log, whatever the launcher's last one looked like."""
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
        """Whether SIGTERM was Slurm's, by which it ends a job; or just a signal."""
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
        """The nodes that are left, after a failure that may come from the loss of one.

        Raises:
            Doubt: That cannot be found out.
        """
        if self._told is not None or not (failure.consequence or failure.what in LOSSES):
            return self._nodes
        return probe.present(self._nodes)

    def _relaunch(self, failure: Failure, present: list[hosts.Node]) -> bool:
        """Whether the run can go on within this job: some of its nodes are left."""
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


def _preload() -> dict[str, str]:
    """What keeps ranks from having Slurm cancel their step when they lose another one."""
    before = os.environ.get("LD_PRELOAD", "")
    return {
        "LD_PRELOAD": f"{library()} {before}".strip(),
    }


def _has_gpus() -> bool:
    """Whether this job has GPUs, on which Gloo's engine has not been tried."""
    return any(os.environ.get(name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"))


def _without(nodes: list[hosts.Node], present: list[hosts.Node]) -> str:
    return ", ".join(node.name for node in nodes if node not in present)


def _there(path: Path) -> bool:
    """Whether a file is there, by its folder, of which a shared file system has news first."""

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
    """A signal by which a job can be told that time is up.

    Raises:
        Error: There is none of this name, or nobody can catch it.
    """
    short = name.upper().removeprefix("SIG")
    if short in ("KILL", "STOP"):
        raise Error(f"signal {short} ends a process before it can save anything.",
                    hint="USR1 is usual; USR2, HUP, INT and TERM will do.")  # fmt: skip
    try:
        return signal.Signals[f"SIG{short}"]
    except KeyError:
        raise Error(f"there is no signal {name}.", hint="USR1 is usual.") from None
