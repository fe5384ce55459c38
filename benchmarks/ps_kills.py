"""What becomes of a run when a worker or a server is killed or stopped, again and again.

    python -m benchmarks.ps_kills --runs 50 --seed 0

Each run trains handwritten digits under ``mpirun --with-ft ulfm``. At a random moment between the
first line of its metrics and its end, a random rank of the role gets a signal: a worker SIGKILL or
SIGSTOP, a server (of two, with a replica of every slice) SIGKILL. The run is good if

- it ends in time, and none of its ranks is left;
- ``result.json`` is there, and tells of all steps;
- the accuracy is that of runs without faults, but for noise;
- for a server, and sync: the parameters are bit for bit those of a run without faults.

The fail-over is the step in which the loss was noticed, from the end of the step before it, as the
worker with rank 0 saw it: from the loss's event in the metrics.

One line of JSON for each run; then a table. The exit code is 1 if any run was not good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, words, words_of
from benchmarks.harness.processes import Tail, scratch
from benchmarks.harness.tables import table, tell
from hpctrain.process import mpirun, search_path

EPOCHS, LOG_STEPS, BATCH = 20, 10, 64
STEPS = EPOCHS * -(-1438 // BATCH)  # of the training samples, 1,438
VALIDATION_SAMPLES = 359
RANKS = {"worker": (3, 1), "server": (2, 2)}  # workers and servers, by the role that is hit
SILENCE_SECONDS = 2
START_SECONDS, END_SECONDS, GONE_SECONDS = 240.0, 60.0, 60.0
EDGE_SHARE = 0.1  # of the moments lie before the first step, and as many after the last one
EDGE_SECONDS = 0.3


@dataclasses.dataclass
class Fault:
    """A rank that is hit, by what, and when.

    Attributes:
        rank: Of the job.
        signal: Its name.
        step: It comes when the metrics have come to this step,
        delay: and so many seconds have gone by since.
    """

    rank: int
    signal: str
    step: int
    delay: float

    @classmethod
    def draw(cls, role: str, generator: random.Random) -> Fault:
        """Return a random one."""
        workers, servers = RANKS[role]
        if role == "worker":
            rank, name = generator.randrange(workers), generator.choice(["SIGKILL", "SIGSTOP"])
        else:
            rank, name = workers + generator.randrange(servers), "SIGKILL"
        place = generator.random()
        if place < EDGE_SHARE:
            return cls(rank, name, 0, generator.uniform(0, EDGE_SECONDS))
        if place > 1 - EDGE_SHARE:
            return cls(rank, name, STEPS, generator.uniform(0, EDGE_SECONDS))
        return cls(rank, name, generator.randrange(STEPS), generator.uniform(0, 0.1))


class Run:
    """A training under ``mpirun --with-ft ulfm``.

    Args:
        folder: For all that it writes.
        ranks: How many.
        arguments: Of ``hpctrain train``.
    """

    def __init__(self, folder: Path, ranks: int, *arguments: object) -> None:
        self.folder = folder
        self._metrics = Tail(folder / "run" / "metrics.jsonl")
        command = [
            *mpirun(ranks), "--with-ft", "ulfm", "hpctrain", "train", *map(str, arguments),
            "--strategy", "ps", "--out", str(folder / "run"),
            "--set", f"log.every_steps={LOG_STEPS}", "--set", "log.tensorboard=false",
        ]  # fmt: skip
        self._log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": search_path(), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.ranks: dict[int, psutil.Process] = {}
        self._others_there = time.monotonic()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def find_ranks(self) -> None:
        """Look for the ranks, which have process groups of their own."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    rank = child.environ().get("OMPI_COMM_WORLD_RANK")
                    if rank is not None and "hpctrain" in " ".join(child.cmdline()):
                        self.ranks[int(rank)] = child

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines that are whole."""
        return self._metrics.read()

    def reached(self, step: int, seconds: float = START_SECONDS) -> bool:
        """Wait until the metrics have come to a step; False where the run has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            lines = self.metrics()
            if lines and lines[-1]["step"] >= step:
                if not self.ranks:
                    self.find_ranks()
                return True
            time.sleep(0.005)
        return False

    def hit(self, rank: int, name: str) -> bool:
        """Send a rank a signal; False where it has ended."""
        try:
            self.ranks[rank].send_signal(getattr(signal, name))
        except (KeyError, psutil.NoSuchProcess):
            return False
        return True

    def wait(self, seconds: float = END_SECONDS) -> str:
        """Wait for the end, and return what is wrong with it, if anything."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                return f"hangs: {self._states()}"
            self._end_last_stopped()
            time.sleep(0.05)
        _, alive = psutil.wait_procs(list(self.ranks.values()), timeout=GONE_SECONDS)
        left = [rank for rank, process in self.ranks.items() if process in alive]
        return f"ranks {left} are left" if left else ""

    def _states(self) -> dict[int, str]:
        states = {}
        for rank, process in self.ranks.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                states[rank] = process.status()
        return {rank: state for rank, state in states.items() if state != psutil.STATUS_ZOMBIE}

    def _end_last_stopped(self) -> None:
        """End who was stopped as it was about to end, when nobody else is there to end it."""
        states = self._states()
        if set(states.values()) != {psutil.STATUS_STOPPED}:
            self._others_there = time.monotonic()
        elif time.monotonic() - self._others_there > GONE_SECONDS / 2:
            for rank in states:
                self.hit(rank, "SIGKILL")

    def result(self) -> dict[str, Any] | None:
        """Return the result of a run that has come to its end, or None."""
        path = self.folder / "run" / "result.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def output(self) -> str:
        """Return what it printed."""
        return Path(self._log.name).read_text(errors="replace")

    def stacks(self) -> str:
        """Return where the ranks are, if py-spy is there to tell."""
        if shutil.which("py-spy") is None:
            return ""
        texts = []
        for rank, process in self.ranks.items():
            dump = ["py-spy", "dump", "--pid", str(process.pid)]
            done = subprocess.run(dump, capture_output=True, text=True, timeout=30, check=False)
            texts.append(f"rank {rank}: {done.stdout}")
        return "\n".join(texts)

    def end(self) -> None:
        """Kill whatever is left."""
        self.find_ranks()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in self.ranks.values():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self._log.close()


@contextlib.contextmanager
def running(mode: str, role: str, *arguments: object) -> Iterator[Run]:
    """Give a run of the campaign under way; it is never left behind."""
    workers, servers = RANKS[role]
    with (
        scratch() as folder,
        Run(
            folder, workers + servers, "digits", "--epochs", EPOCHS, "--servers", servers,
            "--replicas", servers - 1, "--consistency", mode, *arguments,
        ) as run,
    ):  # fmt: skip
        yield run


@dataclasses.dataclass
class Usual:
    """What runs of a mode without faults come to."""

    accuracies: list[float]
    digests: set[str]

    @classmethod
    def measure(cls, mode: str, role: str, runs: int) -> Usual:
        """Run a mode some times without faults.

        Raises:
            RuntimeError: One of them fails.
        """
        results = []
        for _ in range(runs):
            with running(mode, role) as run:
                if not run.reached(0):
                    raise RuntimeError(f"{mode} does not start: {run.output()}")
                wrong = run.wait()
                result = run.result()
                if wrong or result is None:
                    raise RuntimeError(f"{mode} without faults: {wrong}\n{run.output()}")
                results.append(result)
        accuracies = [result["metrics"]["final"]["val_accuracy"] for result in results]
        return cls(accuracies, {result["parameters_sha256"] for result in results})

    @property
    def lowest(self) -> float:
        """The accuracy below which no run comes out that is right."""
        mean = statistics.fmean(self.accuracies)
        noise = (mean * (1 - mean) / VALIDATION_SAMPLES) ** 0.5
        if len(self.accuracies) > 1:
            noise = max(noise, statistics.stdev(self.accuracies))
        return mean - 4 * noise


def attempt(mode: str, role: str, fault: Fault, usual: Usual) -> dict[str, Any]:
    """Run once with a fault, and return what became of it."""
    extra = ["--set", f"ps.silence_seconds={SILENCE_SECONDS}"] if fault.signal == "SIGSTOP" else []
    with running(mode, role, *extra) as run:
        if not run.reached(0):
            return {"verdict": "does not start", "output": run.output()}
        reached = run.reached(fault.step, END_SECONDS)
        time.sleep(fault.delay)
        hit = reached and run.process.poll() is None and run.hit(fault.rank, fault.signal)
        begin = time.monotonic()
        verdict = run.wait()
        record: dict[str, Any] = {"hit": hit, "seconds": round(time.monotonic() - begin, 1)}
        stacks = run.stacks() if verdict else ""
        record["verdict"] = verdict = verdict or judge(mode, role, run, usual)
        record |= failover(run.metrics())
        if verdict != "good":
            record["output"] = run.output()[-4000:] + stacks
        return record


def judge(mode: str, role: str, run: Run, usual: Usual) -> str:
    """Return what is wrong with a run that has ended, or that it is good."""
    result = run.result()
    if run.process.returncode != 0:
        return f"exit code {run.process.returncode}"
    if result is None:
        return "no result"
    if result["steps"] != STEPS:
        return f"{result['steps']} steps"
    accuracy = result["metrics"]["final"].get("val_accuracy", 0.0)
    if accuracy < usual.lowest:
        return f"accuracy {accuracy:.4f} < {usual.lowest:.4f}"
    if role == "server" and mode == "sync" and result["parameters_sha256"] not in usual.digests:
        return "other parameters"
    return "good"


def failover(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Return the step of the loss, and the usual one, in milliseconds."""
    lost = [line["step_ms"] for line in metrics if line["kind"] == "event" and "step_ms" in line]
    rates = [line["samples_per_second"] for line in metrics if line["kind"] == "train"]
    if not lost or not rates:
        return {}
    return {"failover_ms": max(lost), "usual_ms": 1e3 * BATCH / statistics.median(rates)}


