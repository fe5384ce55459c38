"""Saving and restoring a train state, beside others and beside plain writing and reading.

    python -m benchmarks.checkpoint --folder /scratch --out results

The state is that of a model trained by Adam: parameters and two moments, in tensors of about 4 MB.
For each size the rounds go over all cases in turn, in one process, so that whatever else the
machine and its disk do falls on all alike.

- blocked: how long the training loop waits: until save returns
- durable: until all is on disk, by fsync, whatever happens to the machine then
- restore: until the tensors that training goes on with hold what was saved; the files are in the
  page cache (warm), or were dropped from it (cold)

The cases:

- hpctrain: ``CheckpointStore``, which copies, then hashes (SHA-256), writes and renames in a thread
- torch: ``torch.save``, fsync and rename; ``torch.load(mmap=True, weights_only=True)``
- dcp: ``torch.distributed.checkpoint.save`` and ``load``; dcp_async: ``async_save``
- safetensors: ``save_file``, fsync; ``load_file``
- write: write(2) of the bytes and fsync; readinto: the limit of this disk

Shown are the median over rounds, the least and the largest. What is restored is compared, each
time.

Prints a table, and whether hpctrain is on disk as soon as the fastest of the others, and restores
as fast as safetensors; ratios are of the same round. --out gets checkpoint.json, checkpoint.csv and
plots (PNG, SVG).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed import checkpoint as dcp

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, numbers, words_of
from benchmarks.harness.processes import scratch
from benchmarks.harness.rounds import Record, compared, in_turn, spread_of
from benchmarks.harness.rounds import record_of as summed
from benchmarks.harness.tables import by_group, say, table_of
from hpctrain.checkpoint.store import CheckpointStore, load_verified
from hpctrain.errors import Error
from hpctrain.files import sync

SIZES = (16, 64, 256)  # MB
TENSOR = 2**20  # float32 values of the largest
BLOCK = 2**24  # bytes that are read at once
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


def hpctrain_save(state: State, folder: Path) -> Callable[[], object]:
    """As the trainer does."""
    store = CheckpointStore(folder, keep=1)
    store.save(1, state)
    return store.wait


def hpctrain_restore(state: State, folder: Path) -> None:
    """As the trainer does: checked, byte for byte."""
    put(state, load_verified(CheckpointStore(folder, keep=1).path(1)))


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
        if key.startswith("cold"):
            forget(folder)
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
        runs = {case: partial(one_round, CASES[case], state, live, folder / case) for case in cases}
        times = beside_others(in_turn(runs, rounds, warm_up=1))
        say(f"{size} MB: {rounds} rounds")
        records += [record_of(case, size, nbytes(state), times[case]) for case in cases]
    return records


def beside_others(times: dict[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """Return rounds of all cases, with hpctrain's ratios to others in the same round."""
    ours = times.get("hpctrain", [])
    others = [rounds for case, rounds in times.items() if case != "hpctrain"]
    if ours and others:
        fastest = [
            min(same, key=lambda each: each["durable_ms"]) for same in zip(*others, strict=True)
        ]
        ours = compared(ours, fastest, "durable_speed_over_fastest",
                        lambda one, other: other["durable_ms"] / one["durable_ms"])  # fmt: skip
    if ours and "safetensors" in times:
        ours = compared(
            ours, times["safetensors"], "warm_restore_speed_over_safetensors",
            lambda one, other: other["warm_restore_ms"] / one["warm_restore_ms"],
        )  # fmt: skip
    return {**times, "hpctrain": ours} if ours else times


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
    at_least("durable_speed_over_fastest", 1.0, case="hpctrain", state_MB=max(SIZES)),
    at_least("warm_restore_speed_over_safetensors", 0.9, case="hpctrain", state_MB=SIZES),
)
QUICK = {"mb": "16", "rounds": 2}
BENCHMARK = Benchmark("checkpoint", __doc__, measure, options=options, bars=BARS, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
