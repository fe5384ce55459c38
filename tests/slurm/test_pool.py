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
