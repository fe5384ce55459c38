"""What outlives losses, without MPI: the trace and its check, plans of faults, stages, fences."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.batch import Batch
from hpctrain.data.order import EpochOrder, share
from hpctrain.elastic.choose import choose
from hpctrain.elastic.membership import Meeting, Progress, Regroup
from hpctrain.errors import Error, PeerLost
from hpctrain.launch import faults
from hpctrain.train import sample_trace
from hpctrain.train.recovery import outlive
from hpctrain.world.process_reaper import ProcessReaper, identity
from tests.waiting import SECONDS

SAMPLES, BATCH = 23, 5
STEPS = -(-SAMPLES // BATCH)


def batch_of(epoch, number, place, size):
    order = EpochOrder(SAMPLES, 0, epoch)
    start, stop = number * BATCH, min(SAMPLES, (number + 1) * BATCH)
    positions = np.arange(*share(start, stop, place, size), dtype=np.uint64)
    return Batch({}, order=order, start=start, stop=stop, positions=positions, world_size=size)


def train(out, ranks, losses, steps):
    """Write what ranks would: at each loss a step is begun, and begun again by those left.

    Args:
        losses: Step -> who is lost in it, and whether the step still ended for one that is left.
    """
    files = {rank: sample_trace.SampleTrace(out, rank, 0) for rank in range(ranks)}
    members, generation = list(range(ranks)), 0
    for step in range(1, steps + 1):
        epoch, number = divmod(step - 1, STEPS)
        while True:
            for place, member in enumerate(members):
                batch = batch_of(epoch, number, place, len(members))
                files[member].begin(step, generation, epoch, batch)
            lost, ended = losses.pop(step, (None, False))
            if lost is None or len(members) == 1:
                for member in members:
                    files[member].end(step, generation, members)
                break
            if ended:
                survivor = next(member for member in members if member != lost % ranks)
                files[survivor].end(step, generation, members)
            members = [member for member in members if member != lost % ranks]
            generation += 1
            if ended:
                break


LOSSES = st.dictionaries(
    st.integers(1, 12), st.tuples(st.integers(0, 3), st.booleans()), max_size=4
)


@settings(max_examples=60)
@given(st.integers(1, 4), LOSSES, st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_trace_that_is_right_and_one_that_is_not(tmp_path_factory, ranks, losses, steps, random_):
    out = tmp_path_factory.mktemp("run")
    train(out, ranks, dict(losses), steps)
    verdict = sample_trace.check(out)
    assert verdict.wrong == []
    assert verdict.steps == steps
    # One sample more, or one less, of a step that counts.
    ended = [
        (path, number, line)
        for path in sorted((out / sample_trace.FOLDER).glob("*"))
        for number, line in enumerate(path.read_text().splitlines())
        if '"begun"' in line and counts(out, json.loads(line), path)
    ]
    path, number, text = random_.choice(ended)
    line = json.loads(text)
    if line["samples"]:
        line["samples"] = random_.choice([line["samples"][1:], line["samples"] * 2])
        lines = path.read_text().splitlines()
        lines[number] = json.dumps(line)
        path.write_text("\n".join(lines) + "\n")
        assert sample_trace.check(out).wrong


def counts(out, begun, path):
    """Whether a begun step is of the last world in which it ended."""
    worlds = []
    for other in (out / sample_trace.FOLDER).glob("*"):
        for text in other.read_text().splitlines():
            line = json.loads(text)
            if line.get("ended") == begun["begun"]:
                worlds.append((line["world"], line["members"]))
    world, members = max(worlds)
    return begun["world"] == world and int(path.stem.partition("-")[2]) in members


def test_a_trace_that_is_not_there(tmp_path):
    with pytest.raises(Error, match="no trace"):
        sample_trace.check(tmp_path)


def test_a_line_cut_off_by_a_kill(tmp_path):
    train(tmp_path, 2, {}, 3)
    path = tmp_path / sample_trace.FOLDER / "0-1.jsonl"
    path.write_text(path.read_text() + '{"begun": 4, "wor')
    assert sample_trace.check(tmp_path).wrong == []


def test_plans():
    plan = "kill:rank=3@step=40 stop:rank=1@step=80+0.01 slow:rank=2,x3 node:n2@time=5"
    kill, stop, slow, node = faults.parse(plan)
    assert kill == faults.Fault("kill", "3", 40)
    assert stop == faults.Fault("stop", "1", 80, 0.01)
    assert slow == faults.Fault("slow", "2", factor=3)
    assert node == faults.Fault("node", "n2", 1, 5)
    assert faults.parse(" ".join(map(str, (kill, stop, slow)))) == [kill, stop, slow]


@pytest.mark.parametrize("word", ["kill", "kill:rank=x", "slow:rank=1", "kill:n2", "stop:rank=1@5"])
def test_no_plan(word):
    with pytest.raises(Error, match="is no fault"):
        faults.parse(word)


@given(st.integers(1, 6), st.integers(1, 200), st.floats(1, 50), st.integers())
def test_random_plans(ranks, steps, mtbf, seed):
    plan = faults.draw(ranks, steps, mtbf, random.Random(seed))
    assert plan == faults.draw(ranks, steps, mtbf, random.Random(seed))
    assert len({fault.target for fault in plan}) == len(plan) < ranks
    assert all(fault.step < steps for fault in plan)


@pytest.mark.parametrize(
    ("environment", "mode", "why"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_mpi_ft_enable": "true"}, "ulfm", "live"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "restart", "mpirun ends all"),
        ({"HOROVOD_CONTROLLER": "gloo"}, "restart", "without MPI"),
        ({"SLURM_STEP_ID": "0"}, "restart", "--mpi=pmix"),
        ({"SLURM_STEP_ID": "0", "PMIX_RANK": "1"}, "restart", "cancel the step"),
        ({}, "restart", "not started by"),
    ],
)
def test_the_choice(environment, mode, why):
    choice = choose("auto", environment)
    assert choice.mode == mode and why in choice.why
    if mode == "restart":
        with pytest.raises(Error, match="--elastic ulfm"):
            choose("ulfm", environment)
    assert choose("off", environment).mode == "off"


class Fake:
    """A strategy whose meetings are given."""

    def __init__(self, *stages):
        self.stages = list(stages)
        self.told = []

    def meet(self, progress):
        self.told.append(progress.stage)
        return Meeting(1, [Progress(s, 0, 0) for s in self.stages.pop(0)], [], [])


@pytest.mark.parametrize("event", [PeerLost("gone"), Regroup()])
def test_stages(event):
    """After a loss all begin again with the stage of the last one."""
    seen = []
    failures = {2: [event]}

    def stage(number):
        def run(meeting):
            seen.append((number, meeting is not None))
            if failures.get(number):
                raise failures[number].pop()

        return run

    strategy = Fake([2, 1])
    outlive(strategy, [stage(n) for n in range(3)], lambda n: Progress(n, 0, 0))
    assert seen == [(0, False), (1, False), (2, False), (1, True), (2, False)]
    assert strategy.told == [2]


def test_a_loss_that_nobody_outlives():
    def stage(meeting):
        raise PeerLost("gone")

    with pytest.raises(PeerLost):
        outlive(None, [stage], lambda n: Progress(n, 0, 0))


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield process
    process.kill()
    process.wait()


def test_a_stopped_process_is_cut_off(child):
    fence = ProcessReaper({7: identity(child.pid), 8: identity()})
    child.send_signal(signal.SIGSTOP)
    with fence.watch(0.2):
        assert child.wait(SECONDS) == -signal.SIGKILL


def test_another_process_is_not(child):
    """One that runs, and one whose number belongs to another by now."""
    pid, began, *rest = identity(child.pid)
    fence = ProcessReaper({7: [pid, began + 1, *rest], 8: identity(child.pid)})
    fence.cut_off(7)
    with fence.watch(0.1):
        time.sleep(0.4)
    assert child.poll() is None
