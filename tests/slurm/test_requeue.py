"""Jobs that are told that time is up, are requeued, or lose a node: they end with the same bits."""

import json
import time

import pytest

from tests.e2e.conftest import result_of
from tests.slurm.conftest import TASK, slow_until

EPOCHS = 5
SLOW = (TASK, "--nodes", 2, "--epochs", EPOCHS, *slow_until("", at=45, file="go"),
        "--set", "log.every_steps=5", "--set", "checkpoint.every_steps=20")  # fmt: skip


@pytest.fixture(scope="module")
def whole(session_cluster, tmp_path_factory):
    """The parameters of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "go").touch()
    arguments = [*map(str, SLOW), "--out", "run", "--wait"]
    done = session_cluster.run("hpctrain", "submit", *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout
    return result_of(folder / "run")["parameters_sha256"]


def assert_same(run, whole, reasons):
    result = result_of(run)
    assert result["parameters_sha256"] == whole
    assert result["steps"] == EPOCHS * 23
    assert [change["reason"].partition(" at")[0] for change in result["world"]] == reasons


def test_a_signal_that_time_is_up(site, whole):
    """Once early, and again while it is being saved; then the job is started again."""
    number, run = site.submit(*SLOW)
    site.reached(30)
    for _ in range(2):
        site.cluster.call("scancel", "--signal=USR1", "--batch", number)
    (site.folder / "go").touch()
    code, said = site.wait()
    assert code == 0, said + site.log()
    assert_same(run, whole, ["start", "resumed"])
    assert "to be started again, for the 1. time" in site.log()
    assert site.cluster.field(number, "Restarts") == "1"


def test_a_signal_before_training_has_begun(site, whole):
    (site.folder / "go").touch()
    number, run = site.submit(*SLOW)
    site.until(lambda: (run / "ranks").exists(), "ranks")
    site.cluster.call("scancel", "--signal=USR1", "--batch", number)
    assert site.wait()[0] == 0, site.log()
    assert result_of(run)["parameters_sha256"] == whole
    assert "interrupted at step" in site.log()


def test_no_more_requeues(site):
    number, _ = site.submit(*SLOW, "--max-requeues", 0)
    site.reached(10)
    site.cluster.call("scancel", "--signal=USR1", "--batch", number)
    (site.folder / "go").touch()
    code, said = site.wait()
    assert code == 75, said
    assert "not started again" in site.log()
    assert site.cluster.field(number, "JobState") == "FAILED"
    assert site.cluster.field(number, "ExitCode") == "75:0"


def test_requeued_by_others(site, whole):
    number, run = site.submit(*SLOW)
    site.reached(40)
    site.cluster.call("scontrol", "requeue", number)
    (site.folder / "go").touch()
    site.until(lambda: site.cluster.field(number, "Restarts") == "1", "a restart")
    assert site.wait()[0] == 0, site.log()
    assert_same(run, whole, ["start", "resumed"])


def test_a_controller_that_is_silent(site, whole):
    """It is asked to requeue while it says nothing, and does so when it wakes up: once."""
    number, run = site.submit(*SLOW)
    site.reached(30)
    site.cluster.call("scancel", "--signal=USR1", "--batch", number)
    with site.cluster.silent():
        # scontrol gives up after 10 s.
        site.until(lambda: "to be started again" in site.log(), "the job to ask")
        time.sleep(13)
    (site.folder / "go").touch()
    assert site.wait()[0] == 0, site.log()
    assert_same(run, whole, ["start", "resumed"])
    assert "instead" not in site.log()
    assert [json.loads(path.read_text())["job"] for path in sorted((run / "owners").iterdir())] == [
        number, number
    ]  # fmt: skip


def test_a_chain_of_three(site, whole):
    """Where Slurm does not start the job again: all commands follow, whichever they are told."""
    number, run = site.submit(*SLOW, "--no-requeue")
    numbers = [number]
    for _ in range(2):
        log = run / f"faulty_task-{numbers[-1]}.out"
        site.until(lambda log=log: log.exists() and "faulty_task.py: " in log.read_text(), "ranks")
        site.cluster.call("scancel", "--signal=USR1", "--batch", numbers[-1])
        site.until(lambda log=log: "goes on as job " in log.read_text(), "the next job")
        numbers.append(log.read_text().rpartition("goes on as job ")[2].split()[0])
        assert site("jobs", "--runs", ".").stdout.splitlines()[1].split()[0] == numbers[-1]
    (site.folder / "go").touch()
    assert "for the 2. time" in site.log() and len(set(numbers)) == 3
    other = site("submit", TASK, "--out", "run")
    assert other.returncode == 2 and f"is that of job {numbers[-1]}, which is" in other.stdout
    done = site("jobs", "--runs", ".", "wait", number)
    assert done.returncode == 0, done.stdout + site.log()
    assert_same(run, whole, ["start", "resumed", "resumed"])


def test_a_lost_node(site, whole):
    """Slurm notices after SlurmdTimeout, and starts the job again on others."""
    number, run = site.submit(*SLOW)
    site.reached(40)
    nodes = site.cluster.field(number, "NodeList")
    site.cluster.kill("n2" if "2" in nodes else "n1")
    (site.folder / "go").touch()
    site.ended()
    assert_same(run, whole, ["start", "resumed"])


def test_not_after_success_or_an_error(site):
    number, _ = site.submit(TASK, "--epochs", 1)
    assert site.wait()[0] == 0
    assert site.cluster.field(number, "JobState") == "COMPLETED"
    assert site.cluster.field(number, "Restarts") == "0"
