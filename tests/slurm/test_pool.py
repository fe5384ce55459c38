"""`hpctrain launch`: ranks over Gloo, driven from outside: as a pool of jobs, and in a job."""

import json
import signal
import subprocess
import time

import pytest

from tests.slurm.conftest import TASK

TRAIN = ("hpctrain", "train", TASK, "--out", "run", "--set", "options.pause=0.03",
         "--trace-samples", "--set", "log.every_steps=5",
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
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_node_is_lost_and_comes_back(hosts, site, launched):
    process = launched("--pool", 3, "--sbatch=--exclusive", "--sbatch=--exclude=n4",
                       "--", *TRAIN, "--epochs", 30)  # fmt: skip
    log = site.folder / "launch.log"

    def event(word):
        return [line for line in site.metrics() if word in line]

    def until(condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.02)

    until(lambda: any(line["step"] >= 40 for line in site.metrics()), 90)
    hosts.kill("n3")
    until(lambda: event("lost"), 20)
    hosts.start("n3")
    until(lambda: event("joined"), 60)
    until(lambda: (site.folder / "run" / "result.json").exists(), 120)
    assert process.wait(30) == 0, log.read_text()
    result = json.loads((site.folder / "run" / "result.json").read_text())
    assert [change["size"] for change in result["world"]] == [3, 2, 3]
    assert [line["host"] for line in event("lost")] == ["n3"]
    done = site("trace", "run")
    assert done.returncode == 0 and "each once an epoch" in done.stdout, done.stdout


def test_in_a_job(hosts, site):
    """`hpctrain submit --elastic` where MPI's fault tolerance is not to be had, or not wanted."""
    arguments = (TASK, "--elastic", "--epochs", 7, *TRAIN[5:], "--nodes", 3)
    _, run = site.submit(*arguments, env={"HPCTRAIN__ELASTIC__MODE": "gloo"})
    site.reached(40)
    hosts.kill("n3")
    site.until(lambda: (run / "result.json").exists(), seconds=120)
    assert "elastic: gloo: as asked for" in site.log()
    result = json.loads((run / "result.json").read_text())
    assert [change["size"] for change in result["world"]] == [3, 2]
    assert [line["host"] for line in site.metrics() if "lost" in line] == ["n3"]
    code, said = site.wait()
    assert code == 0, said
