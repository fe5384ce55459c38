"""What is secret in the environment reaches all ranks, and nobody's list of processes."""

import contextlib
import importlib.util
import os
import secrets
import sys
import threading
from pathlib import Path

import pytest

from hpctrain.horovod_build.patches import PATCHES
from hpctrain.process import mpirun, run, search_path
from hpctrain.slurm.hidden import hide, show
from hpctrain.slurm.horovodrun import SHIM, arguments
from hpctrain.slurm.hosts import Node
from hpctrain.slurm.ssh import PYTHON
from tests.waiting import SECONDS

SRUN = """#!/bin/sh
# Starts the command behind srun's options.
while case "$1" in -*) true;; *) false;; esac; do shift; done
exec "$@"
"""


@contextlib.contextmanager
def arguments_watched(secret):
    """Gives those arguments of this host's processes that held the secret meanwhile."""
    found, over = set(), threading.Event()

    def watch():
        while not over.wait(0.002):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if secret.encode() in (content := process.read_bytes()):
                        found.add(content)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        over.set()
        watching.join()


def horovodrun(monkeypatch, tmp_path):
    """As in a Slurm job of two nodes; an address of this host that Horovod takes for another's."""
    monkeypatch.setattr(
        "hpctrain.slurm.hosts.nodes", lambda: [Node("localhost", 1), Node("127.0.0.2", 1)]
    )
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{SHIM}:{tmp_path / 'bin'}:{search_path()}")
    return arguments([], "lo"), hide(os.environ) | {PYTHON: sys.executable}


SSH = """#!/bin/sh
# Hands the words behind its options and the host to a shell that has nothing of this environment.
while case "$1" in -o) true;; *) false;; esac; do shift 2; done
shift
exec env -i PATH="$PATH" sh -c "$*"
"""


def horovodrun_by_ssh(monkeypatch, tmp_path):
    """On this host and, by what stands for ssh, on another; Horovod as it is patched now."""
    installed = Path(importlib.util.find_spec("horovod").origin).parent
    text = (installed / "runner" / "gloo_run.py").read_text()
    for patch in PATCHES:
        if patch.file == "horovod/runner/gloo_run.py" and patch.new not in text:
            assert patch.old in text
            text = text.replace(patch.old, patch.new)
    for folder in (installed, installed / "runner"):
        here = tmp_path / "python" / folder.relative_to(installed.parent)
        here.mkdir(parents=True)
        for path in folder.iterdir():
            if path.name not in ("runner", "gloo_run.py"):
                (here / path.name).symlink_to(path)
    (tmp_path / "python" / "horovod" / "runner" / "gloo_run.py").write_text(text)
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{search_path()}")
    hosts = ["-H", "localhost:1,127.0.0.2:1", "--network-interfaces", "lo"]
    return ["horovodrun", "--gloo", "-np", "2", *hosts]


@pytest.mark.parametrize(
    "launcher", ["mpirun", "hpctrain launch", "horovodrun", "horovodrun --gloo"]
)
def test_no_secret_in_arguments(launcher, monkeypatch, tmp_path):
    secret = secrets.token_hex(32)
    monkeypatch.setenv("HPCTRAIN_PS_KEY", secret)
    monkeypatch.setenv("OTHER_TOKEN", f"it's {secret}\n$HOME")
    before = {path.name for path in Path("/tmp").glob("hpctrain-*")}
    environment = dict(os.environ)
    if launcher == "mpirun":
        prefix = mpirun(2)
    elif launcher == "hpctrain launch":
        prefix = ["hpctrain", "launch", "-np", "2", "--"]
    elif launcher == "horovodrun --gloo":
        prefix = horovodrun_by_ssh(monkeypatch, tmp_path)
        environment = dict(os.environ)
    else:
        prefix, environment = horovodrun(monkeypatch, tmp_path)
    script = (
        "import os, pathlib, time; time.sleep(1); "
        "rank = os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ.get('HOROVOD_RANK') "
        "or os.environ['HPCTRAIN_RANK']; "
        "text = os.environ['HPCTRAIN_PS_KEY'] + os.environ['OTHER_TOKEN']; "
        "pathlib.Path(rank + '.txt').write_text(text)"
    )
    with arguments_watched(secret) as found:
        done = run(
            [*prefix, sys.executable, "-c", script],
            timeout_seconds=SECONDS, cwd=tmp_path, env=environment,
        )  # fmt: skip
    assert len(list(tmp_path.glob("*.txt"))) == 2, done.stdout
    for rank in range(2):
        text = (tmp_path / f"{rank}.txt").read_text()
        assert text == f"{secret}it's {secret}\n$HOME", done.stdout
    assert found == set()
    assert {path.name for path in Path("/tmp").glob("hpctrain-ssh-*")} <= before


def test_an_environment_is_hidden_and_shown():
    environment = {"PATH": "/bin", "A_KEY": "x", "BASH_FUNC_module%%": "() { :; }", "B": ""}
    hidden = hide(environment)
    assert hidden["PATH"] == "/bin" and "A_KEY" not in hidden and "B" not in hidden
    assert all(name == "PATH" or name.startswith("BASH_FUNC_") for name in hidden)
    assert show(hidden) == environment
    assert show({**hidden, "B": "of the rank"})["B"] == "of the rank"
