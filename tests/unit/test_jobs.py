"""What is asked of Slurm about jobs, by stand-ins for its commands; and what run folders say."""

import json
import os

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.errors import Error
from hpctrain.report.compare import compare
from hpctrain.run_folder import INTERRUPTED, RESULT
from hpctrain.slurm import cli, commands, jobs
from hpctrain.slurm.examine import examine
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


def owned(run, *jobs):
    (run / "owners").mkdir(exist_ok=True)
    for number, job in enumerate(jobs):
        (run / "owners" / f"{number:04}.json").write_text(json.dumps({"job": job, "again": number}))


def test_a_chain_of_jobs_is_one_run(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    run = run_of(tmp_path, "a", "4", START)
    owned(run, "4", "4", "6", "9")
    (found,) = find(tmp_path)
    assert (found.job, found.before) == ("9", ("4", "6"))
    assert named("6", tmp_path).job == "9" and named("4", tmp_path).job == "9"
    said = []
    slurm("squeue", "4|4|N/A|FAILED|None||0:00\n6|6|N/A|FAILED|None||0\n9|9|N/A|COMPLETED|None||0")
    (run / RESULT).touch()
    assert wait(Submitted(run, "4", "digits"), said.append) == 0
    assert said == ["job 9: completed"]
    slurm("squeue", "4|4|N/A|FAILED|None||0:00\n6|6|N/A|RUNNING|None|n1|0\n9|9|N/A|PENDING|None||0")
    slurm("scancel", "")
    assert jobs.cancel(Submitted(run, "4", "digits")) == ["6", "9"]
    assert slurm.calls("scancel") == 2


def test_a_wait_outlives_silence(tmp_path, slurm, monkeypatch):
    """And says so once; after a while it is an error."""
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    run = Submitted(run_of(tmp_path, "a", "4", START), "4", "digits")
    silent, answers = commands.Unanswered("squeue: no answer."), [3]

    def states(numbers):
        answers[0] -= 1
        if answers[0] >= 0:
            raise silent
        return {number: commands.State("COMPLETED") for number in numbers}

    monkeypatch.setattr(commands, "states", states)
    (run.run / RESULT).touch()
    said = []
    assert wait(run, said.append) == 0
    assert said[0].startswith("squeue: no answer. Waiting on") and len(said) == 2
    answers[0] = 3
    jobs.wait_for_all(["4"], said.append)
    answers[0] = 10**6
    monkeypatch.setattr(jobs, "SILENCE_SECONDS", 0.1)
    with pytest.raises(commands.Unanswered):
        wait(run, said.append)


BAD = ["", "[]", "[" * 100_000, '{"job": 4}', '{"job": "--user=root", "name": "x", "time": 1}',
       '{"job": "4", "name": "x", "time": "soon"}', '{"job": "4;$(x)", "name": "x", "time": 1}',
       '{"job": "4", "name": ["x"], "time": 1}',
       '{"job": "4\\n", "name": "x", "time": 1}']  # fmt: skip


def test_bad_submissions_do_not_break_a_listing(tmp_path, slurm):
    run_of(tmp_path, "good", "4", START)
    for number, text in enumerate(BAD):
        folder = tmp_path / f"bad-{number}"
        folder.mkdir()
        (folder / "submission.json").write_text(text)
    (tmp_path / "pipe").mkdir()
    for name in ("submission.json", "metrics.jsonl", "failure.json", "x.out"):
        os.mkfifo(tmp_path / "pipe" / name)
    assert progress(tmp_path / "pipe").steps == 0 and outcome(tmp_path / "pipe") is None
    said = []
    assert [run.job for run in find(tmp_path, said.append)] == ["4"]
    assert len(said) == len(BAD) + 1


@pytest.mark.slow
@given(st.binary() | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(json.dumps))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_run_folder_can_be_listed(tmp_path, junk):
    text = junk if isinstance(junk, bytes) else junk.encode()
    (tmp_path / "owners").mkdir(exist_ok=True)
    for name in ("submission.json", "metrics.jsonl", "failure.json", "owners/0000.json"):
        (tmp_path / name).write_bytes(text)
    assert find(tmp_path, lambda text: None) == []
    assert progress(tmp_path).steps == 0
    assert outcome(tmp_path) is None


def test_orders_to_the_terminal(tmp_path, slurm):
    run = run_of(tmp_path, "a", "4", START)
    about = {"job": "4", "name": "x\x1b]0;owned\x07", "time": 1}
    (run / "submission.json").write_text(json.dumps(about))
    failure = {"what": "E\x1b[2J", "message": "m\r", "rank": 1, "exit_code": 3}
    (run / FAILURE).write_text(json.dumps(failure))
    (run / "x.out").write_text("a\x1b[31m\n")
    slurm("squeue", "4|4|N/A|FAILED|None||0:00")
    for words in ([], ["wait", "4"], ["logs", "4"]):
        said = CliRunner().invoke(cli.group, ["--runs", str(tmp_path), *words]).output
        assert said.isascii() and "\x1b" not in said and "\x07" not in said and "\r" not in said


def test_numbers_of_jobs(slurm):
    for job in ("--user=root", "-u", "4 5", "", "4;", "4_", "٤", "4\n"):
        with pytest.raises(Error, match="no number of a job"):
            commands.cancel(job)
    slurm("scancel", "")
    commands.cancel("4_5;other.cluster")
    assert slurm.calls("scancel") == 1


def test_a_wait_that_is_ended_says_that_the_job_runs_on(tmp_path, slurm, monkeypatch):
    run_of(tmp_path, "a", "4", START)

    def states(numbers):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "states", states)
    done = CliRunner().invoke(cli.group, ["--runs", str(tmp_path), "wait", "4"])
    assert done.exit_code == 130 and "job 4 runs on: " in done.output


def test_a_log_elsewhere(tmp_path):
    run = run_of(tmp_path, "a", "4", START)
    (tmp_path / "logs%").mkdir()
    (tmp_path / "logs%" / "digits-4.txt").touch()
    found = Submitted(run, "4", "digits", (), f"{tmp_path}/logs%%/%x-%j.txt")
    assert jobs.log(found) == tmp_path / "logs%" / "digits-4.txt"


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


def test_what_doctor_says_of_a_site(tmp_path, slurm):
    def findings(text):
        (tmp_path / "here.toml").write_text(text)
        found = examine({"HPCTRAIN_SITE": str(tmp_path / "here.toml")})
        return [(each.level, each.detail.partition(": ")[2], each.hint) for each in found]

    slurm("sinfo", "debug\nlong")
    slurm("srun", "srun: MPI types are...\npmi2\npmix")
    assert examine({"XDG_CONFIG_HOME": str(tmp_path)}) == []
    assert findings('[options]\npartition = "long"') == [("ok", "as this machine has it", "")]
    told = findings('mpi = "pmiks"\n[options]\npartition = "lon"\nnods = 2')
    assert [level for level, _, _ in told] == ["note"] * 3
    assert "--nods is no option" in told[0][1] and "did you mean 'nodes'" in told[0][2]
    assert told[1][1:] == ("there is no partition 'lon' here", "did you mean 'long'?")
    assert "no --mpi=pmiks" in told[2][1] and "pmix" in told[2][2]
    ((_, text, _),) = findings('launcher = "ibrun -v"')
    assert text == "its launcher ibrun is not on PATH"


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
