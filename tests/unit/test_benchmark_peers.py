"""What benchmarks.peers makes of measurements, and that its cases train the same."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch

from benchmarks import peers, peers_cases, peers_models
from benchmarks.harness.bars import judge
from benchmarks.harness.rounds import spread_of
from benchmarks.harness.tables import spread


def result(step_ms, moved=1.0, losses=(2.0, 1.0)):
    return {"step_ms": step_ms, "moved": np.full((2, 5), moved), "losses": np.array(losses)}


def test_spread():
    record = spread_of("step_ms", [3.0, 1.0, 2.5])
    assert record == {"step_ms": 2.5, "step_ms_min": 1.0, "step_ms_max": 3.0}
    assert spread(record, "step_ms") == "2.5 (1..3)"
    assert spread_of("step_ms", []) == {}
    assert spread({"failed": ["why"]}, "step_ms") == "failed"


def test_those_that_come_to_something_else_fail():
    results = {"a": result(1.0), "b": result(1.0, 1.0 + 1e-6), "c": result(1.0, 1.01)}
    results |= {"d": result(1.0, losses=(2.0, 1.1)), "e": {"failed": "exit code 1"}}
    peers.check_round(results)
    assert [name for name, each in results.items() if "failed" in each] == ["c", "d", "e"]
    assert results["c"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert results["d"]["loss_error"] == pytest.approx(0.1, rel=1e-3)


def test_parameters_that_are_not_numbers_fail():
    results = {"a": result(1.0), "b": result(1.0), "c": result(1.0, np.nan)}
    peers.check_round(results)
    assert "failed" in results["c"]


def test_ratios_are_of_one_round():
    fast = [{"step_ms": 10.0, "error": 0.0}, {"step_ms": 40.0, "error": 0.0}]
    slow = [{"step_ms": 20.0, "error": 0.0}, {"step_ms": 20.0, "error": 0.0}]
    variables = {"group": "g", "case": "horovod", "network": "1000"}
    record = peers.beside_ddp(variables, fast, slow)
    ends = [record[f"speed_over_ddp{end}"] for end in ("", "_min", "_max")]
    assert ends == [1.25, 0.5, 2.0] and record["step_ms"] == 25.0 and record["rounds"] == 2
    assert next(iter(record)) == "group"
    (verdict,) = judge(peers.BARS, [record])
    assert verdict["met"] and verdict["value"] == 1.25


def test_a_failed_round_is_told_and_left_out():
    rounds = [{"failed": "exit code 1"}, {"step_ms": 4.0}]
    record = peers.beside_ddp({"case": "ps"}, rounds, [{"step_ms": 8.0}, {"failed": "x"}])
    assert record["failed"] == ["exit code 1"] and record["step_ms"] == 4.0
    assert "speed_over_ddp" not in record and record["rounds"] == 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_173_962), ("mlp_25M", 25_198_602), ("mlp_2M", 2_109_450)],
)
def test_models(name, parameters):
    kind = peers_models.MODELS[name]
    with torch.device("meta"):
        model = kind.build()
        assert model(torch.empty(kind.batch, *kind.shape)).shape == (kind.batch, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_rpc_server_takes_means():
    """A worker's share of the batch each, against steps with the whole batch."""
    torch.manual_seed(0)
    alone = torch.nn.Linear(4, 3)
    server = peers_cases.RpcServer(alone, workers=2)
    optimizer = peers_cases.sgd(alone.parameters())
    worker = copy.deepcopy(alone)
    for _ in range(3):
        x, y = torch.randn(2, 8, 4), torch.randint(3, (2, 8))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(alone(x.flatten(0, 1)), y.flatten()).backward()
        optimizer.step()
        answers = []
        for part in range(2):
            worker.zero_grad()
            torch.nn.functional.cross_entropy(worker(x[part]), y[part]).backward()
            answers.append(server.update([p.grad for p in worker.parameters()]))
            assert answers[part].done() == (part == 1)
        with torch.no_grad():
            for parameter, value in zip(worker.parameters(), answers[0].wait(), strict=True):
                parameter.copy_(value)
    for ours, reference in zip(worker.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)


def test_ranks_train_on_parts_of_the_same_batches():
    """Each rank's own steps; the pool of batches comes round."""
    seen = []

    @contextlib.contextmanager
    def case(place, model, optimizer):
        def step(x, y):
            seen.append((place.rank, x, y))
            return torch.zeros(())

        yield step

    kind = peers_models.Kind(lambda: torch.nn.Linear(3, 10), (3,), 2)
    for rank in range(2):
        place = peers_cases.Place(rank, 2, "", torch.device("cpu"))
        record, moved = peers_cases.train(case, kind, place, steps=peers_cases.POOL)
        assert len(record["times_ms"]) == peers_cases.POOL and not moved.any()
    mine, others = (list(each) for _, each in itertools.groupby(seen, key=lambda each: each[0]))
    assert len(mine) == len(others) == peers_cases.WARM_UP + peers_cases.POOL
    assert torch.equal(mine[0][1], mine[peers_cases.POOL][1])
    assert not any(torch.equal(a[1], b[1]) for a in mine for b in others)
