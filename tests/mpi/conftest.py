"""Tests that run inside a world: `mpirun -np 2 pytest`. Every rank runs every test.

Ranks that go on after another's failure would wait for it for ever. So the first failure anywhere
prints its traceback and ends that rank at once; the launcher then ends the others.
"""

import os
import sys

import pytest

from hpctrain.world.launcher import detect
from tests.waiting import SECONDS

LAUNCH = detect()


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker("mpi")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        text = f"{item.nodeid} on rank {LAUNCH.rank} of {LAUNCH.size}, in its {call.when}"
        capture = item.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n{report.longreprtext}\nFAILED {text}", file=sys.stderr, flush=True)
        os._exit(1)


def pytest_sessionfinish(session, exitstatus):
    session.config.world_exit = int(exitstatus)


def pytest_unconfigure(config):
    # After an error outside tests, such as an import: nobody may wait for this rank either.
    if getattr(config, "world_exit", 0):
        sys.stdout.flush()
        os._exit(config.world_exit)


@pytest.fixture(scope="session")
def strategy():
    """The Horovod strategy, connected once for all tests."""
    import hpctrain

    connected = hpctrain.strategy("horovod", hpctrain.init(), timeout_seconds=SECONDS)
    yield connected
    connected.world.comm.close()


@pytest.fixture(autouse=True)
def knobs(request):
    """The strategy has its own knobs again after a test that gave it others."""
    if "strategy" not in request.fixturenames:
        yield
        return
    connected = request.getfixturevalue("strategy")
    before = connected.config
    yield
    connected.config = before


@pytest.fixture
def world(strategy):
    """The connected world; all ranks start each test together."""
    strategy.world.comm.barrier()
    return strategy.world
