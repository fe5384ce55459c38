"""When ranks look together whether to stop, or whether somebody wants to join."""

from hpctrain.train import interruption
from hpctrain.train.interruption import Interruption
from hpctrain.world.world import Alone


def test_looks_become_rarer_little_by_little(tmp_path, monkeypatch):
    """A few fast steps after a start, or after a loss, are no sign that the next ones are."""
    monkeypatch.setattr(interruption.signal, "signal", lambda number, handler: None)
    now = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    looks = []
    asked = Interruption(tmp_path, "USR1")
    for step in range(1, 3001):
        if step == 2000:
            asked.restart(step)
        now[0] += 0.001
        asked.look(Alone(), step, lambda step=step: bool(looks.append(step)))
    assert looks[:5] == [1, 3, 7, 15, 31] and looks[9:11] == [1023, 2000]
    assert looks[11:15] == [2001, 2003, 2007, 2015]
