"""Within a world of several ranks the `mpi` tests run, and otherwise all the others."""

import io
import os

import pytest

from hpctrain.launcher import detect

LAUNCH = detect()
collect_ignore = ["unit", "e2e", "slurm"] if LAUNCH.size > 1 else ["mpi"]

# Tests run beside one another on few cores. Threads of OpenMP that spin while they wait for one
# that has no core make a step many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "mpi: runs inside a world of several ranks")
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if LAUNCH.rank > 0 and reporter is not None:
        # One report is enough; what goes wrong on another rank is printed by tests/mpi/conftest.py.
        reporter._tw._file = io.StringIO()
