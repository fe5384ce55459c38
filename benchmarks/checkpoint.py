"""Saving and restoring a train state, beside others and beside plain writing and reading.

    python -m benchmarks.checkpoint --folder /scratch --out results

The state is that of a model trained by Adam: parameters and two moments, in tensors of about 4 MB.
For each size the rounds go over all cases in turn, in one process, so that whatever else the
machine and its disk do falls on all alike.

- blocked: how long the training loop waits: until save returns. hpctrain keeps the memory of its
  copy, so its first save, which has the system find that, is the warm-up's (first_blocked_ms)
- durable: until all is on disk, by fsync, whatever happens to the machine then
- restore: until the tensors that training goes on with hold what was saved, and hpctrain has
  compared all checksums; the files are in the page cache (warm), or were dropped from it (cold)
- memcpy: copying the state's bytes once, by one thread, to memory that was written to before

The cases:

- hpctrain: ``CheckpointStore``, which copies, then hashes (XXH3-128), writes past the page cache
  and renames in threads; reads into place, and compares checksums, in threads
- torch: ``torch.save``, fsync and rename; ``torch.load(mmap=True, weights_only=True)``
- dcp: ``torch.distributed.checkpoint.save`` and ``load``; dcp_async: ``async_save``
- safetensors: ``save_file``, fsync; ``load_file``
- write: write(2) of the bytes and fsync; readinto: the limit of this disk

Shown are the median over rounds, the least and the largest. What is restored is compared, each
time.

What is to hold in each run of the largest state: hpctrain is on disk at least as soon as the
fastest of all others, restores at 0.9 of safetensors' speed or more with the files in the page
cache, and blocks for no longer than one memcpy. By the best round of each case, as what a round
takes longer for is the machine's.

Prints a table and what held; --out gets checkpoint.json, checkpoint.csv and plots (PNG, SVG).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed import checkpoint as dcp

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, numbers, words_of
from benchmarks.harness.processes import scratch
from benchmarks.harness.rounds import Record, Round, in_turn, spread_of
from benchmarks.harness.rounds import record_of as summed
from benchmarks.harness.tables import by_group, say, table_of
from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.errors import Error
from hpctrain.files import sync

SIZES = (16, 64, 256)  # MB
TENSOR = 2**20  # float32 values of the largest
BLOCK = 2**24  # bytes that are read at once
STEPS = itertools.count(1)
State = dict[str, dict[str, torch.Tensor]]


class Case(NamedTuple):
    """A way to save and restore.

    Attributes:
        save: Begin to save a state in a folder; what it returns waits until that is on disk.
        restore: Put what is in the folder into a state's tensors.
    """

    save: Callable[[State, Path], Callable[[], object]]
    restore: Callable[[State, Path], object]


def state_of(megabytes: int, seed: int) -> State:
    """Parameters and their moments, so many bytes in all but for a tensor's rest."""
    draws = torch.Generator().manual_seed(seed)
    shapes = [TENSOR] * max(1, megabytes * 250_000 // (3 * TENSOR))
    shapes[-1] += megabytes * 250_000 // 3 - sum(shapes)
    kinds = ("model", "exp_avg", "exp_avg_sq")
    return {
        kind: {
            f"layer{n}.weight": torch.randn(size, generator=draws) for n, size in enumerate(shapes)
        }
        for kind in kinds
    }


def nbytes(state: State) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())


def put(state: State, found: Any) -> None:
    """Copy what was read into the tensors that training goes on with."""
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            tensor.copy_(found[kind][name])


def flat(state: State) -> dict[str, torch.Tensor]:
    """Return all tensors by one name each."""
    return {f"{kind}.{name}": t for kind, tensors in state.items() for name, t in tensors.items()}


def settle(file: Path) -> None:
    """Have a file on disk, and its name in its folder."""
    sync(file)
    sync(file.parent)


STORE = CheckpointStore(Path(), keep=1)
"""A run has one, and so it keeps the memory of its copies."""


def hpctrain_save(state: State, folder: Path) -> Callable[[], object]:
    """As the trainer does."""
    STORE.folder = folder
    STORE.save(next(STEPS), state)
    return STORE.wait


