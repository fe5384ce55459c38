"""Horovod as it is built here: what is enqueued wakes its thread, and nothing else does."""

import os
import sys
from pathlib import Path

import pytest

from hpctrain.process import mpirun, run
from tests.waiting import SECONDS

PROGRAM = str(Path(__file__).with_name("woken.py"))
DAY = str(24 * 3600 * 1000)


@pytest.mark.parametrize(
    ("ranks", "starts", "launcher", "environment"),
    [
        (3, 3, "mpirun", {}),
        (2, 2, "mpirun", {"HOROVOD_CPU_OPERATIONS": "gloo"}),
        # horovodrun's store holds the addresses of one world: it cannot start again at once.
        (2, 1, "horovodrun --gloo", {}),
    ],
)
def test_cycles_of_a_day_delay_nothing(ranks, starts, launcher, environment):
    """All-reduces and the like, process sets, join, shutdown, and further starts."""
    start = [*launcher.split(), "-np", str(ranks)] if "gloo" in launcher else mpirun(ranks)
    result = run(
        [*start, sys.executable, PROGRAM, str(starts), str(ranks)],
        timeout_seconds=SECONDS,
        env={**os.environ, **environment, "HOROVOD_CYCLE_TIME": DAY},
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("all is done") == ranks, result.stdout
