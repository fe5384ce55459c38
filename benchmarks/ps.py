"""The parameter server's speed, side by side with others and with the limits.

    python -m benchmarks.ps --out results

Every case runs in processes of its own, once a round; the rounds go over all cases in turn, so that
whatever else the machine does falls on all alike. A ratio is one of medians within a round; shown
are the median of the rounds' ratios, the least and the largest. What comes out is checked.

- exchange: a worker and a server on this host push 25,557,032 gradients and pull the weights, by
  messages and through shared memory, and others do the same; see ps_peers.py, and ps_lite.py for
  --ps-lite. Beside a copy of as many bytes in the same process.
- overlap: how much of the exchange computing hides. A step of a network is timed with the exchange,
  and without it; and the exchange alone. Computing is on one of this host's cores, which the
  exchange needs as well, or emulated as on an accelerator (`elsewhere`): gradients are waited for.
- codecs: messages that are compressed, or encrypted, beside those that are not.
- hosts: 4 workers and 1, 2 and 4 servers, each on an emulated host of its own; see ps_hosts.py.
  Beside the time that the busiest link takes at the bandwidth plain transfers reach on such a link.

Prints a table; --out gets ps.json, ps.csv and, where matplotlib is installed, plots.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import ps_hosts, ps_lite, ps_peers
from benchmarks.harness.bars import at_least, at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, words
from benchmarks.harness.processes import module, scratch
from benchmarks.harness.rounds import Record, Round, compared, in_turn, record_of
from benchmarks.harness.tables import FOOTNOTE, by_group, say, table_of
from benchmarks.ps_peers import COUNT, LR, MOMENTUM, WARM_UP, Result, milliseconds
from hpctrain.errors import Error
from hpctrain.process import cores

CODECS = ("fp16", "bf16", "int8", "topk:0.01")
CHILD = module("ps", "--child")
KEY = "5a" * 32
WIDTH, DEPTH = 1024, 24  # 25,190,400 parameters
COMPUTE_OVER_EXCHANGE = 3
HOST_WORKERS, HOST_SERVERS = 4, (1, 2, 4)
BARS = (
    at_least("over_messages", 5.0, case="torch_rpc"),
    at_least("over_messages", 1.0, case="gloo"),
    at_most("over_memcpy", 2.2, case="messages"),
    at_most("over_memcpy", 1.3, case="shared"),
    at_least("hidden", 0.8, case=("overlap_messages_elsewhere", "overlap_shared_elsewhere")),
    at_most("over_messages", 2.5, case="encrypted"),
    at_most("over_bound", 1.05, group="hosts"),
)
GIVEN = ("benchmark", "case", "rounds", "bytes")  # of a case's processes
# What the table shows of each group.
FIELDS = {
    "exchange": ("median_ms", "over_memcpy", "over_messages", "error"),
    "overlap": ("compute_ms", "exchange_ms", "median_ms", "hidden", "error"),
    "codecs": ("median_ms", "over_messages", "moved_MB", "error"),
    "hosts": ("median_ms", "bound_ms", "over_bound", "goodput_MBps", "link_MBps", "error"),
}

# Cases that others have nothing like, in processes of their own.


def coded(rounds: int, folder: Path, *, compression: str) -> Result:
    """Time messages that are compressed."""
    # Values of five sizes, as of the pattern, would be too easy to choose from.
    gradient = torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
    expected = partial(ps_peers.compressed, gradient, compression)
    options: dict[str, Any] = {"compression": compression, "shared_memory": False}
    return ps_peers.ours(rounds, folder, gradient=gradient, expected=expected, **options)


def elsewhere(rounds: int, folder: Path, **settings: Any) -> Result:
    """Time steps whose computing takes none of this host's cores: gradients are waited for."""
    ends, client, hyper = ps_peers.connected(COUNT, settings)
    if client is None:
        return {}
    slices = range(len(client.layout.slices))
    client.gradients[0].copy_(ps_peers.pattern(COUNT))

    def exchange() -> None:
        client.push_pull(1.0, hyper).wait()
        client.end()

    def compute(push: bool) -> None:
        for index in reversed(slices):  # as backward() has them ready
            time.sleep(pause)
            if push:
                client.push([index])

    def step() -> None:
        client.begin(1.0, hyper)
        compute(push=True)
        client.wait()
        client.end()

    alone = statistics.median([milliseconds(exchange) for _ in range(3 * WARM_UP)][WARM_UP:])
    pause = 1e-3 * COMPUTE_OVER_EXCHANGE * alone / len(slices)

    def measure() -> tuple[float, float, float]:
        return milliseconds(lambda: compute(push=False)), milliseconds(exchange), milliseconds(step)

    measured = [measure() for _ in range(WARM_UP + rounds)][WARM_UP:]
    error = ps_peers.error_after(client.weights[0], client.clock)
    ends.close()
    return {**hidden(measured), "error": error}


