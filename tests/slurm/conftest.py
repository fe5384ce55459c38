"""Tests on a real Slurm cluster; where Slurm is not installed they are skipped, and say so."""

import getpass
import json
from pathlib import Path

import pytest

from tests.e2e.conftest import result_of
from tests.slurm.cluster import Cluster, has_pmix, missing
from tests.waiting import SECONDS, wait_until

NODES = 4
TASK = Path(__file__).with_name("faulty_task.py")


def slow_until(key, times=1, *, at=70, file="run/metrics.jsonl"):
    """Options of the task: after ``at`` batches, hardly to go on until a file tells of that."""
    options = {"hold": file, "key": key, "times": times, "at": at}
    return [
        word for name, value in options.items() for word in ("--set", f"options.{name}={value}")
    ]


@pytest.fixture(scope="session")
def session_cluster():
    """One cluster for all tests."""
    if lacking := missing():
        pytest.skip(f"Slurm is not installed: no {lacking}")
    if not has_pmix():
        pytest.skip("srun --mpi=pmix finds no libpmix.so: see CONTRIBUTING.md")
    cluster = Cluster(NODES)
    # A busy machine may not let a rank give a sign of life for as long as is usual.
    cluster.environment["HPCTRAIN__ELASTIC__HANG_SECONDS"] = "5"
    try:
        yield cluster.up()
    finally:
        cluster.down()


@pytest.fixture
def cluster(session_cluster):
    """The cluster, with all of its nodes idle."""
    yield session_cluster
    session_cluster.run("scancel", "--user", getpass.getuser())
    session_cluster.mend()


@pytest.fixture
def hosts(cluster):
    """The same, where its nodes are hosts of their own."""
    if not cluster.hosts:
        pytest.skip("nodes are hosts of their own only for root, where namespaces are allowed")
    return cluster


class Site:
    """Commands given in a folder that all nodes see."""

    def __init__(self, cluster, folder):
        self.cluster = cluster
        self.folder = folder

    def __call__(self, *arguments, seconds=SECONDS, env=None):
        return self.cluster.run(
            "hpctrain", *arguments, cwd=self.folder, timeout_seconds=seconds, env=env
        )

    def submit(self, *arguments, env=None):
        """Submit a run; its job's number, and its folder."""
        done = self("submit", *arguments, "--out", "run", "--time", "10:00", env=env)
        assert done.returncode == 0, done.stdout
        number = done.stdout.split()[1].rstrip(":")
        return number, self.folder / "run"

    def wait(self, run="run"):
        """What `hpctrain jobs wait` returns and says."""
        done = self("jobs", "wait", run)
        return done.returncode, done.stdout

    def log(self, run="run"):
        """All logs of a run."""
        return "".join(path.read_text() for path in sorted((self.folder / run).glob("*.out")))

    def until(self, condition, what="what the test goes on with", **options):
        """Return when a condition holds."""
        wait_until(condition, what, **{"tell": self.log, **options})

    def ended(self, **options):
        """Return the run's result, when it is there."""
        self.until(lambda: (self.folder / "run" / "result.json").exists(), "a result", **options)
        return result_of(self.folder / "run")

    def reached(self, step, **options):
        """Return when the run has recorded a step."""

        def there():
            lines = self.metrics()
            return bool(lines) and lines[-1]["step"] >= step

        self.until(there, f"step {step}", **options)

    def metrics(self):
        try:
            text = (self.folder / "run" / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


@pytest.fixture
def site(cluster, tmp_path):
    return Site(cluster, tmp_path)
