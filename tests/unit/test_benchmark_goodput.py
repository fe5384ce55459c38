"""Goodput of runs whose steps are known: what was lost is found, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.goodput import Kill, Step, Watch, goodput_of
from hpctrain.errors import Error

BATCH = 96


def run_of(sample_seconds, rest, plan, *, stall=0.0, join=0.0):
    """Steps of a run: for each world of the plan its ranks, how many steps, and who is killed.

    A step that is cut short is begun again at once; ``stall`` comes on top of it, and ``join`` on
    top of the first step with a new rank.
    """
    steps, kills, now, number = [], [], 0.0, 0
    for index, (members, count) in enumerate(plan):
        world = frozenset(members)
        took = sample_seconds * BATCH / len(world) + rest
        if index:
            before = frozenset(plan[index - 1][0])
            if gone := before - world:
                kills += [Kill(now, each) for each in gone]
                now += stall
            now += join if world - before else 0.0
        for _ in range(count):
            now, number = now + took, number + 1
            steps.append(Step(number, now, BATCH, world))
    return steps, kills


PLAN = [([0, 1, 2, 3], 50), ([0, 1, 2], 20), ([0, 1, 2, 4], 50), ([1, 2, 4], 10), ([1, 2, 4, 5], 9)]


@given(st.floats(1e-4, 1e-2), st.floats(0, 0.05))
def test_a_run_that_loses_nothing_loses_nothing(sample_seconds, rest):
    steps, kills = run_of(sample_seconds, rest, PLAN)
    found = goodput_of(steps, kills, BATCH, sample_seconds)
    assert found["goodput"] == pytest.approx(1.0)
    assert found["step_ms"] == pytest.approx(1e3 * (sample_seconds * BATCH / 4 + rest))
    assert 3 < found["mean_ranks"] < 4


@given(st.floats(0.001, 2), st.floats(0.001, 2))
def test_what_is_lost_is_found(stall, join):
    steps, kills = run_of(1e-3, 0.002, PLAN, stall=stall, join=join)
    of_three, of_four = (BATCH / (1e-3 * BATCH / ranks + 0.002) for ranks in (3, 4))
    done = BATCH * (len(steps) - 1)
    # There are three ranks while they recover, and four while one of them joins.
    lost = 2 * stall * of_three + 2 * join * of_four
    found = goodput_of(steps, kills, BATCH, 1e-3)
    assert found["goodput"] == pytest.approx(done / (done + lost))


def test_the_step_that_is_cut_short_is_lost_with_all_ranks():
    steps = [Step(n, 0.1 * n, BATCH, frozenset(range(4))) for n in range(1, 11)]
    steps.append(Step(11, 1.25, BATCH, frozenset(range(3))))
    found = goodput_of(steps, [Kill(1.05, 3)], BATCH, 4 * 0.1 / BATCH)
    of_four = BATCH / 0.1
    possible = 0.95 * of_four + 0.2 * of_four * 3 / 4
    assert found["goodput"] == pytest.approx(10 * BATCH / possible)


def test_a_run_without_rest_is_told():
    steps = [Step(n, float(n), BATCH, frozenset(range(4))) for n in (1, 2)]
    with pytest.raises(Error, match="never together"):
        goodput_of(steps, [Kill(1.5, 0)], BATCH, 1e-3)


def test_steps_are_followed_while_they_are_written(tmp_path):
    folder = tmp_path / "trace"
    watch = Watch(tmp_path)
    watch.look()
    assert not watch.steps and not watch.living
    folder.mkdir()
    lines = [{"process": 1, "host": "h"}, {"begun": 1, "start": 96, "stop": 190}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "0-2.jsonl").write_text(text)
    watch.look()
    with (folder / "0-2.jsonl").open("a") as file:
        file.write('{"ended": 1, "members": [2')
        file.flush()
        watch.look()
        assert not watch.steps
        file.write(", 5]}\n")
    (folder / "0-5.jsonl").write_text('{"ended": 1, "members": [2, 5]}\n')
    watch.look()
    (step,) = watch.steps
    assert (step.number, step.samples, step.members) == (1, 94, {2, 5}) and watch.living == {2, 5}
