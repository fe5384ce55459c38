"""Workers and servers of a parameter server are killed and stopped, and the others go on."""

import pytest
import torch

from benchmarks.ps_kills import Run
from hpctrain import load
from hpctrain.process import mpirun, run
from tests.e2e.conftest import result_of
from tests.slurm.conftest import TASK, slow_until
from tests.waiting import SECONDS

FAULT_TOLERANT = (*mpirun(1), "--with-ft", "ulfm", "true")
pytestmark = pytest.mark.skipif(
    run(FAULT_TOLERANT, timeout_seconds=SECONDS).returncode != 0, reason="an MPI without --with-ft"
)
EPOCHS = 8
STEPS = EPOCHS * 23
HIT_AT = 30


@pytest.fixture
def start(tmp_path):
    """Starts runs that hardly go on until their metrics tell of a loss, and ends them."""
    runs = []

    def start(workers, servers=1, *arguments, epochs=EPOCHS, until="lost", times=1):
        metrics = tmp_path / "run" / "metrics.jsonl"
        hold = slow_until(until, times, at=HIT_AT, file=metrics) if until else ()
        # A busy machine may not let a rank give a sign of life for as long as is usual.
        patience = ("--set", "ps.silence_seconds=10")
        options = (TASK, "--epochs", epochs, "--servers", servers, *hold, *patience, *arguments)
        runs.append(Run(tmp_path, workers + servers, *options))
        return runs[-1]

    yield start
    for each in runs:
        each.end()


def events(job):
    return [line for line in job.metrics() if line["kind"] == "event" and "lost" in line]


def complaints(job):
    return [line for line in job.output().splitlines() if line.startswith("hpctrain: error:")]


def assert_completed(job):
    assert job.wait(SECONDS) == "", job.output()
    result = result_of(job.folder / "run")
    assert job.process.returncode == 0
    assert result["metrics"]["final"]["val_accuracy"] > 0.9
    assert job.metrics()[-1]["step"] == result["steps"]
    return result


# Worker 0 writes the records and the checkpoints; another does when it is lost.
@pytest.mark.parametrize(
    ("consistency", "rank"),
    [
        ("sync", 0),
        ("async", 1),
        pytest.param("ssp:2", 1, marks=pytest.mark.long),
        pytest.param("backup:1", 0, marks=pytest.mark.long),
    ],
)
def test_a_killed_worker(start, consistency, rank):
    job = start(2, 1, "--consistency", consistency)
    assert job.reached(HIT_AT) and job.hit(rank, "SIGKILL"), job.output()
    result = assert_completed(job)
    assert [(e["lost"], e["role"], e["size"]) for e in events(job)] == [(rank, "worker", 1)]
    assert f"worker {rank} on " in job.output()
    assert "was lost (its process ended); going on with 1 worker" in job.output()
    assert [change["size"] for change in result["world"]] == [2, 1]
    assert (job.folder / "run" / "checkpoints" / f"step-{STEPS:08d}").is_dir()


def test_a_stopped_worker_and_a_resume(start):
    """The process lives, its sockets too, and only the clock tells."""
    job = start(3, 1, "--set", "ps.silence_seconds=4")
    assert job.reached(HIT_AT) and job.hit(2, "SIGSTOP"), job.output()
    assert_completed(job)
    (event,) = events(job)
    assert event["lost"] == 2 and "silent for " in event["reason"]
    assert event["step_ms"] > 3000
    again = start(2, 1, "--resume", "auto", epochs=EPOCHS + 2, until=None)
    result = assert_completed(again)
    assert result["steps"] == STEPS + 2 * 23
    assert [change["size"] for change in result["world"]] == [3, 2, 2]


def test_two_workers_at_once(start):
    job = start(3, 1, times=2)
    assert job.reached(HIT_AT) and job.hit(0, "SIGKILL") and job.hit(1, "SIGKILL")
    assert_completed(job)
    assert {event["lost"] for event in events(job)} == {0, 1}


