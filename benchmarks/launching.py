"""Benchmarks that train, by the ranks of a launcher: their options, and how ranks are started.

Such a benchmark is used in two ways, and both are one:

- within ranks that a launcher started (``mpirun -np 4 python -m benchmarks.scaling``) it measures
  that number of ranks. All cases run in the same processes, in turn; what each gave is a line that
  is appended to a file;
- started alone it starts that very line for every number of ranks, round after round, so that
  whatever else the machine does falls on all numbers alike, and then reports all lines.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, numbers, words
from benchmarks.harness.processes import module, scratch
from benchmarks.harness.tables import by_group, say
from benchmarks.training import STRATEGIES, TASKS, Line, case_of, known
from hpctrain.errors import Error
from hpctrain.process import mpirun, run
from hpctrain.world.launcher import Launch, detect

Measure = Callable[[Arguments, Launch, int], Iterator[Line | None]]
"""Measures a round, on every rank; rank 0 yields lines."""


def options_of(add: Add, *, tasks: Sequence[str], ranks: str, what: str) -> None:
    """Add the options that all benchmarks have that train.

    Args:
        add: Adds an option to the benchmark's parser.
        tasks: Those it trains unless said otherwise; cifar10 besides where there are --data.
        ranks: Numbers of ranks.
        what: What differs from round to round: ``round`` or ``seed``.
    """
    add("--tasks", type=words, metavar="LIST",
        help=f"of {', '.join(TASKS)}, or what `hpctrain train` takes; default: {','.join(tasks)} "
        "and, with --data, cifar10")  # fmt: skip
    add("--strategies", type=words, default=",".join(STRATEGIES), metavar="LIST",
        help="default: %(default)s")  # fmt: skip
    add("--data", type=Path, help="shard set for cifar10 and tasks of your own")
    add("--batch", type=count, help="samples of a step of one rank alone; default: by task")
    add("--servers", type=count, default=0,
        help="ranks that only serve, with ps; default: none, all workers serve")  # fmt: skip
    add("--emulate", type=float, metavar="MS",
        help="EMULATED COMPUTE: sleep so long for each sample, besides computing it")  # fmt: skip
    add("--threads", type=count, default=os.environ.get("OMP_NUM_THREADS", "1"),
        help="of each rank, at any number of ranks; default: OMP_NUM_THREADS, or 1")  # fmt: skip
    add("--ranks", type=numbers(count), default=ranks, metavar="LIST", help="default: %(default)s")
    add(f"--{what}s", dest="rounds", type=count, default=3, help="default: %(default)s")
    add(f"--first-{what}", dest="first", type=int, default=0, metavar="N", help="default: 0")
    add("--launcher", metavar="WORDS",
        help='starts ranks, their number following: "srun --mpi=pmix -n"')  # fmt: skip
    add("--timeout", type=count, default=600, help="seconds for a round of some ranks")
    add("--lines", type=Path, help="append what is measured to this file, and write nothing else")


def benchmark_of(
    name: str, text: str | None, *, tasks: Sequence[str], ranks: str, what: str, measure: Measure,
    summary: Callable[[Sequence[Line]], list[Line]], table: Callable[[Sequence[Line]], str],
    options: Callable[[Add], object], **more: Any,
) -> Benchmark:  # fmt: skip
    """Return a benchmark that trains.

    Args:
        name: Of its module.
        text: That module's docstring.
        tasks: Those it trains unless said otherwise; cifar10 besides where there are --data.
        ranks: Numbers of ranks.
        what: What differs from round to round: ``round`` or ``seed``.
        measure: Measures a round.
        summary: Makes records of all lines.
        table: Makes the table of a group of records.
        options: Adds its own options.
        more: Of :class:`Benchmark`.
    """

    def all_options(add: Add) -> None:
        options_of(add, tasks=tasks, ranks=ranks, what=what)
        options(add)

    def report(lines: Sequence[Line]) -> Report:
        return Report(records := summary(lines), shown(records, table))

    run = partial(start, name=name, what=what, measure=measure, report=report)
    return Benchmark(
        name, text, run, options=all_options, check=partial(check, tasks=tasks), **more
    )


def shown(records: Sequence[Line], table: Callable[[Sequence[Line]], str]) -> str:
    """Return a table for each group of records.

    Args:
        records: All of them.
        table: Makes the table of a group.
    """
    text = "\n\n".join(f"{group}\n{table(some)}" for group, some in by_group(records))
    if any(record["oversubscribed"] for record in records):
        text += "\n* more ranks, times their threads, than cores"
    return text


def check(parser: argparse.ArgumentParser, arguments: Arguments, *, tasks: Sequence[str]) -> None:
    """Refuse what cannot be, and fill in what depends on other options.

    Args:
        parser: Of the benchmark.
        arguments: To be checked.
        tasks: Those that it trains unless said otherwise.
    """
    if not arguments.ranks:
        parser.error("--ranks: give a number of ranks at least")
    if arguments.tasks is None:
        arguments.tasks = [*tasks, *(["cifar10"] if arguments.data else [])]
    for task in arguments.tasks:
        if task == "cifar10" and arguments.data is None:
            parser.error("task cifar10 needs --data, as `hpctrain data import` makes it")
        if arguments.emulate is not None and known(task).emulated is None:
            parser.error(f"--emulate: task {task} has no emulated form")
    try:
        for strategy in arguments.strategies:
            case_of(strategy, 2, 0)
    except Error as error:
        parser.error(str(error))


def start(
    arguments: Arguments,
    name: str,
    what: str,
    measure: Measure,
    report: Callable[[list[Line]], Report],
) -> Report | None:
    """Measure these ranks or, started alone, every number of ranks that was asked for.

    Args:
        arguments: Of the benchmark: what :func:`options_of` adds.
        name: Of the benchmark.
        what: What differs from round to round.
        measure: A round.
        report: Makes a report of all lines.
    """
    try:
        launch = detect()
        with scratch() as folder:
            file = arguments.lines or (arguments.out or folder) / f"{name}.jsonl"
            if launch.name == "alone" or arguments.launcher is not None:
                drive(arguments, name, what, file)
            else:
                take_part(arguments, launch, file, measure)
            if launch.rank == 0 and arguments.lines is None:
                return report(read_lines(file))
    except Error as error:
        fail(error)
    return None


def drive(arguments: Arguments, name: str, what: str, file: Path) -> None:
    """Start the ranks, round after round.

    Args:
        arguments: Of the benchmark.
        name: Of the benchmark.
        what: What differs from round to round.
        file: Gets the lines.

    Raises:
        Error: They failed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if arguments.lines is None:
        file.unlink(missing_ok=True)
    # The launcher itself ends its ranks then; the other limit is for the launcher.
    environment = {**os.environ, "MPIEXEC_TIMEOUT": str(arguments.timeout)}
    begun = time.monotonic()
    for number in range(arguments.first, arguments.first + arguments.rounds):
        for ranks in arguments.ranks:
            prefix = (
                mpirun(ranks)
                if arguments.launcher is None
                else [*shlex.split(arguments.launcher), str(ranks)]
            )
            line = [*prefix, *module(name, *_forwarded(arguments.command))]
            line += [f"--{what}s=1", f"--first-{what}={number}", f"--lines={file.resolve()}"]
            done = run(line, timeout_seconds=arguments.timeout + 60, env=environment)
            if done.returncode != 0:
                raise Error(
                    f"{ranks} ranks failed with exit code {done.returncode}: {_cause(done.stdout)}",
                    hint=f"the line was: {shlex.join(line)}",
                )
            say(f"round {number}, {ranks} ranks: {time.monotonic() - begun:.0f} s since the start")


