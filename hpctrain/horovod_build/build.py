"""Fetch, patch, build, install and prove Horovod."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from filelock import FileLock, Timeout

from hpctrain.errors import Error
from hpctrain.files import cache_folder
from hpctrain.horovod_build import patches, toolchain
from hpctrain.horovod_build.toolchain import SDIST_SHA256, VERSION, Toolchain
from hpctrain.process import mpirun, run

BUILD_TIMEOUT_SECONDS = 3600
BUILT_FROM = "built-from.json"


def build(*, gpu: bool = False, rebuild: bool = False) -> None:
    """Make Horovod work here: a wheel from the cache or a fresh build, installed and proved.

    Args:
        gpu: With NCCL operations.
        rebuild: Build even where the cache holds a wheel.

    Raises:
        Error: A tool is missing, the build failed (its first error is shown, its log is kept), or
            the result cannot all-reduce over two ranks.
    """
    chain = toolchain.find(gpu=gpu)
    folder = cache_folder() / "horovod" / chain.key
    with _locked(folder):
        wheel = next(folder.glob("*.whl"), None)
        if wheel is None or rebuild:
            click.echo(f"Building Horovod {VERSION}; this takes some minutes. Log: {folder}/log")
            wheel = _build_wheel(chain, folder)
        else:
            click.echo(f"Horovod {VERSION} is in the cache: {wheel}")
        _pip("install", "--force-reinstall", "--no-deps", str(wheel))
        _pip("install", str(wheel))  # now that it is in place: what it depends on
    prove()


def launches() -> dict[str, list[str]]:
    """Commands that prove Horovod over two ranks, by the controller they use."""
    program = [sys.executable, "-m", "hpctrain.horovod_build.prove"]
    gloo = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2"]
    return {"MPI": [*mpirun(2), *program], "Gloo": [*gloo, *program]}


def proved(result: subprocess.CompletedProcess[str]) -> bool:
    """Whether such a command's output says that both ranks were right."""
    return result.returncode == 0 and result.stdout.count("all-reduce over 2 ranks is right") == 2


def prove() -> None:
    """All-reduce over two real ranks with every controller that is built in.

    Raises:
        Error: A rank failed, saw a wrong world, or took too long.
    """
    for name, command in launches().items():
        result = run(command, timeout_seconds=120)
        if not proved(result):
            raise Error(
                f"Horovod does not work over two ranks with {name} "
                f"(exit code {result.returncode}): {_tail(result.stdout, 4)}",
                hint="`hpctrain horovod check` says what it was built against.",
            )
        click.echo(f"Horovod all-reduces over 2 ranks with {name}.")


def _build_wheel(chain: Toolchain, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix="hpctrain-horovod-") as name:
        work = Path(name)
        tools = work / "tools"
        _pip("install", "--target", str(tools), *toolchain.BUILD_TOOLS)
        # The tools shadow the environment's own for this build alone, and change nothing in it.
        environment = {**chain.environment, "PYTHONPATH": str(tools)}
        environment |= _nccl_links(chain, work)
        source = _fetch(work, environment)
        patches.apply(source)
        wheels = work / "wheels"
        result = run(
            [
                *[sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"],
                *["--no-cache-dir", "-v", "--wheel-dir", str(wheels), str(source)],
            ],
            env=environment,
            timeout_seconds=BUILD_TIMEOUT_SECONDS,
        )
        (folder / "log").write_text(result.stdout, encoding="utf-8")
        built = next(wheels.glob("*.whl"), None) if result.returncode == 0 else None
        if built is None:
            raise Error(
                f"building Horovod failed: {_first_error(result.stdout)}",
                hint=f"the whole log is {folder / 'log'}.",
            )
        (folder / BUILT_FROM).write_text(json.dumps(dict(chain.built_from), indent=2))
        # Written under another name first: a killed build must not leave half a wheel behind.
        partial = folder / f"{built.name}.part"
        partial.write_bytes(built.read_bytes())
        return partial.replace(folder / built.name)


def _fetch(work: Path, environment: dict[str, str]) -> Path:
    """The unpacked source distribution, its hash checked by pip."""
    requirement = work / "requirement.txt"
    requirement.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    _pip(
        *["download", "--require-hashes", "--no-binary", "horovod", "--no-deps"],
        *["--no-build-isolation", "--dest", str(work), "--requirement", str(requirement)],
        environment=environment,
    )
    with tarfile.open(next(work.glob("horovod-*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")
    return work / f"horovod-{VERSION}"


def _nccl_links(chain: Toolchain, work: Path) -> dict[str, str]:
    """NCCL as the linker wants it: the nvidia wheel has libnccl.so.2 but no libnccl.so."""
    home = chain.environment.get("HOROVOD_NCCL_HOME")
    if not home or (Path(home) / "lib" / "libnccl.so").exists():
        return {}
    links = work / "nccl"
    (links / "lib").mkdir(parents=True)
    (links / "include").symlink_to(Path(home) / "include")
    (links / "lib" / "libnccl.so").symlink_to(Path(home) / "lib" / "libnccl.so.2")
    return {"HOROVOD_NCCL_HOME": str(links)}


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    result = run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env=environment,
        timeout_seconds=BUILD_TIMEOUT_SECONDS,
    )
    if result.returncode != 0:
        raise Error(
            f"pip {arguments[0]} failed: {_tail(result.stdout, 2)}",
            hint="is the package index reachable, and the disk not full?",
        )


def _first_error(log: str) -> str:
    """A compiler's or CMake's first complaint, with the lines that explain it."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if re.search(r"CMake Error|\berror:|undefined reference", line):
            return " | ".join(text.strip() for text in lines[number : number + 4])
    return _tail(log, 4)


def _tail(text: str, lines: int) -> str:
    return " | ".join(text.strip().splitlines()[-lines:])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two builds of one wheel take turns; the second finds the first one's wheel."""
    lock = FileLock(folder / "lock", timeout=BUILD_TIMEOUT_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise Error(
            f"another process has held {folder / 'lock'} for {BUILD_TIMEOUT_SECONDS} s.",
            hint="is another `hpctrain horovod build` stuck?",
        ) from error
    except OSError as error:
        raise Error(
            f"cannot use the cache {folder}: {error.strerror}.",
            hint="set HPCTRAIN_CACHE to a folder you can write.",
        ) from error
    try:
        yield
    finally:
        lock.release()
