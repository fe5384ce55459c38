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

import argparse
import contextlib
import ctypes
import itertools
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed import checkpoint as dcp

from benchmarks.output import plots, spread, spread_of, table, write
from hpctrain.checkpoint.store import CheckpointStore
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
    """Of all tensors."""
    return sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())


def put(state: State, found: Any) -> None:
    """Copy what was read into the tensors that training goes on with."""
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            tensor.copy_(found[kind][name])


def flat(state: State) -> dict[str, torch.Tensor]:
    """All tensors by one name each."""
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
    """Its writer calls fsync by itself."""
    dcp.save(state, checkpoint_id=folder)
    return lambda: None


def dcp_async_save(state: State, folder: Path) -> Callable[[], object]:
    """Copies, then writes in a thread."""
    return dcp.async_save(state, checkpoint_id=folder).result


def dcp_restore(state: State, folder: Path) -> None:
    """In place."""
    dcp.load(state, checkpoint_id=folder)


def safetensors_save(state: State, folder: Path) -> Callable[[], object]:
    """One file."""
    save_file(flat(state), folder / "state.safetensors")
    settle(folder / "state.safetensors")
    return lambda: None


def safetensors_restore(state: State, folder: Path) -> None:
    """Mapped."""
    found = load_file(folder / "state.safetensors")
    for name, tensor in flat(state).items():
        tensor.copy_(found[name])


def plain_save(state: State, folder: Path) -> Callable[[], object]:
    """Nothing but bytes."""
    with (folder / "state").open("wb", buffering=0) as file:
        for tensor in flat(state).values():
            view = memoryview(tensor.numpy()).cast("B")
            while view:
                view = view[file.write(view) :]
    settle(folder / "state")
    return lambda: None


def plain_restore(state: State, folder: Path) -> None:
    """In place."""
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


def memcpy_ms(state: State) -> float:
    """Copy as many bytes as a state has, once, to memory that was written to."""
    size = nbytes(state)
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    began = time.perf_counter()
    ctypes.memmove(target.ctypes.data, source.ctypes.data, size)
    return 1e3 * (time.perf_counter() - began)


def forget(folder: Path) -> None:
    """Have the page cache drop a folder's files, which are on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def one_round(case: Case, state: State, live: State, folder: Path) -> dict[str, float]:
    """Milliseconds of saving, and of restoring into another state.

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


def record_of(case: str, size: int, moved: int, rounds: Sequence[dict[str, float]]) -> Any:
    """Of a case and a size: times, and from them rates."""
    record: dict[str, Any] = {"case": case, "state_MB": size, "rounds": len(rounds)}
    for key in rounds[0]:
        record |= spread_of(key, [each[key] for each in rounds])
    for key in ("durable", "warm_restore", "cold_restore"):
        rates = [moved / each[f"{key}_ms"] / 1e6 for each in rounds]
        record |= spread_of(f"{key}_GBps", rates)
    return record


def measure(folder: Path, cases: Sequence[str], sizes: Sequence[int], rounds: int) -> list[Any]:
    """All cases and sizes."""
    records = []
    for size in sizes:
        state, live = state_of(size, 0), state_of(size, 1)
        times: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        copies: list[float] = []
        for number in range(1 + rounds):  # the first warms up
            copies.append(memcpy_ms(state))
            for case in cases:
                times[case].append(one_round(CASES[case], state, live, folder / case))
            print(f"{size} MB: round {number} of {rounds}", file=sys.stderr, flush=True)
        for case in cases:
            record = record_of(case, size, nbytes(state), times[case][1:])
            record["first_blocked_ms"] = times[case][0]["blocked_ms"]
            records.append(record | spread_of("memcpy_ms", copies[1:]))
    return records


def show(records: Sequence[dict[str, Any]]) -> str:
    """A table for each size."""
    fields = ("blocked_ms", "durable_ms", "durable_GBps", "warm_restore_ms", "cold_restore_ms")
    parts = []
    for size in dict.fromkeys(record["state_MB"] for record in records):
        rows = [[f"{size} MB", *(field.replace("_", " ") for field in fields)]]
        for record in (each for each in records if each["state_MB"] == size):
            rows.append([record["case"], *(spread(record, field) for field in fields)])
        parts.append(table(rows))
    return "\n\n".join(parts)


def verdicts(records: Sequence[dict[str, Any]]) -> list[str]:
    """What was to hold, and whether it did; nothing where a case is missing."""
    size = max(record["state_MB"] for record in records)
    by = {record["case"]: record for record in records if record["state_MB"] == size}
    if "hpctrain" not in by or "safetensors" not in by:
        return []
    ours = by.pop("hpctrain")
    fastest = min(by, key=lambda case: by[case]["durable_ms_min"])
    ratios = [
        (
            f"on disk, speed by the fastest's ({fastest})",
            by[fastest]["durable_ms_min"] / ours["durable_ms_min"],
            1.0,
        ),
        (
            "warm restore, speed by safetensors'",
            by["safetensors"]["warm_restore_ms_min"] / ours["warm_restore_ms_min"],
            0.9,
        ),
        ("memcpy by blocked", ours["memcpy_ms_min"] / ours["blocked_ms_min"], 1.0),
    ]
    return [
        f"{'held' if ratio >= bar else 'fell short'}: {size} MB: {what} {ratio:.2f}, "
        f"to be {bar:g} at least"
        for what, ratio, bar in ratios
    ]


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """What async_save asks for."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=lambda text: text.split(","), default=",".join(CASES))
    parser.add_argument(
        "--mb", type=lambda text: [int(size) for size in text.split(",")], default=list(SIZES),
        help="sizes of the state",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--out", type=Path, help="folder for JSON, CSV and plots")
    options = parser.parse_args()
    if unknown := {*options.cases} - {*CASES}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    if options.rounds < 1 or min(options.mb) < 1:
        parser.error("a round, and a MB, at least")
    warnings.filterwarnings("ignore", module="torch")  # that dcp has but one process
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, world_of_one():
            records = measure(Path(folder), options.cases, options.mb, options.rounds)
    except OSError as error:
        parser.error(str(error))
    print(show(records), *verdicts(records), sep="\n")
    if options.out is not None:
        write(options.out, "checkpoint", records)
        plots(options.out, "checkpoint")


if __name__ == "__main__":
    main()
