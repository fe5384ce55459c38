"""One run is one job's: whatever Slurm answers, or does not, and whoever else wants the folder."""

import errno
import json
import os
import threading

import pytest

from hpctrain.errors import Error
from hpctrain.slurm import commands, owner, probe, requeue, supervise
from hpctrain.slurm.diagnosis import root_cause
from hpctrain.slurm.hosts import Node
from hpctrain.slurm.owner import Claim, Elsewhere, claim, claims, hand_over

SILENCE = "Unexpected message received for job 7"  # scontrol's, when the controller is silent
REFUSAL = "Requested operation is presently disabled for job 7"
MEMORY = "SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive."


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Makes commands of Slurm, in shell; ``say`` lets one print the next line of some each time."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(requeue, "PAUSE_SECONDS", 0.01)

    def command(name, body):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$*" >> {folder}/{name}.calls\n{body}\n')
        path.chmod(0o755)

    def calls(name):
        path = folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    command.calls = calls
    command.folder = folder
    return command


def job(state, restarts=0):
    return f"echo JobId=7 JobState={state} Restarts={restarts}"


def scontrol(shows, requeues):
    """What it does, asked to show the job and to requeue it: one by one, the last ever again."""

    def each(name, bodies):
        cases = "\n".join(f"{n}) {body} ;;" for n, body in enumerate(bodies, 1))
        return (f'n=$(( $(cat $0.{name} 2>/dev/null || echo 0) + 1 )); [ $n -gt {len(bodies)} ] && '
                f"n={len(bodies)}\necho $n > $0.{name}\ncase $n in\n{cases}\nesac")  # fmt: skip

    return f'case "$*" in\n*requeue*) {each("r", requeues)} ;;\n*) {each("s", shows)} ;;\nesac'


def refuse(text):
    return f"echo '{text}'; exit 1"


@pytest.mark.parametrize("answer", [refuse(SILENCE), "kill -TERM $$", "kill -KILL $$"])
def test_an_answer_that_is_lost_is_no_refusal(slurm, answer):
    """Slurm has done it, and ends the very command that asked, with this script."""
    slurm("scontrol", scontrol([job("RUNNING"), job("PENDING", 1)], [answer]))
    slurm("sbatch", "exit 1")
    ended = iter([False] * 10 + [True] * 100)
    assert requeue.requeue("7", 0, lambda: next(ended)) is None
    assert slurm.calls("sbatch") == []


def test_silence_is_outwaited(slurm):
    silent = refuse("slurm_load_jobs error: Socket timed out on send/recv operation")
    slurm("scontrol", scontrol([silent, silent, job("RUNNING")], [refuse(SILENCE), "true"]))

    def asked():
        return sum("requeue" in call for call in slurm.calls("scontrol"))

    assert requeue.requeue("7", 0, lambda: asked() == 2) is None
    assert asked() == 2


def test_a_refusal_of_a_job_that_runs(slurm):
    slurm("scontrol", scontrol([job("RUNNING")], [refuse(REFUSAL)]))
    refusal = requeue.requeue("7", 0, lambda: False)
    assert "presently disabled" in refusal.message


def test_a_refusal_of_a_job_that_is_in_the_queue_already(slurm):
    slurm("scontrol", scontrol([job("RUNNING"), job("PENDING", 1)], [refuse(REFUSAL)]))
    ended = iter([False] * 3 + [True] * 100)
    assert requeue.requeue("7", 0, lambda: next(ended)) is None


def test_silence_has_an_end(slurm, monkeypatch):
    monkeypatch.setattr(requeue, "SILENCE_SECONDS", 0.2)
    slurm("scontrol", scontrol([refuse(SILENCE)], ["true"]))
    with pytest.raises(commands.Unanswered, match="does not answer"):
        requeue.requeue("7", 0, lambda: False)


