"""Strangers at every port of an elastic run: it ends as without them.

    python -m benchmarks.strangers --connections 5000 --descriptors 1024
    python -m benchmarks.strangers --nodes gloo

Handwritten digits are trained under ``hpctrain launch`` twice: alone, and while somebody keeps
connections open to each port at which a process of the run listens. Some say nothing, some send
random bytes, some PUT, some send a byte at a time; what is closed is opened again. The second run
is good if it ends with the same parameters, no process's memory is at its peak more than 50 MiB
above its like's of the first, and the log is less than 100 lines longer. Else the exit code is 1.

With ``--nodes`` the run is an elastic job on two hosts of a Slurm cluster on this machine (root,
and Slurm's packages, are needed), whose ranks outlive one another by the engine named, and the
strangers are on a third host. They leave alone the ports of Slurm's own processes, srun and
slurmstepd, which are the site's to protect; with ``--slurm`` they go there, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.processes import scratch
from benchmarks.slurm import slurm_cluster
from tests.slurm.cluster import NETWORK, Cluster

MOST_BYTES = 50 * 2**20
MOST_LINES = 100
LOOK_SECONDS = 0.2
OPENED_AT_ONCE = 250
LIMIT_SECONDS = 900.0
CLONE_NEWNET = 0x40000000
LISTENS = "0A"
SLURM = ("srun", "slurmstepd")
TASK = ["digits", "--set", "log.tensorboard=false", "--set", "log.every_steps=1000", "--set",
        "train.validate_every_steps=1000", "--set", "elastic.hang_seconds=30"]  # fmt: skip

Port = tuple[str, int]


class Strangers:
    """Connections to ports, kept up by a thread.

    Args:
        connections: To each port.
        host: A process of the host on which the strangers are; None: this one.
    """

    def __init__(self, connections: int, host: int | None = None) -> None:
        self.ports: set[Port] = set()
        self.opened = 0
        self._host = host
        self._connections = connections
        self._held: dict[Port, list[socket.socket]] = {}
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
        if self._host is not None:
            with Path(f"/proc/{self._host}/ns/net").open() as network:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(network.fileno(), CLONE_NEWNET) != 0:  # of this thread alone
                    raise OSError(ctypes.get_errno(), "setns")
        while not self._over.wait(LOOK_SECONDS):
            for port in list(self.ports):
                held = [each for each in self._held.get(port, []) if self._speak(each)]
                missing = min(OPENED_AT_ONCE, self._connections - len(held))
                for _ in range(missing):
                    with contextlib.suppress(OSError):
                        held.append(self._open(port))
                self._held[port] = held

    def _open(self, port: Port) -> socket.socket:
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


def listening(process: psutil.Process, host: str) -> set[Port]:
    """Where a process listens.

    Args:
        process: It may be one of a host in namespaces of its own.
        host: The address by which others reach its host, where it listens at all of them.

    Raises:
        OSError: It is gone.
    """
    folder = Path(f"/proc/{process.pid}")
    its = {str(each.readlink()) for each in (folder / "fd").iterdir() if each.is_symlink()}
    found = set()
    for family, size in (("tcp", 4), ("tcp6", 16)):
        for line in (folder / "net" / family).read_text().splitlines()[1:]:
            words = line.split()
            local, state, inode = words[1], words[3], words[9]
            if state != LISTENS or f"socket:[{inode}]" not in its:
                continue
            address, _, port = local.partition(":")
            number = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if size == 4 else "::"
            found.add((host if number in ("0.0.0.0", "::") else number, int(port, 16)))
    return found


def role(process: psutil.Process) -> str:
    """Which of a run's processes it is, the same in every run.

    Raises:
        KeyError: It is none that is looked at.
    """
    words = process.cmdline()
    if process.name() in SLURM:
        raise KeyError(process.name())
    for word, name in (("launch", "driver"), ("job", "job"), ("hpctrain.slurm.orphan", "watcher")):
        if word in words[:4]:
            return name
    environment = process.environ()
    rank = environment.get("HPCTRAIN_RANK", environment.get("PMIX_RANK", ""))
    if "hpctrain.launch.worker_slot" in words:
        return f"seat {environment.get('SLURMD_NODENAME', '')}{rank}".strip()
    if not {"hpctrain", "train"} <= {Path(word).name for word in words[:3]}:
        raise KeyError(process.name())
    return f"rank {rank}"


class Seen(NamedTuple):
    """What was seen of a run while it was up.

    Attributes:
        peaks: The most memory that each of its processes had, by its role, in bytes.
        ports: Where they listened.
    """

    peaks: dict[str, int]
    ports: set[Port]


def watch(
    over: Callable[[], bool],
    processes: Callable[[], list[tuple[psutil.Process, str]]],
    strangers: Strangers | None,
    passed: tuple[str, ...] = (),
) -> Seen:
    """Look at a run until it is over, and send the strangers to its ports.

    Args:
        over: Whether it is.
        processes: Its processes, each with its host's address.
        strangers: Those who are to connect.
        passed: Names of programs whose ports they leave alone.
    """
    seen = Seen({}, set())
    began = time.monotonic()
    while not over() and time.monotonic() - began < LIMIT_SECONDS:
        now, not_ours = set(), set()
        with contextlib.suppress(psutil.Error):
            for each, address in processes():
                with contextlib.suppress(psutil.Error, OSError):
                    # A process also has the sockets of those that started it.
                    where = not_ours if each.name() in passed else now
                    where |= listening(each, address)
                with contextlib.suppress(psutil.Error, KeyError):
                    name, used = role(each), each.memory_info().rss
                    seen.peaks[name] = max(seen.peaks.get(name, 0), used)
        now -= not_ours
        seen.ports.update(now)
        if strangers is not None:
            strangers.ports = now
        time.sleep(0.05)
    return seen


def record(folder: Path, log: Path, seen: Seen, strangers: Strangers | None) -> dict[str, Any]:
    """What became of a run."""
    result = folder / "run" / "result.json"
    hashed = json.loads(result.read_text()).get("parameters_sha256") if result.exists() else None
    return {
        "parameters_sha256": hashed,
        "peak_bytes": seen.peaks,
        "log_lines": len(log.read_bytes().splitlines()) if log.exists() else 0,
        "ports": sorted(f"{host}:{port}" for host, port in seen.ports),
        "opened": strangers.opened if strangers is not None else 0,
    }


def limited(descriptors: int) -> None:
    """Give this process only so many descriptors."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))


