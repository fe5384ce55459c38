"""What is asked of Slurm about jobs, by stand-ins for its commands; and what run folders say."""

import json

import pytest

from hpctrain.compare import compare
from hpctrain.errors import Error
from hpctrain.run_folder import INTERRUPTED, RESULT
from hpctrain.slurm import commands
from hpctrain.slurm.jobs import Submitted, describe, find, named, outcome, progress, wait
from hpctrain.slurm.supervise import FAILURE


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Makes commands that print what they are given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def command(name, output, code=0):
        path = folder / name
        path.write_text(f"#!/bin/sh\necho x >> {folder}/{name}.calls\ncat <<'E'\n{output}\nE\n"
                        f"exit {code}\n")  # fmt: skip
        path.chmod(0o755)

    def calls(name):
        path = folder / f"{name}.calls"
        return len(path.read_text().split()) if path.exists() else 0

    command.calls = calls
    for name in ("squeue", "sacct", "scontrol"):
        command(name, "slurm_load_jobs error: Unable to contact slurm controller", 1)
    return command


def test_one_question_for_many(slurm):
    slurm("squeue", "4|4|N/A|RUNNING|None|n[1-2]|9:58\n9|7|2|PENDING|Resources||10:00")
    states = commands.states(["4", "7_2"])
    assert states["4"] == commands.State("RUNNING", "n[1-2]", "9:58")
    assert states["7_2"].name == "PENDING" and not states["7_2"].over
    assert slurm.calls("squeue") == 1 and slurm.calls("sacct") == 0


def test_what_squeue_has_forgotten(slurm):
    slurm("squeue", "")
    slurm("sacct", "4|CANCELLED by 1000|n1\n5|COMPLETED|n2\n6|TIMEOUT+|n2")
    states = commands.states(["4", "5", "6"])
    assert [states[job].name for job in "456"] == ["CANCELLED", "COMPLETED", "TIMEOUT"]
    assert all(state.over for state in states.values())


def test_scontrol_alone(slurm):
    lost = "JobId=4 JobState=NODE_FAIL NodeList=n1"
    slurm("scontrol", f"{lost}\nJobId=9 ArrayJobId=7 ArrayTaskId=2 JobState=RUNNING NodeList=n3")
    states = commands.states(["4", "7_2"])
    assert states["4"].over and states["4"].name == "NODE_FAIL"
    assert states["7_2"] == commands.State("RUNNING", "n3")


def test_nobody_answers(slurm):
    with pytest.raises(Error, match="neither squeue nor sacct nor scontrol"):
        commands.states(["4"])


def run_of(folder, name, job, *records):
    run = folder / name
    run.mkdir(parents=True)
    about = {"job": job, "name": "digits", "time": int(job)}
    (run / "submission.json").write_text(json.dumps(about))
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tr']))
    return run


START = {"kind": "event", "step": 0, "time": 100.0, "size": 2, "reason": "start", "steps": 50}
AGAIN = {**START, "step": 20, "time": 200.0}


def train(step, time, **values):
    return {"kind": "train", "step": step, "time": time, **values}


def test_progress(tmp_path):
    values = {"loss": 0.5, "samples_per_second": 80.0}
    run = run_of(tmp_path, "a", "4", START, train(20, 110.0), AGAIN, train(30, 220.0, **values))
    far = progress(run)
    assert (far.step, far.steps, far.loss, far.samples_per_second) == (30, 50, 0.5, 80.0)
    assert far.seconds_left == 40.0  # 20 steps, of 2 seconds since it was started again
    assert far.restarts == 1
    assert progress(tmp_path / "none").steps == 0


def test_runs_by_their_names(tmp_path):
    old, new = (run_of(tmp_path, name, job, START) for name, job in (("a", "4"), ("b", "5")))
    assert [run.job for run in find(tmp_path)] == ["4", "5"]
    assert named("digits", tmp_path).run == new
    assert named("4", tmp_path).run == old
    assert named(str(old), tmp_path).job == "4"
    with pytest.raises(Error, match="did you mean 'digits'"):
        named("digts", tmp_path)


def test_how_runs_end(tmp_path, slurm):
    run = Submitted(run_of(tmp_path, "a", "4", START), "4", "digits")
    slurm("squeue", "4|4|N/A|FAILED|NonZeroExitCode||0:00")
    said = []
    assert wait(run, said.append) == 1
    assert "FAILED, without a result" in said[-1]
    (run.run / INTERRUPTED).touch()
    assert wait(run, said.append) == 75
    failure = {"what": "ValueError", "message": "m", "rank": 1, "exit_code": 3}
    (run.run / FAILURE).write_text(json.dumps(failure))
    assert outcome(run.run) == ("failed: rank 1: ValueError: m", 3)
    assert wait(run, said.append) == 3
    (run.run / RESULT).touch()
    assert wait(run, said.append) == 0
    assert describe(run, commands.State("RUNNING", "n1")) == "RUNNING (n1)"
    assert describe(run, None) == "completed"


def test_more_than_a_partition_has(slurm):
    slurm("sinfo", "debug|3|2:00:00|debug*\ndebug|1|2:00:00|debug*\nlong|2|infinite|long")
    commands.fits({"nodes": "4", "time": "120"})
    commands.fits({"partition": "long", "time": "9-0"})
    commands.fits({"partition": "not-shown", "nodes": "9"})
    commands.fits({"clusters": "other", "partition": "long", "nodes": "9"})
    for asked, message in (
        ({"nodes": "5"}, "5 nodes: partition debug has 4"),
        ({"time": "2:00:01"}, "partition debug allows 2:00:00"),
    ):
        with pytest.raises(Error, match=message):
            commands.fits(asked)


def test_comparing_runs(tmp_path):
    def event(size):
        return {**START, "size": size}

    speeds = {1: (50.0, 100.0, 102.0, 98.0), 4: (90.0, 300.0, 320.0, 340.0)}
    runs = [
        run_of(tmp_path, f"r{size}", str(size), event(size),
               *(train(n, 1.0, samples_per_second=speed) for n, speed in enumerate(some)))
        for size, some in speeds.items()
    ]  # fmt: skip
    first, second = compare(runs[::-1])
    assert (first.ranks, first.samples_per_second, first.efficiency) == (1, 100.0, 1.0)
    assert (second.ranks, second.samples_per_second, second.efficiency) == (4, 320.0, 0.8)
    with pytest.raises(Error, match="has no metrics"):
        compare([tmp_path])
