"""End-to-end tests start the installed command, as a user would."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hpctrain.process import mpirun, run
from tests.processes import started
from tests.waiting import SECONDS, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def temporary(monkeypatch):
    """A place of its own for temporary files of what a test starts.

    An mpirun that was killed leaves some that are named after its process number, and a later one
    with that number would not start.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield


class Command:
    """Runs `hpctrain ...` on some ranks; standard error is folded into the output."""

    def __init__(self, folder):
        self.folder = folder

    def prefix(self, ranks, launcher="mpirun"):
        if ranks == 0:
            return []
        if launcher == "mpirun":
            return mpirun(ranks)
        return ["horovodrun", *launcher.split()[1:], "-np", str(ranks)]

    def __call__(self, *arguments, ranks=0, launcher="mpirun", env=None):
        return run(
            [*self.prefix(ranks, launcher), "hpctrain", *map(str, arguments)],
            timeout_seconds=SECONDS,
            cwd=self.folder,
            env={**os.environ, **(env or {})},
        )

    def each(self, lists):
        """Run each list of arguments on one rank, in less time than so many commands take."""
        lists = list(lists)
        done = run(
            [sys.executable, "-m", "tests.e2e.forks", json.dumps([[*map(str, a)] for a in lists])],
            timeout_seconds=SECONDS,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )
        assert done.returncode == 0, done.stdout
        return [
            subprocess.CompletedProcess(a, *end)
            for a, end in zip(lists, json.loads(done.stdout), strict=True)
        ]

    @contextlib.contextmanager
    def training(self, *arguments, ranks=0):
        """A run in the background, once its first checkpoint is there; never left behind."""
        checkpoints = self.folder / "run" / "checkpoints"
        with started(
            [*self.prefix(ranks), "hpctrain", "train", *arguments, "--out", "run"],
            signals=[signal.SIGINT],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            wait_until(
                lambda: list(checkpoints.glob("step-*")), "the first checkpoint", running=process
            )
            yield process

    def train(self, *arguments, **options):
        result = self("train", *arguments, **options)
        assert result.returncode == 0, result.stdout
        return result


@pytest.fixture
def hpctrain(tmp_path):
    return Command(tmp_path)


def cut_back(folder, step, to):
    """A copy of a run's folder, as it was after its checkpoint of that step."""
    shutil.copytree(folder, to, symlinks=True)
    (to / "result.json").unlink()
    for checkpoint in (to / "checkpoints").glob("step-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def result_of(folder):
    return json.loads((Path(folder) / "result.json").read_text())