def hpctrain_restore(state: State, folder: Path) -> None:
    """As the trainer does: into place, checked, byte for byte."""
    STORE.folder = folder
    found = STORE.newest(print, state)
    for name, tensor in flat(state).items():
        assert flat(found)[name].data_ptr() == tensor.data_ptr(), f"{name} was read elsewhere"


def torch_save(state: State, folder: Path) -> Callable[[], object]:
    """Whole or not at all, too."""
    torch.save(state, folder / ".state.pt")
    sync(folder / ".state.pt")
    (folder / ".state.pt").rename(folder / "state.pt")
    sync(folder)
    return lambda: None


def torch_restore(state: State, folder: Path) -> None:
    """Mapped, which spares a copy."""
    put(state, torch.load(folder / "state.pt", mmap=True, weights_only=True))


def dcp_save(state: State, folder: Path) -> Callable[[], object]:
    """Save by torch.distributed.checkpoint, whose writer calls fsync by itself."""
    dcp.save(state, checkpoint_id=folder)
    return lambda: None


def dcp_async_save(state: State, folder: Path) -> Callable[[], object]:
    """Copies, then writes in a thread."""
    return dcp.async_save(state, checkpoint_id=folder).result


def dcp_restore(state: State, folder: Path) -> None:
    """Restore by torch.distributed.checkpoint, in place."""
    dcp.load(state, checkpoint_id=folder)


def safetensors_save(state: State, folder: Path) -> Callable[[], object]:
    """Save by safetensors, to one file."""
    save_file(flat(state), folder / "state.safetensors")
    settle(folder / "state.safetensors")
    return lambda: None


def safetensors_restore(state: State, folder: Path) -> None:
    """Restore by safetensors, which maps the file."""
    found = load_file(folder / "state.safetensors")
    for name, tensor in flat(state).items():
        tensor.copy_(found[name])


def plain_save(state: State, folder: Path) -> Callable[[], object]:
    """Write nothing but the bytes."""
    with (folder / "state").open("wb", buffering=0) as file:
        for tensor in flat(state).values():
            view = memoryview(tensor.numpy()).cast("B")
            while view:
                view = view[file.write(view) :]
    settle(folder / "state")
    return lambda: None


def plain_restore(state: State, folder: Path) -> None:
    """Read the bytes into place."""
    with (folder / "state").open("rb", buffering=0) as file:
        for tensor in flat(state).values():
            view = memoryview(tensor.numpy()).cast("B")
            while view:
                view = view[file.readinto(view[:BLOCK]) :]


CASES = {
    "hpctrain": Case(hpctrain_save, hpctrain_restore),
    "torch": Case(torch_save, torch_restore),
    "dcp": Case(dcp_save, dcp_restore),
    "dcp_async": Case(dcp_async_save, dcp_restore),
    "safetensors": Case(safetensors_save, safetensors_restore),
    "write": Case(plain_save, plain_restore),
}


def remember(folder: Path) -> None:
    """Have the page cache hold a folder's files, however they were written."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(BLOCK):
                    pass


def copied(state: State) -> Round:
    """Copy as many bytes as a state has, once, to memory that was written to."""
    size = nbytes(state)
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    began = time.perf_counter()
    ctypes.memmove(target.ctypes.data, source.ctypes.data, size)
    return {"memcpy_ms": 1e3 * (time.perf_counter() - began)}


def forget(folder: Path) -> None:
    """Have the page cache drop a folder's files, which are on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def one_round(case: Case, state: State, live: State, folder: Path) -> dict[str, float]:
    """Return the milliseconds of saving, and of restoring into another state.

    Raises:
        AssertionError: Something else was restored.
    """
    folder.mkdir()
    times = {}
    began = time.perf_counter()
    wait = case.save(state, folder)
    times["blocked_ms"] = time.perf_counter() - began
    wait()
    times["durable_ms"] = time.perf_counter() - began
    for key in ("warm_restore_ms", "cold_restore_ms"):
        for tensor in flat(live).values():
            tensor.zero_()
        (forget if key.startswith("cold") else remember)(folder)
        began = time.perf_counter()
        case.restore(live, folder)
        times[key] = time.perf_counter() - began
        for name, tensor in flat(live).items():
            assert torch.equal(tensor, flat(state)[name]), f"{name} was not restored"
    shutil.rmtree(folder)
    return {key: 1e3 * seconds for key, seconds in times.items()}


