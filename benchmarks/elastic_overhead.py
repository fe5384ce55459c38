"""What `--elastic` costs while nothing fails: the same training with it and without, in turn.

    python -m benchmarks.elastic_overhead --seconds 200

Elastic training is started by another mpirun, and MPI by other parameters, so the two cannot share
processes. Two worlds of two ranks are up at once, `hpctrain train --elastic ulfm` under
`mpirun --with-ft ulfm`, and `hpctrain train` under `mpirun`. Each takes a block of steps in turn,
while the processes of the other are stopped (SIGSTOP), so that whatever else the machine does falls
on both alike; the two change places from pair to pair. A pair gives a ratio; their median has a
bootstrap interval of 95%. With ``--control`` both worlds are without: what then differs from 1 is
this method's own error. Blocks are short against the silence after which a rank counts as lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import elastic_gate
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, positive, words_of
from benchmarks.harness.processes import scratch
from benchmarks.harness.tables import table_of
from hpctrain.errors import Error
from hpctrain.process import cores, mpirun, search_path

RANKS, BATCH = 2, 128
BLOCK_STEPS = {"Cifar10": 4, "Perceptron": 100}
START_SECONDS, BLOCK_SECONDS = 120.0, 60.0
WARM_UP = 5
STEPS = 1_000_000  # more than there is time for
RESAMPLES = 10_000


class World:
    """The ranks of one training, each at the other end of a socket."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.gates: list[socket.socket] = []

    def signal(self, number: int) -> None:
        """Stop its ranks, or have them go on."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def block(self) -> float:
        """Have it take a block of steps, and return the seconds of its slowest rank."""
        self.signal(signal.SIGCONT)
        for gate in self.gates:
            gate.sendall(b".")
        seconds = max(float(_line(gate)["seconds"]) for gate in self.gates)
        self.signal(signal.SIGSTOP)
        return seconds


def _line(gate: socket.socket) -> dict[str, Any]:
    said = gate.recv(1000)
    if not said:
        raise Error("a rank has ended.", hint="its world's log is above.")
    read: dict[str, Any] = json.loads(said)
    return read


def launch(name: str, model: str, elastic: bool, folder: Path) -> subprocess.Popen[str]:
    """Start a world."""
    options = {"gate": folder / "gate", "world": name, "block": BLOCK_STEPS[model]}
    command = [
        *mpirun(RANKS), *(["--with-ft", "ulfm"] if elastic else []),
        "hpctrain", "train", f"{elastic_gate.__file__}:{model}", "--strategy", "horovod",
        "--elastic", "ulfm" if elastic else "off", "--steps", str(STEPS),
        "--batch-size", str(BATCH), "--out", str(folder / name),
        "--set", "checkpoint.every_steps=1000000000", "--set", "log.tensorboard=false",
    ]  # fmt: skip
    for option, value in options.items():
        command += ["--set", f"options.{option}={value}"]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=(folder / f"{name}.log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": search_path(), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def pairs_of(model: str, duration: float, control: bool) -> list[tuple[float, float]]:
    """Return the seconds of a block with and without, for each pair that there is time for."""
    first = "control" if control else "elastic"
    with scratch() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "gate"))
        listener.listen()
        listener.settimeout(START_SECONDS)
        worlds = {first: World(), "off": World()}
        started = []
        try:
            for each in worlds:
                started.append(launch(each, model, each == "elastic", folder))
            for _ in range(RANKS * len(worlds)):
                gate, _ = listener.accept()
                gate.settimeout(BLOCK_SECONDS)
                who = _line(gate)
                worlds[who["world"]].pids.append(who["pid"])
                worlds[who["world"]].gates.append(gate)
            for world in worlds.values():
                world.signal(signal.SIGSTOP)
            seconds: list[tuple[float, float]] = []
            began = time.monotonic()
            while len(seconds) < 2 * WARM_UP or time.monotonic() - began < duration:
                turn = [first, "off"] if len(seconds) % 2 else ["off", first]
                took = {each: worlds[each].block() for each in turn}
                seconds.append((took[first], took["off"]))
            return seconds[WARM_UP:]
        except BaseException:
            for log in folder.glob("*.log"):
                print(log.read_text()[-2000:])
            raise
        finally:
            for world in worlds.values():
                for gate in world.gates:
                    gate.close()  # its rank ends
                world.signal(signal.SIGCONT)
            time.sleep(0.5)
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            for world in worlds.values():
                world.signal(signal.SIGKILL)


def record(model: str, control: bool, seconds: list[tuple[float, float]]) -> dict[str, Any]:
    """Return what the pairs say."""
    ratios = np.array([with_ / without for with_, without in seconds])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    block = BLOCK_STEPS[model]
    return {
        "model": model,
        "world": "control" if control else "elastic",
        "ranks": RANKS,
        "global_batch": BATCH,
        "block_steps": block,
        "pairs": len(seconds),
        "ratio_median": float(np.median(ratios)),
        "ratio_interval_95": [float(x) for x in np.quantile(medians, [0.025, 0.975])],
        "ratio_quartiles": [float(x) for x in np.quantile(ratios, [0.25, 0.75])],
        "step_ms": 1e3 * statistics.median(a for a, _ in seconds) / block,
        "off_step_ms": 1e3 * statistics.median(b for _, b in seconds) / block,
        "oversubscribed": cores() < RANKS,
    }


def measure(arguments: Arguments) -> Report:
    """Run the pairs of each model."""
    records = []
    for model in arguments.models:
        seconds = pairs_of(model, arguments.seconds, arguments.control)
        records.append({**record(model, arguments.control, seconds), "seconds": seconds})
    columns = (
        ("pairs", lambda each: str(each["pairs"])),
        ("off: step ms", lambda each: f"{each['off_step_ms']:.2f}"),
        ("elastic: step ms", lambda each: f"{each['step_ms']:.2f}"),
        ("ratio", lambda each: f"{each['ratio_median']:.4f}"),
        ("95%", lambda each: "{:.4f}-{:.4f}".format(*each["ratio_interval_95"])),
    )
    return Report(records, table_of("model", records, "model", columns))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--seconds", type=positive, default=60, help="of each model")
    add("--models", type=words_of(BLOCK_STEPS), default=",".join(BLOCK_STEPS))
    add("--control", action="store_true", help="both worlds without --elastic")


QUICK = {"seconds": 5, "models": "Perceptron"}
BENCHMARK = Benchmark("elastic_overhead", __doc__, measure, options=options, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
