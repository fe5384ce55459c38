"""What benchmarks.checkpoint saves, and what it makes of measurements."""

import pytest
import torch

from benchmarks import checkpoint
from benchmarks.harness.bars import judge


@pytest.mark.parametrize("megabytes", [1, 13, 40])
def test_states_have_their_size(megabytes):
    state = checkpoint.state_of(megabytes, 0)
    assert checkpoint.nbytes(state) == pytest.approx(1e6 * megabytes, rel=1e-4)
    assert list(state) == ["model", "exp_avg", "exp_avg_sq"]
    assert not torch.equal(state["model"]["layer0.weight"], state["exp_avg"]["layer0.weight"])


def test_rates_are_bytes_by_seconds():
    times = {"blocked_ms": 1.0, "warm_restore_ms": 8.0, "cold_restore_ms": 16.0}
    rounds = [{**times, "durable_ms": each} for each in (2.0, 4.0, 8.0)]
    record = checkpoint.record_of("write", 16, 16_000_000, rounds)
    assert record["durable_GBps"] == 4.0 and record["durable_GBps_max"] == 8.0
    assert record["warm_restore_GBps"] == 2.0 and record["cold_restore_GBps"] == 1.0


@pytest.mark.parametrize("name", ["hpctrain", "torch", "dcp", "safetensors", "write"])
def test_what_is_saved_is_restored(name, tmp_path):
    state, live = checkpoint.state_of(1, 0), checkpoint.state_of(1, 1)
    times = checkpoint.one_round(checkpoint.CASES[name], state, live, tmp_path / name)
    assert times["durable_ms"] >= times["blocked_ms"] > 0
    for one, other in zip(checkpoint.flat(state), checkpoint.flat(live), strict=True):
        assert torch.equal(checkpoint.flat(state)[one], checkpoint.flat(live)[other])


def test_another_state_is_noticed(tmp_path):
    state, live = checkpoint.state_of(1, 0), checkpoint.state_of(1, 1)
    forgetful = checkpoint.Case(checkpoint.plain_save, lambda state, folder: None)
    with pytest.raises(AssertionError, match="was not restored"):
        checkpoint.one_round(forgetful, state, live, tmp_path / "case")


def test_what_held_is_said():
    def record(case, size, durable, restore, blocked):
        best = {"durable_ms": durable, "warm_restore_ms": restore, "blocked_ms": blocked}
        named = {f"{key}_min": value for key, value in {**best, "memcpy_ms": 20.0}.items()}
        return {"case": case, "state_MB": size, **named}

    records = [
        record("hpctrain", 16, 1.0, 1.0, 1.0),
        record("hpctrain", 64, 100.0, 10.0, 25.0),
        record("safetensors", 64, 120.0, 9.5, 120.0),
        record("torch", 64, 110.0, 1.0, 110.0),
    ]
    written, restored, blocked = judge(checkpoint.BARS, checkpoint.beside_others(records))
    assert written["met"] and written["value"] == pytest.approx(1.10)
    assert restored["met"] and restored["value"] == pytest.approx(0.95)
    assert not blocked["met"] and blocked["value"] == pytest.approx(0.80)
    assert judge(checkpoint.BARS, checkpoint.beside_others(records[:2])) == []
