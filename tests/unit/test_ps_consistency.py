"""Consistency modes: one class each, and one that this file alone knows trains."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.config import PsConfig
from hpctrain.costmodel.strategies import Compression, strategy_of
from hpctrain.errors import Error
from hpctrain.ps.consistency import MODES, consistency_of, parse, relaxed
from hpctrain.ps.consistency.base import Consistency, Grant, Schedule
from tests.unit.ps_simulation import Simulation
from tests.unit.test_ps import OPTIMIZERS, difference, replay

HERE = f"{__name__}:FirstOfRound"


class Pairs(Schedule):
    """Each update is the mean of the first ``count`` pushes that have come (Dutta et al., 2018)."""

    def __init__(self, workers, count):
        super().__init__(workers)
        self._count_of_round = count

    def next(self):
        if self._unanswered:
            worker = next(iter(self._unanswered))
            del self._unanswered[worker]
            return Grant(worker)
        if self._waiting and len(self._waiting) >= min(self._count_of_round, len(self.applied)):
            return self._apply(list(self._waiting)[: self._count_of_round])
        return None


class FirstOfRound(Consistency):
    """K-async: the K fastest make an update; who is late is part of a later one."""

    name = "first"
    example = "first:2"
    takes_number = True
    shares = "speed"

    @property
    def backups(self):
        return 1

    def schedule(self, workers):
        return Pairs(workers, self.number)


@pytest.mark.slow
@settings(max_examples=10)
@given(
    workers=st.integers(2, 4), servers=st.integers(1, 2), near=st.booleans(),
    seed=st.integers(0, 10**6), count=st.integers(1, 3),
)  # fmt: skip
def test_a_mode_of_this_file_trains(workers, servers, near, seed, count):
    config = {"consistency": f"{HERE}:{count}", "slice_bytes": 200}
    simulation = Simulation(config, workers, servers, OPTIMIZERS["sgd"], seed=seed, near=near).run(
        6
    )
    logs = simulation.logs()
    assert difference(simulation.final(), replay(simulation, logs, by_delay=False)) < 1e-12
    for log in logs.values():
        pushed = Counter(worker for _, worker, _, _ in log)
        assert pushed == dict.fromkeys(range(workers), 6)  # each step counts once
        sizes = Counter(Counter(version for version, *_ in log).values())
        assert max(sizes) <= count


def test_the_mode_of_the_documentation_trains(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "parameter-server.md").read_text()
    code = next(part for part in text.split("```python") if "class Relaxing" in part)
    (tmp_path / "relaxing.py").write_text(code.partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    leads = {}
    for updates in (1, 1000):  # before the bound is one clock more
        config = {"consistency": f"relaxing:Relaxing:{updates}", "slice_bytes": 4096}
        simulation = Simulation(config, 3, 2, OPTIMIZERS["sgd"], seed=1).run(6)
        expected = replay(simulation, simulation.logs(), by_delay=True)
        assert difference(simulation.final(), expected) < 1e-12
        leads[updates] = max(clock - slowest for _, clock, slowest in simulation.history)
    assert leads[1000] == 0 < leads[1]


def test_what_a_mode_says_of_itself_is_asked_everywhere():
    mode = consistency_of(PsConfig(consistency=f"{HERE}:2"))
    assert (mode.number, mode.shares, mode.same_weights) == (2, "speed", False)
    with pytest.raises(Error, match="1 workers cannot go on without 1 of them"):
        mode.check(1)
    cost = strategy_of(f"ps:2+{HERE}:2", lambda name: Compression(name))
    assert (cost.backups, cost.consistency) == (1, f"{HERE}:2")


def test_the_modes_that_there_are():
    assert MODES.names() == ["sync", "ssp", "async", "backup"]
    assert relaxed() == ["ssp:3", "async"]
    modes = [parse(text) for text in ("sync", "ssp:3", "async", "backup:1")]
    assert [mode.example for mode in modes] == ["sync", "ssp:3", "async", "backup:1"]
    assert [mode.same_weights for mode in modes] == [True, False, False, False]
    assert [mode.staleness for mode in modes] == [0, 3, float("inf"), 0]
    assert not consistency_of(PsConfig(pull_every=[1, 2])).same_weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spp:3", "there is no consistency 'spp:3'. HINT: did you mean 'ssp:3'"),
        ("ssp", "there is no consistency 'ssp'. HINT: did you mean 'ssp:3'"),
        ("sync:1", "there is no consistency 'sync:1'. HINT: did you mean 'sync'"),
        ("backup:-1", "there is no consistency 'backup:-1'"),
        ("gossip", "valid names: async, backup:1, ssp:3, sync"),
        ("no.such:Mode", "cannot be imported"),
        (f"{__name__}:Pairs", "is no consistency mode"),
    ],
)
def test_modes_that_there_are_not(text, message):
    with pytest.raises(Error, match=message.replace(".", r"\.")):
        parse(text)
