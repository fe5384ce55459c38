"""Advice from made-up measurements: what is listed, its ends, and the verdict."""

import json

import pytest

from hpctrain.costmodel.advise import Adviser, Span, assumptions, read_fit, row_of, sweep
from hpctrain.costmodel.inputs import Network, even_buckets, network_of
from hpctrain.costmodel.measure import Measured
from hpctrain.costmodel.strategies import Compression
from hpctrain.errors import Error

MEASURED = Measured(
    device="cpu", threads=2, samples=64, steps=20, parameter_bytes=1e8, forward_seconds=0.1,
    backward_seconds=0.2, update_seconds=0.01, flat_update_seconds=0.01, low_seconds=0.28,
    high_seconds=0.33, jitter=0.02,
    buckets=even_buckets(4), load=0.0, copy_bytes_per_second=1e10, reduce_seconds_per_byte=1e-10,
)  # fmt: skip


def codec(name):
    return Compression(name, 0.25, 1e-10, 1e-10)


def adviser(text="10Gbit", fits=None, **options):
    network = network_of(text, Network(1.0))
    return Adviser(MEASURED, network, assumptions(MEASURED, network, text), fits or {}, **options)


def test_counts_of_nodes():
    assert sweep(1) == [1] and sweep(8) == [1, 2, 4, 8] and sweep(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize("nodes", [1, 2, 3, 64])
@pytest.mark.parametrize("ranks_per_node", [1, 4])
def test_what_is_listed(nodes, ranks_per_node):
    listed = adviser(ranks_per_node=ranks_per_node).usual(nodes, codec)
    labels = [each.strategy.label for each in listed]
    if nodes * ranks_per_node == 1:
        assert labels == ["single"]
    else:
        assert labels[:2] == ["horovod", f"ps:{nodes}+colocated"]
        assert [label.rpartition("+")[2] for label in labels[3:]] == ["ssp:3", "async"]
    for row in map(row_of, listed):
        assert row["ranks"] == nodes * ranks_per_node
        for key in ("step_seconds", "samples_per_second", "efficiency"):
            assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"], key


def test_only_what_there_are_ranks_for():
    asked = ["single", "ps:2+int8", "averaging:4"]
    labels = {
        nodes: [each.strategy.label for each in adviser().named(nodes, asked, codec)]
        for nodes in (1, 2, 4)
    }
    assert labels == {1: ["single"], 2: ["averaging:4"], 4: ["ps:2+int8", "averaging:4"]}


def test_the_best_is_exact_and_the_others_are_named():
    advice = adviser("1Gbit")
    listed = advice.usual(8, codec)
    verdict = advice.verdict(listed)
    exact = [each for each in listed if each.strategy.exact]
    best = max(exact, key=lambda each: each.step.samples_per_second)
    assert verdict.startswith(f"best on 8 nodes: {best.strategy.label}, ")
    assert "bound by bandwidth" in verdict
    faster = advice.verdict(advice.named(8, ["horovod", "averaging:16"], codec))
    assert faster.startswith("best on 8 nodes: horovod") and "averaging:16 would see" in faster
    hidden = adviser("1000Gbit,latency=1ns", {"all": {}})
    assert "hides behind computing" in hidden.verdict(hidden.named(2, ["horovod"], codec))


def test_what_is_typed_is_not_in_doubt():
    given = assumptions(MEASURED, network_of("1Gbit,share=0.7", Network(1.0)), "1Gbit,share=0.7")
    assert given["link_share"] == (0.7, 0.7, 0.7)
    assert given["latency_seconds"].good < given["latency_seconds"].bad


def test_speedup_is_of_computing():
    slow, fast = (
        adviser(speedup=speed).named(4, ["horovod"], codec)[0].step for speed in (1.0, 10.0)
    )
    assert fast.compute == pytest.approx(slow.compute / 10)
    assert fast.update == pytest.approx(slow.update / 10)
    assert fast.efficiency < slow.efficiency


def test_fits_take_the_place_of_assumptions(tmp_path):
    file = tmp_path / "fit.json"
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    record = {"strategy": "horovod", "known": {"contention": 0.0}, "parameters": {
        "link_share": share}}  # fmt: skip
    file.write_text(json.dumps({"records": [record]}))
    fits = read_fit(file)
    assert fits["horovod"]["link_share"] == (0.5, 0.6, 0.4)
    fitted, assumed = adviser(fits=fits), adviser()
    for spec, same in (("horovod", False), ("ps:2", True)):
        steps = [each.named(4, [spec], codec)[0].step for each in (fitted, assumed)]
        assert (steps[0] == steps[1]) == same
    record = {"strategy": "ps", "known": {"lag_bytes": 0.0}, "parameters": {}}
    file.write_text(json.dumps({"records": [record]}))
    without = adviser(fits=read_fit(file)).named(4, ["ps:2"], codec)[0].step
    assert without.exposed < assumed.named(4, ["ps:2"], codec)[0].step.exposed


def test_the_nearest_fit_counts():
    """That of the family; else of those of its kind; else of all."""
    share = {"link_share": Span(0.5, 0.5, 0.5)}
    less = {"link_share": Span(0.1, 0.1, 0.1)}

    def step(spec, fits):
        return adviser(fits=fits).named(4, [spec], codec)[0].step

    fits = {"all": less, "ps": less, "ps+colocated+async": share}
    for spec in ("ps:4+colocated+async", "ps:4+colocated+ssp:3"):
        assert step(spec, fits) == step(spec, {"all": share})
    assert step("ps:4+colocated", fits) == step("ps:4+colocated", {"all": less})
    assert step("horovod+halving", fits) == step("horovod+halving", {"all": less})
    assert step("horovod+halving", {"horovod+halving": share}) == step(
        "horovod+halving", {"horovod": share}
    )


@pytest.mark.parametrize("content", [None, "{", "[]", '{"records": [{"strategy": "ps"}]}'])
def test_files_that_are_no_fits(tmp_path, content):
    file = tmp_path / "fit.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(Error, match="not what a fit leaves"):
        read_fit(file)