def campaign(mode: str, role: str, runs: int, seed: int, *, jobs: int) -> list[dict[str, Any]]:
    """Run all runs of a mode and a role.

    Args:
        mode: Consistency.
        role: Who is hit: ``worker`` or ``server``.
        runs: How many.
        seed: Of the faults.
        jobs: Runs side by side.

    Returns:
        A record for each.
    """
    usual = Usual.measure(mode, role, 3 if mode != "sync" else 2)

    def one(number: int) -> dict[str, Any]:
        generator = random.Random(f"{seed}/{mode}/{role}/{number}")
        fault = Fault.draw(role, generator)
        record = {
            "mode": mode, "role": role, "seed": seed, "run": number, **dataclasses.asdict(fault),
            **attempt(mode, role, fault, usual),
        }  # fmt: skip
        tell(record)
        return record

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(runs)))


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a record for each mode, role and signal."""
    found = []
    for kind in sorted({(r["mode"], r["role"], r["signal"]) for r in records}):
        some = [r for r in records if (r["mode"], r["role"], r["signal"]) == kind]
        each = dict(zip(("mode", "role", "signal"), kind, strict=True))
        each |= {"runs": len(some), "hit": sum(r.get("hit", False) for r in some)}
        good = sum(r["verdict"] == "good" for r in some)
        each |= {"good": good, "good_share": good / len(some)}
        for key in ("failover_ms", "usual_ms"):
            if values := [r[key] for r in some if key in r]:
                each |= {key: statistics.median(values), f"{key}_max": max(values)}
        found.append(each)
    return found


def show(records: list[dict[str, Any]]) -> str:
    """Return a table of the summary."""
    rows = [["mode", "role", "signal", "runs", "hit", "good", "failover ms (max)", "usual ms"]]
    for each in records:
        times = ["", ""]
        if "failover_ms" in each:
            longest = each["failover_ms_max"]
            times = [f"{each['failover_ms']:.0f} ({longest:.0f})", f"{each['usual_ms']:.1f}"]
        keys = ("mode", "role", "signal", "runs", "hit", "good")
        rows.append([*(str(each[key]) for key in keys), *times])
    return table(rows)


def measure(arguments: Arguments) -> Report:
    """Run the campaign."""
    records: list[dict[str, Any]] = []
    for role in arguments.roles:
        for mode in arguments.modes:
            records += campaign(mode, role, arguments.runs, arguments.seed, jobs=arguments.jobs)
    found = summary(records)
    return Report(records, show(found), summary=found)


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--runs", type=count, default=50, help="of each mode and role")
    add("--seed", type=int, default=0)
    add("--modes", type=words, default="sync,async,ssp:2,backup:1")
    add("--roles", type=words_of(RANKS), default="worker,server")
    add("--jobs", type=count, default=1, help="runs side by side")


BARS = (at_least("good_share", 1.0, must=True),)
QUICK = {"runs": 2, "modes": "sync"}
BENCHMARK = Benchmark(
    "ps_kills", __doc__, measure, options=options, bars=BARS, quick=QUICK, plots=False
)

if __name__ == "__main__":
    BENCHMARK.run()
