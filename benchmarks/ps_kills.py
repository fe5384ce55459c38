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

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from hpctrain.process import mpirun, search_path

EPOCHS, LOG_STEPS, BATCH = 20, 10, 64
STEPS = EPOCHS * -(-1438 // BATCH)  # of the training samples, 1,438
VALIDATION_SAMPLES = 359
RANKS = {"worker": (3, 1), "server": (2, 2)}  # workers and servers, by the role that is hit
SILENCE_SECONDS = 2
START_SECONDS, END_SECONDS, GONE_SECONDS = 180.0, 60.0, 10.0
EDGE_SHARE = 0.1  # of the moments lie before the first step, and as many after the last one
EDGE_SECONDS = 0.3


@dataclasses.dataclass
class Fault:
    """Who is hit, by what, and when.

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
        """A random one."""
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
        """The lines that are whole."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

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
        """Wait for the end; what is wrong with it, if anything."""
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
        """Of a run that has come to its end."""
        path = self.folder / "run" / "result.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def output(self) -> str:
        """What it printed."""
        return Path(self._log.name).read_text(errors="replace")

    def stacks(self) -> str:
        """Where the ranks are, if py-spy is there to tell."""
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
    """A run of the campaign under way; never left behind."""
    workers, servers = RANKS[role]
    with (
        tempfile.TemporaryDirectory(prefix="ps-kills-", ignore_cleanup_errors=True) as folder,
        Run(
            Path(folder), workers + servers, "digits", "--epochs", EPOCHS, "--servers", servers,
            "--replicas", servers - 1, "--consistency", mode, *arguments,
        ) as run,
    ):  # fmt: skip
        yield run


@dataclasses.dataclass
class Usual:
    """Runs of a mode without faults."""

    accuracies: list[float]
    digests: set[str]

    @classmethod
    def measure(cls, mode: str, role: str, runs: int) -> Usual:
        """Run some.

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
        """No run that is right comes out lower than this."""
        mean = statistics.fmean(self.accuracies)
        noise = (mean * (1 - mean) / VALIDATION_SAMPLES) ** 0.5
        if len(self.accuracies) > 1:
            noise = max(noise, statistics.stdev(self.accuracies))
        return mean - 4 * noise


def attempt(mode: str, role: str, fault: Fault, usual: Usual) -> dict[str, Any]:
    """One run with a fault, and what became of it."""
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
    """What is wrong with a run that has ended, or that it is good."""
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
    """The step of the loss, and the usual one, in milliseconds."""
    lost = [line["step_ms"] for line in metrics if line["kind"] == "event" and "step_ms" in line]
    rates = [line["samples_per_second"] for line in metrics if line["kind"] == "train"]
    if not lost or not rates:
        return {}
    return {"failover_ms": max(lost), "usual_ms": 1e3 * BATCH / statistics.median(rates)}


def campaign(
    mode: str, role: str, runs: int, seed: int, *, jobs: int, show: Callable[[Any], None]
) -> list[dict[str, Any]]:
    """All runs of a mode and role."""
    usual = Usual.measure(mode, role, 3 if mode != "sync" else 2)

    def one(number: int) -> dict[str, Any]:
        generator = random.Random(f"{seed}/{mode}/{role}/{number}")
        fault = Fault.draw(role, generator)
        record = {
            "mode": mode, "role": role, "seed": seed, "run": number, **dataclasses.asdict(fault),
            **attempt(mode, role, fault, usual),
        }  # fmt: skip
        show(record)
        return record

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(runs)))


def table(records: list[dict[str, Any]]) -> str:
    """A line for each mode, role and signal."""
    rows = [("mode", "role", "signal", "runs", "hit", "good", "failover ms (max)", "usual ms")]
    kinds = sorted({(r["mode"], r["role"], r["signal"]) for r in records})
    for kind in kinds:
        some = [r for r in records if (r["mode"], r["role"], r["signal"]) == kind]
        timed = [r for r in some if "failover_ms" in r]
        lost, usual = ([r[key] for r in timed] for key in ("failover_ms", "usual_ms"))
        times = ("", "")
        if timed:
            text = f"{statistics.median(lost):.0f} ({max(lost):.0f})"
            times = (text, f"{statistics.median(usual):.1f}")
        good = sum(r["verdict"] == "good" for r in some)
        hit = sum(r.get("hit", False) for r in some)
        rows.append((*kind, str(len(some)), str(hit), str(good), *times))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50, help="of each mode and role")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default="sync,async,ssp:2,backup:1")
    parser.add_argument("--roles", default="worker,server")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    options = parser.parse_args()

    def show(record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)

    records: list[dict[str, Any]] = []
    for role in options.roles.split(","):
        for mode in options.modes.split(","):
            records += campaign(
                mode, role, options.runs, options.seed, jobs=options.jobs, show=show
            )
    print(table(records))
    sys.exit(any(record["verdict"] != "good" for record in records))


if __name__ == "__main__":
    main()