def _forwarded(command: Sequence[str]) -> Iterator[str]:
    """Yield what the ranks get of the driver's options: they are started, and write but lines."""
    words = iter(command)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in ("--launcher", "--out"):
            yield word
        elif not equals:
            next(words, None)


def _cause(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and "component" not in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def take_part(arguments: Arguments, launch: Launch, file: Path, measure: Measure) -> None:
    """Be one of the ranks."""
    # Read by libraries when they are loaded, and by hpctrain.init().
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    for number in range(arguments.first, arguments.first + arguments.rounds):
        for line in measure(arguments, launch, number):
            if line is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")


def read_lines(file: Path) -> list[Line]:
    """Return what was measured so far.

    Raises:
        Error: It cannot be read.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise Error(f"cannot read {file}: {error}.", hint="remove it to begin anew.") from error


def latest(lines: Sequence[Line], keys: Sequence[str]) -> list[Line]:
    """Return lines without what was measured again later.

    Args:
        lines: The first ones first.
        keys: What one measurement is told from another by.
    """
    return list({tuple(line.get(key) for key in keys): line for line in lines}.values())


def fail(error: Error) -> NoReturn:
    """End this process, and by that the other ranks."""
    rank = detect().rank
    if rank:  # what is wrong on every rank is said once
        time.sleep(1.0)
    say(f"error: {error}")
    os._exit(error.exit_code)
