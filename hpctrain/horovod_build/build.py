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
from hpctrain.horovod_build import mpi, patches, toolchain
from hpctrain.horovod_build.pip import TIMEOUT_SECONDS, Log, pip, tail
from hpctrain.horovod_build.toolchain import SDIST_SHA256, VERSION, Toolchain
from hpctrain.process import mpirun, run

BUILT_FROM = "built-from.json"


def build(*, gpu: bool = False, rebuild: bool = False) -> None:
    """Make Horovod work here: a wheel from the cache or a fresh build, installed and proved.

    mpi4py is built from source first, where its wheel cannot use the MPI on PATH.

    Args:
        gpu: With NCCL operations.
        rebuild: Build even where the cache holds a wheel.

    Raises:
        Error: A tool is missing or known not to do, the build failed (its first error is shown, its
            log is kept), or the result cannot all-reduce over two ranks.
    """
    chain = toolchain.find(gpu=gpu)
    mpi.match_mpi4py(chain.built_from["mpi"])
    folder = cache_folder() / "horovod" / chain.key
    with _locked(folder):
        wheel = next(folder.glob("*.whl"), None)
        if wheel is None or rebuild:
            click.echo(f"Building Horovod {VERSION}; this takes some minutes. Log: {folder}/log")
            with Log(folder / "log") as log:
                wheel = _build_wheel(chain, folder, log)
                log.say("built")
        else:
            click.echo(f"Horovod {VERSION} is in the cache: {wheel}")
        pip("install", "--force-reinstall", "--no-deps", str(wheel))
        pip("install", str(wheel))  # now that it is in place: what it depends on
    prove()


def launches() -> dict[str, list[str]]:
    """Return the commands that prove Horovod over two ranks, by the controller they use."""
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
                f"(exit code {result.returncode}): {tail(result.stdout, 4)}",
                hint="`hpctrain horovod check` says what it was built against.",
            )
        click.echo(f"Horovod all-reduces over 2 ranks with {name}.")


def _build_wheel(chain: Toolchain, folder: Path, log: Log) -> Path:
    with tempfile.TemporaryDirectory(prefix="hpctrain-horovod-") as name:
        work = Path(name)
        tools = work / "tools"
        log.say("fetching the build's tools and Horovod's source")
        pip("install", "--target", str(tools), *toolchain.BUILD_TOOLS, log=log)
        # The tools shadow the environment's own for this build alone, and change nothing in it.
        environment = {**chain.environment, "PYTHONPATH": str(tools)}
        environment |= _gpu_links(chain, work)
        source = _fetch(work, environment, log)
        patches.apply(source)
        log.say("configuring and compiling")
        wheels = work / "wheels"
        result = run(
            [
                *[sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"],
                *["--no-cache-dir", "-v", "--wheel-dir", str(wheels), str(source)],
            ],
            env=environment,
            timeout_seconds=TIMEOUT_SECONDS,
            each=log.line,
        )
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


def _fetch(work: Path, environment: dict[str, str], log: Log) -> Path:
    """Download and unpack the source distribution, its hash checked by pip."""
    requirement = work / "requirement.txt"
    requirement.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    pip(
        *["download", "--require-hashes", "--no-binary", "horovod", "--no-deps"],
        *["--no-build-isolation", "--dest", str(work), "--requirement", str(requirement)],
        environment=environment,
        log=log,
    )
    with tarfile.open(next(work.glob("horovod-*.tar.gz"))) as archive:
        # Python 3.11.2, which Debian 12 has, knows no filters yet.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(work)  # noqa: S202 - what it holds is known by its hash
    return work / f"horovod-{VERSION}"


def _gpu_links(chain: Toolchain, work: Path) -> dict[str, str]:
    """CUDA and NCCL as linkers and CMake look for them: nvidia's wheels have versioned names alone.

    Args:
        chain: Where they are.
        work: A folder for links to them.

    Returns:
        What is to be different in the build's environment.
    """
    changed: dict[str, str] = {}
    cuda, nccl = (chain.environment.get(f"HOROVOD_{name}_HOME") for name in ("CUDA", "NCCL"))
    if cuda and not any((Path(cuda) / lib / "libcudart.so").exists() for lib in ("lib64", "lib")):
        home = str(_linked(Path(cuda), work / "cuda", "lib64"))
        changed |= {name: home for name, value in chain.environment.items() if value == cuda}
    if nccl and not (Path(nccl) / "lib" / "libnccl.so").exists():
        changed["HOROVOD_NCCL_HOME"] = str(_linked(Path(nccl), work / "nccl", "lib"))
    return changed


def _linked(home: Path, links: Path, libraries: str) -> Path:
    """A folder like another one, whose libraries have names without versions, too."""
    (links / libraries).mkdir(parents=True)
    for entry in home.iterdir():
        if entry.name != "lib":
            (links / entry.name).symlink_to(entry)
    for library in (home / "lib").iterdir():
        names = {library.name, re.sub(r"\.so\.[\d.]+$", ".so", library.name)}
        for name in names - {path.name for path in (links / libraries).iterdir()}:
            (links / libraries / name).symlink_to(library)
    return links


def _first_error(log: str) -> str:
    """A compiler's or CMake's first complaint, with the lines that explain it."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if re.search(r"CMake Error|\berror:|undefined reference", line):
            return " | ".join(text.strip() for text in lines[number : number + 4])
    return tail(log, 4)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two builds of one wheel take turns; the second finds the first one's wheel."""
    lock = FileLock(folder / "lock", timeout=TIMEOUT_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            click.echo(f"Waiting for another build of the same wheel. Its log: {folder / 'log'}")
            lock.acquire()
    except Timeout as error:
        raise Error(
            f"another process has held {folder / 'lock'} for {TIMEOUT_SECONDS} s.",
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