def record_of(case: str, size: int, moved: int, rounds: Sequence[dict[str, float]]) -> Record:
    """Return the record of a case and a size: times, and from them rates.

    Args:
        case: Its name.
        size: Of the state, in MB.
        moved: The same, in bytes.
        rounds: Times in milliseconds, and ratios.
    """
    record = summed({"case": case, "state_MB": size}, rounds)
    for key in ("durable", "warm_restore", "cold_restore"):
        rates = [moved / each[f"{key}_ms"] / 1e6 for each in rounds]
        record |= spread_of(f"{key}_GBps", rates)
    return record


def measured(folder: Path, cases: Sequence[str], sizes: Sequence[int], rounds: int) -> list[Record]:
    """Return a record for each case and size.

    Args:
        folder: On the disk to be measured.
        cases: Of ``CASES``.
        sizes: Of the state, in MB.
        rounds: That count; one more warms up.
    """
    records = []
    for size in sizes:
        state, live = state_of(size, 0), state_of(size, 1)
        runs: dict[str, Callable[[], Round]] = {"memcpy": partial(copied, state)}
        for case in cases:
            runs[case] = partial(one_round, CASES[case], state, live, folder / case)
        first, times = in_turn(runs, 1), in_turn(runs, rounds)  # the first warms up
        say(f"{size} MB: {rounds} rounds")
        copies = spread_of("memcpy_ms", [each["memcpy_ms"] for each in times["memcpy"]])
        for case in cases:
            record = record_of(case, size, nbytes(state), times[case])
            record["first_blocked_ms"] = first[case][0]["blocked_ms"]
            records.append(record | copies)
    return beside_others(records)


def beside_others(records: Sequence[Record]) -> list[Record]:
    """Return the records, hpctrain's of the largest state with its ratios to others.

    They are by the best round of each case, as what a round takes longer for is the machine's.
    """
    size = max(record["state_MB"] for record in records)
    by = {record["case"]: record for record in records if record["state_MB"] == size}
    ours, ratios = by.pop("hpctrain", None), {}
    if ours is None or not by:
        return list(records)
    durable = min(each["durable_ms_min"] for each in by.values())
    ratios["durable_speed_over_fastest"] = durable / ours["durable_ms_min"]
    if "safetensors" in by:
        warm = by["safetensors"]["warm_restore_ms_min"]
        ratios["warm_restore_speed_over_safetensors"] = warm / ours["warm_restore_ms_min"]
    ratios["memcpy_over_blocked"] = ours["memcpy_ms_min"] / ours["blocked_ms_min"]
    return [{**each, **ratios} if each is ours else each for each in records]


def show(records: Sequence[Record]) -> str:
    """Return a table for each size."""
    fields = ("blocked_ms", "durable_ms", "durable_GBps", "warm_restore_ms", "cold_restore_ms")
    sizes = by_group(records, "state_MB")
    return "\n\n".join(table_of(f"{size} MB", some, "case", fields) for size, some in sizes)


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """Have a process group of one, which async_save asks for."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def measure(arguments: Arguments) -> Report:
    """Measure all cases and sizes."""
    warnings.filterwarnings("ignore", module="torch")  # that dcp has but one process
    try:
        with scratch(arguments.folder) as folder, world_of_one():
            records = measured(folder, arguments.cases, arguments.mb, arguments.rounds)
    except OSError as error:
        raise Error(f"cannot write to {arguments.folder}: {error}.") from error
    return Report(records, show(records))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--cases", type=words_of(CASES), default=",".join(CASES))
    add("--mb", type=numbers(count), default=",".join(map(str, SIZES)), help="sizes of the state")
    add("--rounds", type=count, default=4)
    add("--folder", type=Path, help="on the disk to be measured; made where it is missing")


BARS = (
    at_least("durable_speed_over_fastest", 1.0, case="hpctrain"),
    at_least("warm_restore_speed_over_safetensors", 0.9, case="hpctrain"),
    at_least("memcpy_over_blocked", 1.0, case="hpctrain"),
)
QUICK = {"mb": "16", "rounds": 2}
BENCHMARK = Benchmark("checkpoint", __doc__, measure, options=options, bars=BARS, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
