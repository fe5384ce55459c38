"""`hpctrain launch`: ranks over Gloo, driven from outside: as a pool of jobs, and in a job."""

import signal
import subprocess

import pytest

from tests.slurm.conftest import TASK, slow_until
from tests.waiting import SECONDS

OPTIONS = ("--epochs", 7, "--trace-samples", "--set", "log.every_steps=5",
           "--set", "log.tensorboard=false")  # fmt: skip


@pytest.fixture
def launched(hosts, site):
    """Starts `hpctrain launch` where one would log in; it is ended at last."""
    processes = []

    def start(*arguments):
        log = (site.folder / "launch.log").open("w")
        go = ("sh", "-c", 'cd "$0" && exec "$@"', str(site.folder))
        process = subprocess.Popen(
            hosts.command(*go, "hpctrain", "launch", *arguments),
            env=hosts.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_node_is_lost_and_comes_back(hosts, site, launched):
    process = launched("--pool", 3, "--sbatch=--exclusive", "--sbatch=--exclude=n4",
                       "--", "hpctrain", "train", TASK, "--out", "run", *OPTIONS,
                       *slow_until("joined", at=45))  # fmt: skip
    watched = {"running": process, "tell": (site.folder / "launch.log").read_text}

    def event(word):
        return [line for line in site.metrics() if word in line]

    site.reached(40, **watched)
    hosts.kill("n3")
    site.until(lambda: event("lost"), "a loss", **watched)
    hosts.start("n3")
    site.until(lambda: event("joined"), "a newcomer", **watched)
    result = site.ended(**watched)
    assert process.wait(SECONDS) == 0, watched["tell"]()
    assert [change["size"] for change in result["world"]] == [3, 2, 3], watched["tell"]()
    assert [line["host"] for line in event("lost")] == ["n3"]
    done = site("trace", "run")
    assert done.returncode == 0 and "each once an epoch" in done.stdout, done.stdout


def test_in_a_job(hosts, site):
    """`hpctrain submit --elastic` where MPI's fault tolerance is not to be had, or not wanted."""
    arguments = (TASK, "--elastic", *OPTIONS, *slow_until("lost", at=45), "--nodes", 3)
    site.submit(*arguments, env={"HPCTRAIN__ELASTIC__MODE": "gloo"})
    site.reached(40)
    hosts.kill("n3")
    result = site.ended()
    assert "elastic: gloo: as asked for" in site.log()
    assert [change["size"] for change in result["world"]] == [3, 2]
    assert [line["host"] for line in site.metrics() if "lost" in line] == ["n3"]
    code, said = site.wait()
    assert code == 0, said