def test_a_chain_is_submitted_once(slurm, tmp_path, monkeypatch):
    """Also where sbatch's answer is lost; and the next job inherits nothing of this one's."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.sbatch").touch()
    claim(run, "7", 3, None)
    slurm("sbatch", f"env > {tmp_path}/env; " + refuse(SILENCE))
    slurm("squeue", "echo '8|afterany:71(unfulfilled)'; echo '9|afterany:7(unfulfilled)'")
    assert requeue.chain("7", run, run, lambda: False) == "9"
    assert len(slurm.calls("sbatch")) == 1
    given = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    assert not [name for name in given if name.startswith("SLURM_")]
    assert given[requeue.CONTINUES] == "7" and given["HPCTRAIN_RUN"] == str(run)
    assert claims(run)[-1] == Claim(job="9", again=4, continues="7")


# Whose a run folder is.


def test_one_job_after_another(tmp_path, slurm):
    slurm("scontrol", "echo JobId=7 JobState=RUNNING Restarts=0")
    assert claim(tmp_path, "7", 0, None).again == 0
    assert claim(tmp_path, "7", 2, None).again == 2
    with pytest.raises(Elsewhere, match="job 7 was started again"):
        claim(tmp_path, "7", 1, None)  # an old start, on a node that was cut off
    with pytest.raises(Error, match="belongs to job 7, which is RUNNING. HINT: choose another"):
        claim(tmp_path, "8", 0, None)
    hand_over(tmp_path, "7", "9")
    assert claim(tmp_path, "9", 0, "7") == Claim(job="9", again=3, continues="7")
    for number, continues in (("7", None), ("10", "7")):  # put back by others; submitted twice
        with pytest.raises(Elsewhere, match="the run went on as job 9"):
            claim(tmp_path, number, 3, continues)
    slurm("scontrol", "echo JobId=9 JobState=FAILED Restarts=0")
    assert claim(tmp_path, "11", 0, None) == Claim(job="11")
    slurm("scontrol", "echo slurm_load_jobs error: Invalid job id specified; exit 1")
    assert claim(tmp_path, "12", 0, None).job == "12"
    assert [each.job for each in claims(tmp_path)] == ["7", "7", "9", "11", "12"]


def test_of_many_that_go_on_with_a_run_one_does(tmp_path):
    for _ in range(20):
        run = tmp_path / os.urandom(4).hex()
        run.mkdir()
        claim(run, "1", 0, None)
        won, lost = [], []

        def go_on(number, run=run, won=won, lost=lost):
            try:
                won.append(claim(run, str(number), 0, "1").job)
            except Elsewhere:
                lost.append(number)

        threads = [threading.Thread(target=go_on, args=(number,)) for number in range(2, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and len(lost) == 5
        assert claims(run)[-1].job == won[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": "--user=root"}', "[" * 100_000])
def test_claims_that_are_none(tmp_path, content, monkeypatch):
    monkeypatch.setattr(owner, "ASK_SECONDS", 0.1)
    (tmp_path / "owners").mkdir()
    (tmp_path / "owners" / "0000.json").write_text(content)
    os.mkfifo(tmp_path / "owners" / "0001.json")
    assert claims(tmp_path) == []
    assert claim(tmp_path, "7", 0, None).job == "7"
    assert [each.job for each in claims(tmp_path)] == ["7"]


# Which nodes are left.

NODES = [Node("n1", 1), Node("n2", 1), Node("n3", 1)]


@pytest.fixture
def quick(monkeypatch):
    for name in ("REFUSED_SECONDS", "SILENCE_SECONDS", "PAUSE_SECONDS"):
        monkeypatch.setattr(probe, name, 0.05)


@pytest.mark.parametrize("mine", ["n1", None])
def test_a_lost_node(slurm, quick, mine, monkeypatch):
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    if mine:
        monkeypatch.setenv("SLURMD_NODENAME", mine)
    slurm(
        "srun", 'case "$*" in *=n3*) echo "srun: error: Required node not available"; exit 1;; esac'
    )
    assert probe.present(NODES, os.environ) == NODES[:2]


@pytest.mark.parametrize("nodes", [NODES, NODES[:1]])
def test_where_nothing_answers_srun_is_doubted(slurm, quick, monkeypatch, nodes):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    slurm("srun", refuse(f"srun: fatal: {MEMORY}"))
    with pytest.raises(probe.Doubt, match="mutually exclusive"):
        probe.present(nodes, os.environ)


def test_slurm_falls_silent_meanwhile(slurm, quick, monkeypatch):
    """The control answers at first, and not when it is asked again."""
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    silent = "echo srun: error: Unable to contact slurm controller; exit 1"
    slurm(
        "srun",
        f'case "$*" in *=n1*) [ -e $0.asked ] || {{ touch $0.asked; exit 0; }};; esac; {silent}',
    )
    with pytest.raises(probe.Doubt):
        probe.present(NODES, os.environ)


@pytest.mark.parametrize(
    ("output", "what", "words"),
    [
        (f"srun: fatal: {MEMORY}\n", "srun", "mutually exclusive. HINT: "),
        ("srun: error: Invalid --exclusive specification\n", "srun", "Invalid --exclusive"),
        ('srun: error: unrecognized --cpu-bind argument "x"\nsrun: fatal: Failed to parse '
         "--cpu-bind= values.\n", "srun", 'argument "x"; Failed to parse --cpu-bind= values. HINT'),
        ("srun: error: n1: task 0: Exited with exit code 2\nslurmstepd-n1: error: execve(): "
         "hpctrain: No such file or directory\n", "cannot start", "unset SLURM_EXPORT_ENV"),
    ],
)  # fmt: skip
def test_srun_that_cannot_start(tmp_path, output, what, words):
    failure = root_cause(tmp_path, output, 1, "srun")
    assert failure.what == what and words in str(failure)
    assert str(failure).count("\n") == 0


def test_a_hiccup_of_the_file_system(monkeypatch):
    monkeypatch.setattr(supervise, "NOTES_SECONDS", 0.01)
    answers = [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "i/o"), "there"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert supervise.steadily(read) == "there"
    monkeypatch.setattr(supervise, "HICCUP_SECONDS", 0.0)
    answers += [OSError(errno.ESTALE, "stale")] * 9
    with pytest.raises(OSError, match="stale"):
        supervise.steadily(read)


@pytest.mark.slow
def test_a_healthy_job_outlives_hiccups(tmp_path, monkeypatch, slurm, capfd):
    """Its ranks' notes cannot be read while it runs: for a second, ESTALE."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "1",
                        "SLURM_TASKS_PER_NODE": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    run = tmp_path / "run"
    slurm("launcher", f"sleep 3; echo '{{}}' > {run}/result.json")
    asked = []

    def stale(folder):
        asked.append(folder)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(supervise, "read_notes", stale)
    one = supervise.Job(["launcher"], run, max_requeues=1, relaunches=0)
    assert one.supervise() == 0 and asked
    assert json.loads((run / "owners" / "0000.json").read_text())["job"] == "7"


