"""Strangers at every port of an elastic run: it ends as without them.

    python -m benchmarks.strangers --connections 5000 --descriptors 1024

Handwritten digits are trained under ``hpctrain launch`` twice: alone, and while somebody keeps
connections open to each port at which a process of the run listens. Some say nothing, some send
random bytes, some PUT, some send a byte at a time; what is closed is opened again. The second run
is good if it ends with the same parameters, no process's memory is at its peak more than 50 MiB
above its like's of the first, and the log is less than 100 lines longer. Else the exit code is 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.processes import scratch

MOST_BYTES = 50 * 2**20
MOST_LINES = 100
LOOK_SECONDS = 0.2
OPENED_AT_ONCE = 250
LIMIT_SECONDS = 480.0


class Strangers:
    """Connections to ports of this host, kept up by a thread.

    Args:
        connections: To each port.
    """

    def __init__(self, connections: int) -> None:
        self.ports: set[tuple[str, int]] = set()
        self.opened = 0
        self._connections = connections
        self._held: dict[tuple[str, int], list[socket.socket]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave."""
        self._over.set()
        self._thread.join()
        for held in self._held.values():
            for each in held:
                each.close()

    def _keep_up(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            for port in list(self.ports):
                held = [each for each in self._held.get(port, []) if self._speak(each)]
                missing = min(OPENED_AT_ONCE, self._connections - len(held))
                for _ in range(missing):
                    with contextlib.suppress(OSError):
                        held.append(self._open(port))
                self._held[port] = held

    def _open(self, port: tuple[str, int]) -> socket.socket:
        connection = socket.create_connection(port, timeout=1)
        connection.setblocking(False)
        self.opened += 1
        first = {
            1: os.urandom(20_000),
            2: b"PUT /global/0 HTTP/1.1\r\nContent-Length: 900000000\r\n\r\n" + bytes(20_000),
            3: b"G",
        }.get(self.opened % 4)
        if first is not None:
            with contextlib.suppress(OSError):
                connection.send(first)
        return connection

    def _speak(self, connection: socket.socket) -> bool:
        """Send a little more, of those that do; False: it was closed."""
        try:
            if connection.fileno() % 2:
                connection.send(b"x")
            return connection.recv(4096) != b""
        except BlockingIOError:
            return True
        except OSError:
            connection.close()
            return False


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Where these processes listen."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    address = each.laddr.ip
                    found.add(("127.0.0.1" if address in ("0.0.0.0", "::") else address,
                               each.laddr.port))  # fmt: skip
    return found


def role(process: psutil.Process) -> str:
    """Which of a run's processes it is, the same in every run."""
    words = process.cmdline()
    if "launch" in words:
        return "driver"
    if "hpctrain.launch.worker_slot" in words:
        return f"seat {process.environ().get('HPCTRAIN_RANK', '')}".strip()
    return f"rank {process.environ()['HPCTRAIN_RANK']}"


def run(folder: Path, epochs: int, descriptors: int, strangers: Strangers | None) -> dict[str, Any]:
    """A run of two ranks, perhaps with strangers; what became of it."""
    command = [
        "hpctrain", "launch", "-np", "2", "--", "hpctrain", "train", "digits", "--out", "run",
        "--epochs", str(epochs), "--set", "log.tensorboard=false", "--set", "log.every_steps=1000",
        "--set", "train.validate_every_steps=1000", "--set", "elastic.hang_seconds=30",
    ]  # fmt: skip
    folder.mkdir(parents=True)

    def limited() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))

    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
            start_new_session=True, preexec_fn=limited, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        peaks: dict[str, int] = {}
        ports: set[tuple[str, int]] = set()
        try:
            while process.poll() is None and time.monotonic() - began < LIMIT_SECONDS:
                with contextlib.suppress(psutil.Error):
                    whole = psutil.Process(process.pid)
                    ours = [whole, *whole.children(recursive=True)]
                    now = listening(ours)
                    ports |= now
                    if strangers is not None:
                        strangers.ports = now
                    for each in ours:
                        with contextlib.suppress(psutil.Error, KeyError):
                            name, used = role(each), each.memory_info().rss
                            peaks[name] = max(peaks.get(name, 0), used)
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = folder / "run" / "result.json"
    hashed = json.loads(result.read_text()).get("parameters_sha256") if result.exists() else None
    return {
        "exit_code": process.returncode,
        "seconds": time.monotonic() - began,
        "parameters_sha256": hashed,
        "peak_bytes": peaks,
        "log_lines": len((folder / "log").read_bytes().splitlines()),
        "ports": sorted(f"{host}:{port}" for host, port in ports),
        "opened": strangers.opened if strangers is not None else 0,
    }


def attacked(folder: Path, connections: int, descriptors: int, epochs: int) -> dict[str, Any]:
    """Both runs, and how they differ.

    Args:
        folder: For the runs.
        connections: To each port.
        descriptors: That each process of the run may have.
        epochs: How long they are.
    """
    alone = run(folder / "alone", epochs, descriptors, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    strangers = Strangers(connections)
    try:
        among = run(folder / "among", epochs, descriptors, strangers)
    finally:
        strangers.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    grown = {
        name: peak - alone["peak_bytes"].get(name, peak)
        for name, peak in among["peak_bytes"].items()
    }
    lines = among["log_lines"] - alone["log_lines"]
    good = (
        alone["exit_code"] == among["exit_code"] == 0
        and alone["parameters_sha256"] == among["parameters_sha256"] is not None
        and max(grown.values()) < MOST_BYTES
        and lines < MOST_LINES
    )
    return {
        "good": good,
        "grown_mib": {name: round(bytes_ / 2**20, 1) for name, bytes_ in grown.items()},
        "more_lines": lines,
        "alone": alone,
        "among": among,
    }


def measure(arguments: Arguments) -> Report:
    """Run both, and compare them."""
    with scratch() as folder:
        found = attacked(folder, arguments.connections, arguments.descriptors, arguments.epochs)
        if not found["good"]:
            found["log"] = (folder / "among" / "log").read_text(errors="replace")[-4000:]
    return Report([found], json.dumps(found, indent=1))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--connections", type=count, default=5000)
    add("--descriptors", type=count, default=1024)
    add("--epochs", type=count, default=300)


BENCHMARK = Benchmark(
    "strangers", __doc__, measure, options=options, bars=(at_least("good", 1, must=True),),
    quick={"connections": 100, "epochs": 60}, plots=False,
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.run()
