"""Copies of shards on node-local storage: made once a node, checked, as many as there is room for.

Where the copies are is a function of the index, so a job that is requeued on the same node, or two
jobs on one, find them there. A copy appears under its name only when it is whole and its checksum
right; a reader that does not find one reads the original.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hpctrain.data.index import INDEX, ShardEntry, read_index
from hpctrain.data.shards import staged_name
from hpctrain.errors import Error
from hpctrain.progress import progress

COPY_BYTES = 8 * 2**20
# Left free on the storage, and of the memory that a job may use where the storage is memory.
RESERVE = 0.05
KEEP = "keep"
HOLDER = "copying"


@dataclass(frozen=True)
class Staged:
    """What is on node-local storage.

    Attributes:
        path: The folder of copies.
        shards: Copies there are.
        of: Shards of the set.
        bytes: Of the copies.
        of_bytes: Of the set.
        copied: Copies that this call made.
    """

    path: Path
    shards: int
    of: int
    bytes: int
    of_bytes: int
    copied: int

    def __str__(self) -> str:
        part = f"{self.shards} of {self.of} shards, {self.bytes / 1e9:.2f} GB, in {self.path}"
        if self.shards < self.of:
            rest = self.of_bytes - self.bytes
            return f"{part}; no room for {rest / 1e9:.2f} GB, which are read where they are"
        return part


def folder_of(shard_set: Path, stage_dir: Path) -> Path:
    """Where a set's copies are."""
    try:
        digest = hashlib.sha256((shard_set / INDEX).read_bytes()).hexdigest()
    except OSError:
        digest = ""  # whoever opens the set says what is wrong with it
    return stage_dir / f"hpctrain-{digest[:16]}"


def stage(
    shard_set: Path, stage_dir: Path, *, keep: bool = False, timeout_seconds: float = 600.0
) -> Staged:
    """Copy a set's shards to node-local storage.

    Every process of a node may call this: one copies, the others return when it is done.

    Args:
        shard_set: The set's folder.
        stage_dir: On storage of this node alone, such as ``$SLURM_TMPDIR`` or ``/dev/shm``.
        keep: The copies are to outlive the run that uses them.
        timeout_seconds: Longest time without progress of the process that copies.

    Raises:
        Error: The storage cannot be written, a shard is corrupt, or the process that copies makes
            no progress.
    """
    index = read_index(shard_set)
    folder = folder_of(shard_set, stage_dir)
    shards = list({shard.path: shard for _, _, shard in index.shards()}.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, timeout_seconds):
            for left_over in folder.glob("*.part"):
                left_over.unlink()
            if keep:
                (folder / KEEP).touch()
            copied = _copy_all(shard_set, folder, shards)
    except OSError as error:
        raise Error(
            f"cannot stage to {folder}: {error.strerror or error}.",
            hint="may you write there, and is there room?",
        ) from error
    there = [shard for shard in shards if (folder / staged_name(shard)).exists()]
    sizes = sum(shard.bytes for shard in there), sum(shard.bytes for shard in shards)
    return Staged(folder, len(there), len(shards), *sizes, copied)


def unstage(shard_set: Path, stage_dir: Path, *, kept: bool = False) -> None:
    """Remove a set's copies from node-local storage.

    Args:
        shard_set: The set's folder.
        stage_dir: As it was staged to.
        kept: Also such as were to be kept.
    """
    folder = folder_of(shard_set, stage_dir)
    if kept or not (folder / KEEP).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _copy_all(shard_set: Path, folder: Path, shards: list[ShardEntry]) -> int:
    missing = [shard for shard in shards if not (folder / staged_name(shard)).exists()]
    copied = 0
    for shard in progress(missing, what=f"staging to {folder}", total=len(missing)):
        if shard.bytes > room(folder):
            continue  # a smaller one may still fit
        _copy(shard_set / shard.path, folder / staged_name(shard), shard)
        (folder / HOLDER).touch()
        copied += 1
    return copied


def _copy(source: Path, target: Path, shard: ShardEntry) -> None:
    part = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reader, part.open("wb") as writer:
            while block := reader.read(COPY_BYTES):
                digest.update(block)
                writer.write(block)
                os.utime(target.parent / HOLDER)
            size = writer.tell()
        if size != shard.bytes or shard.sha256 not in ("", digest.hexdigest()):
            raise Error(
                f"shard {source} differs from the index's checksum.",
                hint="`hpctrain data verify` tells what is wrong; import the data again.",
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def room(folder: Path) -> int:
    """Bytes that may be written there, some being left for others."""
    usage = shutil.disk_usage(folder)
    free = int(usage.free - RESERVE * usage.total)
    if _is_memory(folder):
        free = min(free, _memory_left())
    return max(0, free)


def _is_memory(folder: Path) -> bool:
    """Whether files there are in memory, and count as a job's own."""
    found = ("", "")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        inside = folder.resolve().is_relative_to(place)
        if inside and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1] in ("tmpfs", "ramfs")


def _memory_left() -> int:
    """Bytes of memory this job may still use: by its control group, or else by the machine."""
    limits = []
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        with contextlib.suppress(OSError, ValueError):
            whole = int(Path(limit).read_text())
            limits.append(int((1 - RESERVE) * whole) - int(Path(used).read_text()))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        limits.append(int((1 - RESERVE) * 1024 * int(available.split()[1])))
    return min(limits, default=2**62)


@contextlib.contextmanager
def _alone(folder: Path, timeout_seconds: float) -> Iterator[None]:
    """Be the only process of this node that copies; wait for another as long as it gets on."""
    holder = folder / HOLDER
    lock = FileLock(folder / "lock")
    began = time.time()
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout as error:
            moved = began
            with contextlib.suppress(OSError):
                moved = max(began, holder.stat().st_mtime)
            if time.time() - moved > timeout_seconds:
                who = "another process"
                with contextlib.suppress(OSError):
                    who = holder.read_text(encoding="utf-8") or who
                raise Error(
                    f"{who} is staging to {folder}, and has got no further for "
                    f"{timeout_seconds:g} s.",
                    hint="does a file system hang? Else end that process.",
                ) from error
    try:
        holder.write_text(f"process {os.getpid()} on {os.uname().nodename}", encoding="utf-8")
        yield
        holder.unlink(missing_ok=True)
    finally:
        lock.release()