def test_the_last_worker(start):
    job = start(1, 2, "--replicas", 1)
    assert job.reached(HIT_AT) and job.hit(0, "SIGKILL"), job.output()
    assert job.wait(SECONDS) == "", job.output()
    assert job.process.returncode != 0
    assert not (job.folder / "run" / "result.json").exists()
    assert all("worker is gone: worker 0" in line for line in complaints(job))
    assert complaints(job) and "Traceback" not in job.output()


def test_a_killed_server_changes_nothing(start):
    """With replicas, and in lockstep: not a bit."""
    job = start(2, 2, "--replicas", 1)
    assert job.reached(HIT_AT) and job.hit(2, "SIGKILL")  # the coordinator
    result = assert_completed(job)
    assert [(e["lost"], e["role"], e["size"]) for e in events(job)] == [(2, "server", 2)]
    (job.folder / "run").rename(job.folder / "before")
    whole = assert_completed(start(2, 2, "--replicas", 1, until=None))
    assert result["parameters_sha256"] == whole["parameters_sha256"]


def test_a_killed_server_without_replicas(start):
    job = start(2, 2)
    assert job.reached(HIT_AT) and job.hit(3, "SIGKILL"), job.output()
    assert job.wait(SECONDS) == "", job.output()
    assert job.process.returncode != 0
    assert not (job.folder / "run" / "result.json").exists()
    assert "Traceback" not in job.output()
    assert complaints(job)  # of all three, or of as many as mpirun lets speak
    for line in complaints(job):
        assert "server 3 is lost" in line and "ps.replicas=1" in line


def changes(result):
    return [(change["size"], " ".join(change["reason"].split()[:2])) for change in result["world"]]


@pytest.mark.long
def test_a_new_worker_for_a_lost_one(start):
    """It imports and builds its model while the others go on, and then has a share of the work."""
    # Most of the time between two steps of theirs is that of collectives, which it must not join.
    always = ("--set", "train.validate_every_steps=1", "--set", "log.every_steps=1")
    job = start(2, 2, "--set", "ps.workers=2", *always, until="joined")
    assert job.reached(HIT_AT) and job.hit(1, "SIGKILL"), job.output()
    result = assert_completed(job)
    assert changes(result) == [(2, "start"), (1, "worker 1"), (2, "worker 4")]
    assert "worker 4 joined; going on with 2 workers" in job.output()


def test_a_new_worker_that_comes_too_late(start):
    job = start(1, 2, "--set", "ps.workers=2", epochs=2, until=None)
    result = assert_completed(job)
    assert changes(result) == [(1, "start")]
    assert "worker 3: the run was over before it could take part." in job.output()


HELD = """
import time
from dataclasses import dataclass
from pathlib import Path
from hpctrain.tasks.dlrm import Dlrm

@dataclass
class Held(Dlrm):
    hold: str = ""
    batches: int = 0

    def loss(self, model, batch):
        self.batches += 1
        until = time.monotonic() + (0.5 if self.hold and self.batches > 8 else 0)
        while time.monotonic() < until and '"lost":' not in Path(self.hold).read_text():
            time.sleep(0.02)
        return super().loss(model, batch)
"""


def test_a_killed_servers_rows_are_its_copys(tmp_path):
    """Of an embedding table: with a copy, and in lockstep, not a bit is another."""
    (tmp_path / "held.py").write_text(HELD)
    found = []
    for hold in (tmp_path / "run" / "metrics.jsonl", ""):
        options = ("--set", f"options.hold={hold}", "--set", "options.samples=3000")
        job = Run(
            tmp_path, 4, tmp_path / "held.py", "--servers", 2, "--replicas", 1, "--steps", 30,
            "--set", "ps.silence_seconds=10", *options,
        )  # fmt: skip
        with job:
            assert not hold or (job.reached(10) and job.hit(2, "SIGKILL"))
            assert job.wait(SECONDS) == "" and job.process.returncode == 0, job.output()
            assert [event["lost"] for event in events(job)] == ([2] if hold else [])
            store = load(tmp_path / "run", "newest").table.store
            ids = store.rows.read("id", store.listed(store.rows))
            found.append((ids, store.read(ids), result_of(tmp_path / "run")["parameters_sha256"]))
        (tmp_path / "run").rename(tmp_path / f"run-{len(found)}")
    assert len(found[0][0]) > 1000
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
