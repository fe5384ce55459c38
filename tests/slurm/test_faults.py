"""Whatever goes wrong: the job ends soon, with the right exit code, and names the cause."""

import json
import os
import signal
import subprocess

import psutil
import pytest

from tests.slurm.conftest import TASK

SLOW = (TASK, "--nodes", 2, "--epochs", 100, "--set", "options.pause=0.02",
        "--set", "log.every_steps=5")  # fmt: skip


def assert_failed(site, number, code, *words):
    """The job ends with this exit code, and its last line and failure.json say so."""
    site.cluster.wait_for(number, "FAILED")  # long before anybody's `timeout_seconds`
    assert site.cluster.field(number, "ExitCode") == f"{code}:0", site.log()
    last = site.log().splitlines()[-1]
    assert last.startswith("hpctrain job: failed: ")
    for word in words:
        assert word in last
    failure = json.loads((site.folder / "run" / "failure.json").read_text())
    assert failure["exit_code"] == code
    assert site.wait()[0] == code
    return failure


def processes(site, word):
    """The processes of a site's jobs, in whatever namespace, with a word in their command line."""
    return [
        process
        for process in psutil.process_iter(["cwd", "cmdline"])
        if process.info["cwd"] == str(site.folder) and word in (process.info["cmdline"] or ())
    ]


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "horovodrun"])
def test_an_error_on_one_rank(site, launcher):
    if launcher == "horovodrun" and not site.cluster.hosts:
        pytest.skip("horovodrun tells hosts apart by their names")
    number, _ = site.submit(*SLOW, "--set", "options.fault=error", "--launcher", launcher)
    site.reached(15)
    failure = assert_failed(site, number, 1, "rank 1 on n", "ValueError: a bad sample")
    assert failure["rank"] == 1 and "faulty_task.py" in failure["traceback"]


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "horovodrun"])
def test_a_killed_rank(site, launcher):
    """As the kernel does where memory is short."""
    if launcher == "horovodrun" and not site.cluster.hosts:
        pytest.skip("horovodrun tells hosts apart by their names")
    number, _ = site.submit(*SLOW, "--set", "options.fault=kill", "--launcher", launcher)
    site.reached(15)
    assert_failed(
        site, number, 137, "killed (out of memory?)", "n" if launcher == "mpirun" else "SIGKILL"
    )


def test_a_killed_srun(site):
    number, _ = site.submit(*SLOW)
    site.reached(10)
    assert len(processes(site, "train")) >= 2
    launcher, *_ = [p for p in processes(site, "--mpi=pmix") if p.name() == "srun"]
    launcher.send_signal(signal.SIGKILL)
    assert_failed(site, number, 137, "SIGKILL: srun was killed")
    site.until(lambda: not processes(site, "train"), "all ranks to end")


def test_a_killed_batch_script(site):
    number, _ = site.submit(*SLOW)
    site.reached(10)
    site.cluster.call("scancel", "--signal=KILL", "--batch", number)
    site.cluster.wait_for(number, "FAILED", "CANCELLED")
    code, said = site.wait()
    assert code != 0, said
    site.until(lambda: not processes(site, "train"), "all ranks to end")


def test_worlds_of_one(site, tmp_path):
    """A wrong kind of MPI, which by itself trains several times alone, and succeeds."""
    (tmp_path / "wrong.toml").write_text('mpi = "none"\n')
    number, _ = site.submit("digits", "--nodes", 2, "--site", "wrong.toml")
    assert_failed(site, number, 2, "HINT:")


def test_data_that_is_not_there(site):
    number, _ = site.submit("cifar10", "--nodes", 2, "--data", "nowhere")
    assert_failed(site, number, 2, "nowhere", "HINT:")


def test_a_full_disk(hosts, site, tmp_path):
    """What was saved is there still, and the error says what to do."""
    folder = tmp_path / "small"
    folder.mkdir()
    inside = hosts._inside("n1")
    subprocess.run(
        [*inside, "mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], check=True
    )
    try:
        done = site("submit", *SLOW, "--nodes", 1, "--nodelist", "n1", "--out", "small/run",
                    "--output", "%x-%j.out", "--time", "10:00")  # fmt: skip
        number = done.stdout.split()[1].rstrip(":")
        site.cluster.wait_for(number, "FAILED")
        log = (site.folder / f"faulty_task-{number}.out").read_text()
        last = log.splitlines()[-1]
        assert last.startswith("hpctrain job: failed: ") and "No space left" in last, log
        assert "HINT: make room" in last
        assert site.cluster.field(number, "ExitCode") == "2:0"
    finally:
        subprocess.run([*inside, "umount", "--lazy", folder], check=True)


RESTART = (TASK, "--nodes", 3, "--elastic", "--epochs", 8, "--set", "options.pause=0.03",
           "--set", "log.every_steps=5", "--set", "checkpoint.every_steps=10")  # fmt: skip


def test_a_node_is_lost_and_the_run_is_started_again(hosts, site):
    """`--elastic`, where ranks cannot go on in place: within the same job, on the nodes left."""
    number, _ = site.submit(*RESTART, env={"HPCTRAIN__ELASTIC__MODE": "restart"})
    site.reached(45)
    hosts.kill("n3")
    result = site.ended()
    assert [change["size"] for change in result["world"]] == [3, 2]
    assert hosts.field(number, "Restarts") == "0"
    assert "going on with n1, n2, without n3" in site.log()


def test_the_first_node_is_lost_and_the_job_is_started_again(hosts, site):
    """The same with the batch script's node: another one watches it, or the job would idle."""
    number, run = site.submit(*RESTART, env={"HPCTRAIN__ELASTIC__MODE": "restart"})
    site.reached(45)
    hosts.kill("n1")
    hosts.wait_for(number, "COMPLETED")
    result = json.loads((run / "result.json").read_text())
    assert result["world"][-1]["reason"].startswith("resumed")
    assert hosts.field(number, "Restarts") == "1"
    assert os.environ.get("SLURM_JOB_ID") is None