def hidden(measured: list[tuple[float, float, float]]) -> Result:
    """Return what computing alone, the exchange alone, and both together say."""
    return {
        "compute_ms": statistics.median(a for a, _, _ in measured),
        "exchange_ms": statistics.median(b for _, b, _ in measured),
        "times_ms": [c for _, _, c in measured],
        # Of each three, which whatever else the machine does has fallen on alike.
        "hidden": statistics.median(1 - (c - a) / b for a, b, c in measured),
    }


def overlap(rounds: int, folder: Path, **settings: Any) -> Result:
    """Time steps of a network: computing alone, the exchange alone, and both."""
    from hpctrain import init
    from hpctrain.config import PsConfig
    from hpctrain.strategies.parameter_server import ParameterServer

    how = ParameterServer(init(), PsConfig(**settings))
    torch.set_num_threads(1)
    if how.serves:
        how.serve()
        return {}
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    twin = copy.deepcopy(model)
    plain, inner = (
        torch.optim.SGD(each.parameters(), lr=LR, momentum=MOMENTUM) for each in (twin, model)
    )
    optimizer = how.wrap(model, inner)
    x, y = torch.randn(2, 32, WIDTH)

    def compute(model: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()

    def alone() -> None:
        with optimizer.no_sync():
            compute(model, optimizer)

    def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
        compute(model, optimizer)
        optimizer.step()

    def measure() -> tuple[float, float, float]:
        # What computing alone leaves is what the second of these pushes.
        return milliseconds(alone), milliseconds(optimizer.step), milliseconds(step)

    for _ in range(WARM_UP):
        step()
        step(twin, plain)
    with torch.no_grad():
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    trial = [statistics.median(times) for times in zip(*(measure() for _ in range(5)), strict=True)]
    batch = max(8, round(len(x) * COMPUTE_OVER_EXCHANGE * trial[1] / trial[0]))
    x, y = torch.randn(2, batch, WIDTH)
    measured = [measure() for _ in range(WARM_UP + rounds)][WARM_UP:]
    how.world.comm.close()
    return {**hidden(measured), "batch": batch, "error": error}


# What runs all cases, round after round.


class Case(NamedTuple):
    """What is measured once a round, and what sets it apart."""

    group: str
    name: str
    variables: dict[str, Any]
    measure: Callable[[], Result]
    ranks: int = 2


def on_hosts(servers: int, mbits: float, seconds: float, run: Callable[..., Result]) -> Result:
    """Time our exchange on emulated hosts, and before that what a link of theirs carries."""
    ranks = HOST_WORKERS + servers
    with ps_hosts.hosts(ranks, mbits) as cluster:

        def start(command: Sequence[str], seconds: float, each: Sequence[int] = ()) -> Any:
            return cluster.mpirun(each or [1] * ranks, command, seconds)

        link = module("ps_hosts", "--rank", str(mbits))
        done = start(link, seconds, [1, *[0] * (ranks - 2), 1])
        if done.returncode:
            return {"failed": done.stdout.strip()[-300:]}
        result = run(start=start)
    if "failed" in result:
        return result
    carries = json.loads(done.stdout.splitlines()[-1])["both_ways_MBps"]
    total, largest = sum(result["server_MB"]), max(result["server_MB"])
    bound = 1e3 * max(total, HOST_WORKERS * largest) / carries
    return {
        **result,
        "link_MBps": carries,
        "largest_share": largest * servers / total,
        "bound_ms": bound,
        "over_bound": result["median_ms"] / bound,
        "goodput_MBps": 2e3 * HOST_WORKERS * total / result["median_ms"],
        "bound_MBps": 2e3 * HOST_WORKERS * total / bound,
    }


def plan(arguments: Arguments, tree: Path | None) -> Iterator[Case]:
    """Yield all cases, in the order in which they run."""
    limits = {"timeout_seconds": arguments.timeout}
    peers = partial(ps_peers.run_case, rounds=arguments.repeats, **limits)
    own = partial(peers, command=CHILD)
    for name in ps_peers.CASES:
        ranks = 1 if name in ps_peers.ALONE else 2
        yield Case("exchange", name, {}, partial(peers, name), ranks)
    for name in ps_lite.cases_of(tree) if tree else ():
        measure = partial(ps_lite.run_case, tree, name, arguments.repeats, **limits)
        yield Case("exchange", name, {}, measure)
    for name, shared in (("messages", False), ("shared", True)):
        options = {"shared_memory": shared}
        variables = {"vector_MB": 4e-6 * DEPTH * WIDTH * (WIDTH + 1)}
        measure = partial(own, "overlap", options=options)
        yield Case("overlap", f"overlap_{name}", variables, measure)
        variables = {"vector_MB": 4e-6 * COUNT, "emulated": True}
        measure = partial(own, "elsewhere", options=options)
        yield Case("overlap", f"overlap_{name}_elsewhere", variables, measure)
    for name in CODECS:
        variables = {"compression": name}
        yield Case("codecs", name, variables, partial(own, "coded", options=variables))
    measure = partial(own, "encrypted")
    yield Case("codecs", "encrypted", {"encrypted": True}, measure)
    for servers in HOST_SERVERS:
        options = {"servers": servers, "count": round(arguments.host_mb * 250_000)}
        run = partial(own, "ours", options=options)
        measure = partial(on_hosts, servers, arguments.mbits, arguments.timeout, run)
        variables = {"workers": HOST_WORKERS, "servers": servers, "hosts": HOST_WORKERS + servers}
        variables["link_Mbps"] = arguments.mbits
        yield Case("hosts", f"hosts_{servers}", variables, measure, HOST_WORKERS + servers)


def chosen(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Return the cases asked for, by group or name, and what they are compared with."""
    known = [*FIELDS, *(case.name for case in cases)]
    if unknown := ", ".join(set(names) - set(known)):
        raise Error(f"there are no cases {unknown}.", hint=f"there are {', '.join(known)}.")
    some = [case for case in cases if {case.group, case.name} & set(names)]
    if any(case.group == "hosts" for case in some) and os.geteuid() != 0:
        print("hosts: skipped; to emulate them needs root", flush=True)
        some = [case for case in some if case.group != "hosts"]
    base = {"messages"} if any(case.group == "codecs" for case in some) else set()
    return [case for case in cases if case in some or case.name in base]


# What is made of the results.


def beside_others(case: Case, results: dict[str, list[Round]]) -> Record:
    """Return the record of a case.

    Its ratios are to copies in the same process, and to messages in the same round.

    Args:
        case: Which.
        results: Of all cases.
    """
    rounds = [
        {**each, "over_memcpy": each["median_ms"] / statistics.median(each["memcpy_ms"])}
        if each.get("memcpy_ms") and "failed" not in each
        else each
        for each in results[case.name]
    ]
    base = results.get("messages", [])
    if case.group in ("exchange", "codecs") and base and rounds[0]["bytes"] == base[0]["bytes"]:
        ratio = partial(compared, rounds, base, "over_messages")
        rounds = ratio(lambda one, other: one["median_ms"] / other["median_ms"])
    variables = {"group": case.group, "case": case.name, "workers": 1, "servers": 1, "hosts": 1}
    variables |= {"vector_MB": rounds[0].get("bytes", 0) / 1e6, **case.variables}
    variables["oversubscribed"] = case.ranks > cores()
    measures = [{k: v for k, v in each.items() if k not in GIVEN} for each in rounds]
    return record_of(variables, measures, lists=("times_ms", "memcpy_ms", "server_MB"))


def measure(arguments: Arguments) -> Report:
    """Measure the cases asked for."""

    def told(number: int, name: str, result: Round) -> None:
        shown = f"{result['median_ms']:.1f} ms" if "median_ms" in result else result
        say(f"round {number + 1} of {arguments.rounds}: {name}: {shown}")

    with scratch() as folder:
        if arguments.ps_lite:
            ps_lite.build(arguments.ps_lite, folder)
        tree = folder if arguments.ps_lite else None
        cases = chosen(list(plan(arguments, tree)), arguments.cases)
        runs = {case.name: case.measure for case in cases}
        results = in_turn(runs, arguments.rounds, tell=told)
    records = [beside_others(case, results) for case in cases]
    tables = [table_of(group, some, "case", FIELDS[group]) for group, some in by_group(records)]
    return Report(records, "\n".join([*tables, FOOTNOTE]))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--cases", type=words, default=",".join(FIELDS), help="groups, or cases of the table")
    add("--rounds", type=count, default=2, help="of processes")
    add("--repeats", type=count, default=6, help="timed in each process")
    add("--timeout", type=float, default=120, help="seconds for each process")
    add("--ps-lite", type=Path, help="folder with a checkout of ps-lite, to build")
    add("--mbits", type=float, default=1000, help="of the emulated hosts' links")
    add("--host-mb", type=float, default=20, help="of parameters on these hosts")


QUICK = {"cases": "exchange,encrypted,hosts_1", "rounds": 1, "repeats": 2, "host_mb": 4}
BENCHMARK = Benchmark("ps", __doc__, measure, options=options, bars=BARS, quick=QUICK)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        encrypted = partial(ps_peers.ours, key=KEY, shared_memory=False)
        own: dict[str, Any] = {"ours": ps_peers.ours, "coded": coded, "encrypted": encrypted}
        ps_peers.child(own | {"overlap": overlap, "elsewhere": elsewhere}, *sys.argv[2:])
    else:
        BENCHMARK.run()
