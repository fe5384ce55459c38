"""Within a world of several ranks the `mpi` tests run, and otherwise all the others.

Random examples (Hypothesis) are the same in every run, so that what a change breaks is what fails,
and every rank of a world tries the same ones. `make campaign` tries others. None has a deadline:
how long an example takes says how busy the machine is.

A test that hangs is ended after `timeout` of pyproject.toml, with all that it has started, and with
it the whole run; what any thread was about, and which processes there were, is printed.
"""

import faulthandler
import io
import os
import signal
import sys
import threading

import pytest
from hypothesis import settings

from hpctrain.world.launcher import detect
from tests import processes

LAUNCH = detect()
collect_ignore = ["unit", "e2e", "slurm"] if LAUNCH.size > 1 else ["mpi"]

# Tests run beside one another on few cores. Threads of OpenMP that spin while they wait for one
# that has no core make a step many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("repeatable")

END_SECONDS = 240.0
"""So long processes may go on when their test is over; a launcher does not wait for all."""


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "mpi: runs inside a world of several ranks")
    config.addinivalue_line("markers", "slow: takes seconds; left out by `make test-fast`")
    config.addinivalue_line(
        "markers", "long: a longer form of what others cover; left to `make test-long`"
    )
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if LAUNCH.rank > 0 and reporter is not None:
        # One report is enough; what goes wrong on another rank is printed by tests/mpi/conftest.py.
        reporter._tw._file = io.StringIO()
    processes.adopt_orphans()
    signal.signal(signal.SIGTERM, terminated)


def terminated(number, frame):
    """Asked to end: end what was started, too, and say what has failed until now."""
    pytest.exit(signal.Signals(number).name)


@pytest.fixture(autouse=True)
def no_process_is_left(request):
    """None of those that a test started; the Slurm cluster's daemons are its own business."""
    before = processes.children()
    yield
    if "session_cluster" not in request.fixturenames:
        processes.assert_no_more_than(before, END_SECONDS)


def pytest_timeout_set_timer(item, settings):
    """Instead of pytest-timeout's own, which leaves processes behind."""
    timer = threading.Timer(settings.timeout, give_up, (item, settings.timeout))
    timer.daemon = True
    timer.start()
    item.cancel_timeout = timer.cancel  # called by pytest-timeout
    return True


def give_up(item, seconds):
    """End this process and all of its descendants."""
    capture = item.config.pluginmanager.get_plugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
        print(*capture.read_global_capture(), sep="\n", file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr)
    rank = f" on rank {LAUNCH.rank} of {LAUNCH.size}" if LAUNCH.size > 1 else ""
    print(f"\nFAILED {item.nodeid}{rank}: not over after {seconds:.0f} s", file=sys.stderr)
    print("running:", *processes.kill(processes.children()), sep="\n", file=sys.stderr, flush=True)
    os._exit(1)