def run(folder: Path, epochs: int, descriptors: int, strangers: Strangers | None) -> dict[str, Any]:
    """A run of two ranks, perhaps with strangers; what became of it."""
    command = ["hpctrain", "launch", "-np", "2", "--", "hpctrain", "train", *TASK, "--out", "run",
               "--epochs", str(epochs)]  # fmt: skip
    folder.mkdir(parents=True)
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
            start_new_session=True, preexec_fn=functools.partial(limited, descriptors),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

        def processes() -> list[tuple[psutil.Process, str]]:
            whole = psutil.Process(process.pid)
            return [(each, "127.0.0.1") for each in [whole, *whole.children(recursive=True)]]

        try:
            seen = watch(lambda: process.poll() is not None, processes, strangers)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {
        "exit_code": process.returncode,
        "seconds": time.monotonic() - began,
        **record(folder, folder / "log", seen, strangers),
    }


class Job:
    """Runs as elastic jobs of two nodes, each a host of its own.

    Args:
        cluster: It is up, and has two nodes.
        engine: By which ranks outlive one another: ``gloo`` or ``ulfm``.
        slurm: Whether the strangers go to the ports of Slurm's own processes, too.
    """

    def __init__(self, cluster: Cluster, engine: str, *, slurm: bool) -> None:
        self._cluster = cluster
        self._engine = engine
        self._passed = () if slurm else SLURM

    def __call__(
        self, folder: Path, epochs: int, descriptors: int, strangers: Strangers | None
    ) -> dict[str, Any]:
        """A job, perhaps with strangers; what became of it."""
        folder.mkdir(parents=True)
        (folder / "few.toml").write_text(f'setup = ["ulimit -S -n {descriptors}"]\n')
        began = time.monotonic()
        said = self._cluster.call(
            "hpctrain", "submit", *TASK, "--epochs", str(epochs), "--nodes", "2", "--elastic",
            "--out", "run", "--output", "log", "--time", "20:00", "--site", "few.toml",
            cwd=folder, env={"HPCTRAIN__ELASTIC__MODE": self._engine},
            timeout_seconds=LIMIT_SECONDS,
        )  # fmt: skip
        job = said.split()[1].rstrip(":")
        networks = {
            Path(f"/proc/{self._cluster.first(name)}/ns/net").readlink(): f"{NETWORK}.{10 + number}"
            for number, name in enumerate(self._cluster.names, 1)
        }

        def processes() -> list[tuple[psutil.Process, str]]:
            found = []
            for each in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):
                    network = Path(f"/proc/{each.pid}/ns/net").readlink()
                    if network in networks and (
                        each.name() == "slurmstepd" or each.environ().get("SLURM_JOB_ID") == job
                    ):
                        found.append((each, networks[network]))
            return found

        looked = 0.0
        ended = False

        def over() -> bool:
            nonlocal looked, ended
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                ended = self._cluster.field(job, "JobState") in ("COMPLETED", "FAILED", "TIMEOUT")
            return ended

        seen = watch(over, processes, strangers, self._passed)
        code = self._cluster.field(job, "ExitCode").partition(":")[0]
        return {
            "exit_code": int(code),
            "seconds": time.monotonic() - began,
            **record(folder, folder / "log", seen, strangers),
        }


Start = Callable[[Path, int, int, Strangers | None], dict[str, Any]]


def attacked(
    folder: Path, connections: int, descriptors: int, epochs: int, start: Start = run,
    host: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Both runs, and how they differ.

    Args:
        folder: For the runs.
        connections: To each port.
        descriptors: That each process of the run may have.
        epochs: How long they are.
        start: Runs one.
        host: A process of the host on which the strangers are; None: this one.
    """
    alone = start(folder / "alone", epochs, descriptors, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    strangers = Strangers(connections, host)
    try:
        among = start(folder / "among", epochs, descriptors, strangers)
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
    given = (arguments.connections, arguments.descriptors, arguments.epochs)
    with scratch() as folder:
        if arguments.nodes is None:
            found = attacked(folder, *given)
        else:
            with slurm_cluster(2) as cluster:
                job = Job(cluster, arguments.nodes, slurm=arguments.slurm)
                found = attacked(folder, *given, job, cluster.first("ctl"))
        if not found["good"]:
            found["log"] = (folder / "among" / "log").read_text(errors="replace")[-4000:]
    return Report([found], json.dumps(found, indent=1))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--connections", type=count, default=5000)
    add("--descriptors", type=count, default=1024)
    add("--epochs", type=count, default=300)
    add("--nodes", choices=("gloo", "ulfm"), help="on two nodes, by this engine")
    add("--slurm", action="store_true", help="also at ports of Slurm's own")


BENCHMARK = Benchmark(
    "strangers", __doc__, measure, options=options, bars=(at_least("good", 1, must=True),),
    quick={"connections": 100, "epochs": 60}, plots=False,
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.run()
