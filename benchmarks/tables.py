"""Rows of embedding tables pulled, updated and pushed a second, beside a table in one process.

    python -m benchmarks.tables --out results

Each step of the one worker takes a batch of bags whose ids follow Zipf's law, brings their rows,
adds them up, and updates them by Adagrad:

- local: ``nn.EmbeddingBag(sparse=True)`` and ``torch.optim.Adagrad``, the limit: rows are in the
  worker's memory, and known by their number.
- table: ``hpctrain.Table`` in one process, with hashed ids.
- servers N: the same table on N servers of ``--strategy ps``, through shared memory.

Rounds go over all cases in turn; each case is a process, or several, of its own. A look-up is one
id of one bag; rows are the distinct ones of a batch. Shown are the median over rounds, the least
and the largest. ``*``: more ranks than cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, numbers
from benchmarks.harness.processes import end_with_parent, module, on_ranks, why_failed
from benchmarks.harness.rounds import Record, Round, compared, in_turn, record_of
from benchmarks.harness.tables import FOOTNOTE, table_of, tell
from hpctrain import Table, init, strategy
from hpctrain.config import PsConfig
from hpctrain.process import cores
from hpctrain.world.launcher import detect

CHILD = module("tables", "--child")
ROWS = 200_000
WARM_UP = 5
TIMEOUT_SECONDS = 600.0


def drawn(bags: int, fields: int, skew: float, steps: int) -> list[torch.Tensor]:
    """Return the ids of each step, of shape (bags, fields), by Zipf's law.

    Args:
        bags: Of a batch.
        fields: Ids of a bag.
        skew: The law's exponent; 0: all ids alike.
        steps: How many batches.
    """
    weights = torch.arange(1, ROWS + 1, dtype=torch.float64).pow(-skew)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(ROWS, generator=random)  # frequent ids are no neighbours
    ends = weights.cumsum(0) / weights.sum()
    uniform = torch.rand(steps, bags * fields, generator=random, dtype=torch.float64)
    places = torch.searchsorted(ends, uniform).clamp_(max=ROWS - 1)
    return [order[each].view(bags, fields) for each in places]


def timed(step: Callable[[torch.Tensor], object], batches: Sequence[torch.Tensor]) -> Round:
    """Return what a second brings, of the steps after the first few."""
    for ids in batches[:WARM_UP]:
        step(ids)
    began = time.perf_counter()
    for ids in batches[WARM_UP:]:
        step(ids)
    seconds = time.perf_counter() - began
    rows = sum(len(ids.unique()) for ids in batches[WARM_UP:])
    lookups = sum(ids.numel() for ids in batches[WARM_UP:])
    return {
        "lookups_per_second": lookups / seconds,
        "rows_per_second": rows / seconds,
        "step_ms": 1e3 * seconds / (len(batches) - WARM_UP),
    }


def local(dim: int, batches: Sequence[torch.Tensor]) -> Round:
    """Measure torch's own table."""
    model = nn.EmbeddingBag(ROWS, dim, mode="sum", sparse=True)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(ids).sum().backward()
        optimizer.step()

    return timed(step, batches)


def tabled(dim: int, servers: int, batches: Sequence[torch.Tensor]) -> Round | None:
    """Measure hpctrain's, here or on servers; None on a server."""
    torch.manual_seed(0)
    model = nn.Sequential(Table("rows", dim, hashed=True, optimizer="adagrad"), nn.Linear(dim, 1))
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    world = init()
    config = PsConfig(servers=servers) if servers else None
    how = strategy("ps" if servers else "single", world, config=config)
    if how.serves:
        how.serve()
        return None
    optimizer = how.wrap(model, inner)

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(ids).sum().backward()
        optimizer.step()

    found = timed(step, batches)
    optimizer.finish()
    world.comm.close()
    return found


def child(arguments: Arguments) -> None:
    """Measure one case, in a process started for it."""
    end_with_parent()
    torch.set_num_threads(1)
    batches = drawn(arguments.bags, arguments.fields, arguments.skew, arguments.steps + WARM_UP)
    servers = detect().size - 1
    if arguments.child == "local":
        tell(local(arguments.dim, batches))
    elif (found := tabled(arguments.dim, servers, batches)) is not None:
        tell(found)


def once(case: str, servers: int, arguments: Arguments) -> Round:
    """Run a case once."""
    sizes = ("dim", "bags", "fields", "skew", "steps")
    words = [word for name in sizes for word in (f"--{name}", str(getattr(arguments, name)))]
    command = [*CHILD, case.split()[0], *words]
    start = on_ranks(1 + servers)
    done = start(command, TIMEOUT_SECONDS)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": why_failed(done)}
    found: Round = json.loads(lines[-1])
    return found


def measure(arguments: Arguments) -> Report | None:
    """Run all cases in turn."""
    if arguments.child:
        child(arguments)
        return None
    cases = {"local": 0, "table": 0, **{f"servers {n}": n for n in arguments.servers}}
    runs = {name: partial(once, name, n, arguments) for name, n in cases.items()}
    found = in_turn(runs, arguments.rounds, turn_back=True)
    records: list[Record] = []
    for name, rounds in found.items():
        rounds = compared(
            rounds,
            found["local"],
            "over_local",
            lambda mine, other: mine["lookups_per_second"] / other["lookups_per_second"],
        )
        variables: dict[str, Any] = {
            "case": name, "dim": arguments.dim, "bags": arguments.bags,
            "fields": arguments.fields, "skew": arguments.skew,
            "oversubscribed": 1 + cases[name] > cores(),
        }  # fmt: skip
        records.append(record_of(variables, rounds))
    columns = ["lookups_per_second", "rows_per_second", "step_ms", "over_local"]
    return Report(records, table_of("case", records, "case", columns) + f"\n{FOOTNOTE}")


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--servers", type=numbers(int), default=[1, 2], help="on how many, with commas")
    add("--dim", type=count, default=32, help="values of a row")
    add("--bags", type=count, default=512, help="of a batch")
    add("--fields", type=count, default=26, help="ids of a bag")
    add("--skew", type=float, default=1.1, help="exponent of Zipf's law")
    add("--steps", type=count, default=100, help="that count, in a round")
    add("--rounds", type=count, default=3)
    add("--child", help=argparse.SUPPRESS)


BARS = (at_least("over_local", 0.5, case=("servers 1", "servers 2")),)
QUICK = {"steps": 10, "rounds": 1, "servers": [1]}
BENCHMARK = Benchmark("tables", __doc__, measure, options=options, bars=BARS, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
