"""What happens to a world when one rank fails: nobody hangs, and the truth is told."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import psutil

from hpctrain.process import run
from tests.waiting import SECONDS

HERE = Path(__file__).parent

RAISES_ON_RANK_1 = """
import hpctrain
from hpctrain.tasks.digits import Digits

class Mine(Digits):
    def loss(self, model, batch):
        if hpctrain.init().launch.rank == 1 and self.calls > 5:
            raise RuntimeError("boom on rank 1")
        self.calls += 1
        return super().loss(model, batch)

    calls = 0
"""


def test_an_exception_on_one_rank_ends_the_run(hpctrain):
    (hpctrain.folder / "mine.py").write_text(RAISES_ON_RANK_1)
    result = hpctrain("train", "mine.py:Mine", "--out", "run", ranks=2)
    assert result.returncode == 1
    assert "RuntimeError: boom on rank 1" in result.stdout
    assert not (hpctrain.folder / "run" / "result.json").exists()


IMPATIENT = """
from hpctrain.strategies.horovod_communicator import HorovodCommunicator
from hpctrain.tasks.digits import Digits

made = []

class Noted(HorovodCommunicator):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        made.append(self)

class Mine(Digits):
    calls = 0

    def loss(self, model, batch):
        self.calls += 1
        if self.calls == 10:  # a start may take as long as it does
            (comm,) = made
            comm.timeout_seconds = 10.0
        return super().loss(model, batch)

import hpctrain.strategies.horovod
hpctrain.strategies.horovod.HorovodCommunicator = Noted
"""


def test_a_stopped_rank_is_noticed(hpctrain):
    """SIGSTOP: the process lives, its sockets too, and only the clock tells."""
    (hpctrain.folder / "mine.py").write_text(IMPATIENT)
    with hpctrain.training("mine.py:Mine", "--epochs", "100000", ranks=2) as process:
        ranks = {
            child.environ()["OMPI_COMM_WORLD_RANK"]: child
            for child in psutil.Process(process.pid).children(recursive=True)
        }
        ranks["1"].send_signal(signal.SIGSTOP)
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    lines = [line for line in output.splitlines() if line.startswith("hpctrain: error:")]
    (line,) = lines
    assert re.search(r"waited 1\d s for an exchange with ranks 1", line), output
    assert "Traceback" not in output


FAILING_TEST = """
from hpctrain.world.launcher import detect

def test_on_one_rank(world):
    value = 7
    assert detect().rank != 1 or value == 8, "only rank 1 sees this"
    world.comm.barrier()
    world.comm.barrier()
"""


def test_pytest_fails_at_once_on_every_rank(hpctrain):
    """An assertion that fails on one rank alone; the others wait in a barrier by then."""
    shutil.copy(HERE.parent / "mpi" / "conftest.py", hpctrain.folder)
    (hpctrain.folder / "test_one.py").write_text(FAILING_TEST)
    result = run(
        [*hpctrain.prefix(2), "pytest", "--color=no", str(hpctrain.folder)],
        timeout_seconds=SECONDS,
        cwd=hpctrain.folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert result.returncode == 1, result.stdout
    assert "only rank 1 sees this" in result.stdout
    assert "FAILED test_one.py::test_on_one_rank on rank 1 of 2, in its call" in result.stdout
    assert ">       assert detect().rank != 1 or value == 8" in result.stdout


HANGING_TEST = """
import subprocess
import pytest

@pytest.fixture
def sleeper():
    return subprocess.Popen(["sleep", "4321"], start_new_session=True)

def test_hangs(sleeper):
    sleeper.wait()
"""


def test_a_test_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    """As pytest is set up in this project; what is left would make this very test fail."""
    file = tmp_path / "test_one.py"
    file.write_text(HANGING_TEST)
    root = HERE.parents[1]
    options = ("-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(root))
    # The three seconds are those of the test itself, when what it starts is there.
    options += ("--timeout", "3", "-o", "timeout_func_only=true")
    result = run([sys.executable, "-m", "pytest", *options, str(file)],
                 timeout_seconds=SECONDS, cwd=root)  # fmt: skip
    assert result.returncode == 1, result.stdout
    assert "test_hangs: not over after 3 s" in result.stdout
    assert "in test_hangs" in result.stdout and "sleep 4321" in result.stdout


def test_a_rank_that_never_comes_is_noticed(hpctrain):
    """One rank sleeps instead of starting MPI; the other waits for it in a call without an end."""
    (hpctrain.folder / "late.py").write_text(
        "import os, time\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    time.sleep(1000)\n"
        "import hpctrain\n"
        "hpctrain.strategy('horovod', hpctrain.init(), timeout_seconds=3)\n"
    )
    result = run(
        [*hpctrain.prefix(2), "python", "late.py"], timeout_seconds=SECONDS, cwd=hpctrain.folder
    )
    assert result.returncode == 1, result.stdout
    assert "waited 3 s for the 2 ranks of mpirun to meet" in result.stdout
