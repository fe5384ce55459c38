"""Within a world of several ranks the `mpi` tests run, and otherwise all the others."""

import io

import pytest

from hpctrain.launcher import detect

LAUNCH = detect()
collect_ignore = ["unit", "e2e", "slurm"] if LAUNCH.size > 1 else ["mpi"]


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "mpi: runs inside a world of several ranks")
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if LAUNCH.rank > 0 and reporter is not None:
        # One report is enough; what goes wrong on another rank is printed by tests/mpi/conftest.py.
        reporter._tw._file = io.StringIO()