@pytest.mark.parametrize(
    "said",
    ["Unable to confirm allocation for job 7: Socket timed out on send/recv",
     "Task launch for StepId=7.0 failed on node n2: Job credential expired"],
)  # fmt: skip
def test_srun_is_started_again(said, tmp_path, monkeypatch, slurm, capfd):
    """Where it says that it has started nothing: Slurm was silent, or a node too busy."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "1",
                        "SLURM_TASKS_PER_NODE": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    run = tmp_path / "run"
    slurm("srun", f"[ -e $0.asked ] || {{ touch $0.asked; echo 'srun: error: {said}'; exit 1; }}\n"
          f"echo '{{}}' > {run}/result.json")  # fmt: skip
    one = supervise.Job(["srun"], run, max_requeues=1, relaunches=0)
    assert one.supervise() == 0
    assert len(slurm.calls("srun")) == 2
    assert f"srun: {said}; asking again" in capfd.readouterr().out


def test_srun_is_not_started_again_where_ranks_may_run():
    assert not commands.not_started("srun: error: Socket timed out on send/recv operation")
    assert not commands.not_started("Unable to create step for job 7: Invalid generic resource")
    assert not supervise._patience("Task launch for StepId=7.0 failed on node n2: Socket timed out")


def test_signals_that_nobody_can_catch():
    for name in ("KILL", "SIGSTOP", "nonsense"):
        with pytest.raises(Error, match="HINT"):
            supervise.catchable(name)
    assert supervise.catchable("int").name == "SIGINT"
