"""Stage copies of shards on node-local storage: once a node, checked, as many as there is room for.

Where the copies are is a function of the index and the user, so a job that is requeued on the same
node, or two jobs on one, find them there. A copy appears under its name only when it is whole and
its checksum right; a reader that does not find one reads the original.

Others can write to such storage, too: what is not this user's own is neither read nor written to,
and a copy that is found counts if it is as it was when its checksum was last seen to be right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hpctrain.data.index import INDEX, INDEX_BYTES, ShardEntry, read_index
from hpctrain.data.progress import progress
from hpctrain.data.shards import staged_name
from hpctrain.errors import Error
from hpctrain.files import is_own, open_regular, read_regular, write_text

COPY_BYTES = 8 * 2**20
# Left free on the storage, and of the memory that a job may use where the storage is memory.
RESERVE = 0.05
KEEP = "keep"
HOLDER = "copying"
CHECKED = "checked.json"
CHECKED_BYTES = 2**28
PLACES = 8
"""So many folders of others may stand where a set's copies would be."""


@dataclass(frozen=True)
class Staged:
    """The copies of a shard set on node-local storage.

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
    """Return the folder where this user's copies of a set are, or will be.

    Args:
        shard_set: The set's folder.
        stage_dir: Where it is staged to.

    Raises:
        Error: What is there is not this user's.
    """
    places = _places(shard_set, stage_dir)
    for place in places:
        if is_own(place) or not os.path.lexists(place):
            return place
    raise _taken(places)


def _places(shard_set: Path, stage_dir: Path) -> list[Path]:
    try:
        digest = hashlib.sha256(read_regular(shard_set / INDEX, INDEX_BYTES)).hexdigest()
    except OSError:
        digest = ""  # whoever opens the set says what is wrong with it
    name = f"hpctrain-{os.geteuid()}-{digest[:16]}"
    return [stage_dir / (f"{name}-{number}" if number else name) for number in range(PLACES)]


def _taken(places: list[Path]) -> Error:
    return Error(
        f"cannot stage to {places[0]}: it is not this user's own, or others can write to it.",
        hint="choose another folder, or have that one removed.",
    )


@contextlib.contextmanager
def _own_folder(shard_set: Path, stage_dir: Path) -> Iterator[tuple[Path, Path]]:
    """This user's folder of a set's copies, made if need be.

    Gives its name, and a path to it that stays with it whatever is put in its place meanwhile.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    mode = stage_dir.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise Error(
            f"cannot stage to {stage_dir}: everybody may replace what is in it.",
            hint=f"`chmod +t {stage_dir}`, or choose another folder.",
        )
    places = _places(shard_set, stage_dir)
    for place in places:
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
        with contextlib.suppress(OSError):
            folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                through = Path(f"/proc/self/fd/{folder}")
                if is_own(f"{through}/."):
                    os.fchmod(folder, 0o700)
                    yield place, through
                    return
            finally:
                os.close(folder)
    raise _taken(places)


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
    shards = list({shard.path: shard for _, _, shard in index.shards()}.values())
    try:
        with (
            _own_folder(shard_set, stage_dir) as (name, folder),
            _alone(folder, timeout_seconds, name),
        ):
            for left_over in folder.glob("*.part"):
                left_over.unlink()
            if keep:
                (folder / KEEP).touch()
            there, copied = _copy_all(shard_set, folder, shards, name)
    except OSError as error:
        raise Error(
            f"cannot stage to {stage_dir}: {error.strerror or error}.",
            hint="may you write there, and is there room?",
        ) from error
    sizes = sum(shard.bytes for shard in there), sum(shard.bytes for shard in shards)
    return Staged(name, len(there), len(shards), *sizes, copied)


def unstage(shard_set: Path, stage_dir: Path, *, kept: bool = False) -> None:
    """Remove a set's copies from node-local storage.

    Args:
        shard_set: The set's folder.
        stage_dir: As it was staged to.
        kept: Also such as were to be kept.
    """
    folder = folder_of(shard_set, stage_dir)
    if is_own(folder) and (kept or not (folder / KEEP).exists()):
        shutil.rmtree(folder, ignore_errors=True)


def _copy_all(
    shard_set: Path, folder: Path, shards: list[ShardEntry], name: Path
) -> tuple[list[ShardEntry], int]:
    """Return the shards of which there are copies now, and how many were made."""
    seen = _seen(folder)
    right = {}
    there, copied = [], 0
    missing = []
    for shard in shards:
        copy = folder / staged_name(shard)
        if _is_whole(copy, shard, seen):
            right[copy.name] = _look_of(copy)
            there.append(shard)
        else:
            copy.unlink(missing_ok=True)
            missing.append(shard)
    for shard in progress(missing, what=f"staging to {name}", total=len(missing)):
        if shard.bytes > room(folder):
            continue  # a smaller one may still fit
        copy = folder / staged_name(shard)
        _copy(shard_set / shard.path, copy, shard)
        right[copy.name] = _look_of(copy)
        there.append(shard)
        (folder / HOLDER).touch()
        copied += 1
    if right != seen:
        write_text(folder / CHECKED, json.dumps(right))
    return there, copied


def _look_of(copy: Path) -> list[int]:
    """What changes when somebody writes to a copy, or puts another in its place."""
    status = copy.lstat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _seen(folder: Path) -> dict[str, Any]:
    """How copies looked when their checksums were last seen to be right."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        seen = json.loads(read_regular(folder / CHECKED, CHECKED_BYTES))
        if isinstance(seen, dict):
            return seen
    return {}


def _is_whole(copy: Path, shard: ShardEntry, seen: dict[str, Any]) -> bool:
    """Whether a copy that was found is what the index says."""
    if not is_own(copy) or not stat.S_ISREG(copy.lstat().st_mode):
        return False
    if copy.lstat().st_size != shard.bytes:
        return False
    if seen.get(copy.name) == _look_of(copy):
        return True
    if not shard.sha256:
        return False
    digest = hashlib.sha256()
    with open_regular(copy, follow=False) as reader:
        while block := reader.read(COPY_BYTES):
            digest.update(block)
            os.utime(copy.parent / HOLDER)
    return digest.hexdigest() == shard.sha256


def _copy(source: Path, target: Path, shard: ShardEntry) -> None:
    part = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    try:
        with open_regular(source) as reader, part.open("xb") as writer:
            # As the original's, but for others' right to write.
            mode = stat.S_IMODE(os.fstat(reader.fileno()).st_mode)
            os.fchmod(writer.fileno(), mode & 0o755 | stat.S_IRUSR)
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
    """Return how many bytes may be written in a folder, some being left for others."""
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
def _alone(folder: Path, timeout_seconds: float, name: Path) -> Iterator[None]:
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
                    f"{who} is staging to {name}, and has got no further for "
                    f"{timeout_seconds:g} s.",
                    hint="does a file system hang? Else end that process.",
                ) from error
    try:
        holder.write_text(f"process {os.getpid()} on {os.uname().nodename}", encoding="utf-8")
        yield
        holder.unlink(missing_ok=True)
    finally:
        lock.release()
