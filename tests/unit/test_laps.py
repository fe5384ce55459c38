"""Where the time of a step goes: all of it goes somewhere."""

import time

import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.train import step_timer
from hpctrain.train.step_timer import PARTS, StepTimer


class Clock:
    """Moves when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.integers(0, 1000), st.booleans())))
def test_each_stretch_belongs_to_the_part_that_ended_with_it(stretches):
    clock, before = Clock(), time.perf_counter
    step_timer.time.perf_counter = clock
    try:
        watch = StepTimer(torch.device("cpu"))
        expected = dict.fromkeys(PARTS, 0.0)
        for part, passed, read in stretches:
            clock.now += passed
            watch.lap(part)
            expected[part] += passed
            if read:  # reading in between changes nothing
                watch.read()
        clock.now += 7  # belongs to nothing yet
        assert watch.read() == expected
    finally:
        step_timer.time.perf_counter = before


def test_marks_do_not_pile_up():
    watch = StepTimer(torch.device("cpu"))
    for _ in range(3 * step_timer.MOST_MARKS):
        watch.lap("compute")
    assert len(watch._marks) <= step_timer.MOST_MARKS + 1
    assert watch.read()["compute"] > 0
