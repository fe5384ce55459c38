"""The model held against measurements: what is left out does not help to predict itself."""

import json

import pytest

from benchmarks import model
from hpctrain.costmodel.inputs import Machine, Network
from hpctrain.costmodel.step import predict
from hpctrain.costmodel.strategies import Compression, strategy_of
from hpctrain.errors import Error

PLACES = [(hosts, mbits) for hosts in (2, 4, 8) for mbits in (100.0, 250.0, 1000.0)]


def point(hosts, mbits, strategy):
    """As if the formulas were right."""
    measured = {
        "hosts": hosts, "link_Mbps": mbits, "bytes": model.BYTES, "strategy": strategy,
        "seconds": 1.0, "forward_seconds": 0.03, "backward_seconds": 0.06,
        "update_seconds": 0.001, "jitter": 0.05, "cores_busy": 0.5,
    }  # fmt: skip
    record = model.fit_record(measured)
    machine = Machine(5e-10, record.update_seconds / record.bytes)
    network = Network(record.link_bytes_per_second, 0.9, 3e-4)
    step = predict(record.job, record.known_strategy, network, machine)
    seconds = step.step_seconds
    return measured | {"seconds": seconds, "seconds_low": seconds, "seconds_high": seconds}


@pytest.fixture(scope="module")
def points():
    return [point(*place, name) for place in PLACES for name in ("horovod", "ps:1+async")]


@pytest.mark.slow
def test_a_place_that_is_off_is_found_off(points):
    slower = [
        p | {"seconds": 1.5 * p["seconds"]} if (p["hosts"], p["link_Mbps"]) == (4, 250.0) else p
        for p in points
    ]
    found, records = model.predicted(slower)
    assert len(records) == len(points)
    for each in found:
        # The fit to all others knows nothing of it, and is not moved much by it when they are out.
        off = 1 / 1.5 - 1 if (each["hosts"], each["link_Mbps"]) == (4, 250.0) else 0.0
        assert each["error"] == pytest.approx(off, abs=0.1), each
    groups = {each["group"]: each for each in model.summaries(found)}
    assert groups["all"]["points"] == len(points) and groups["all"]["median_error"] < 0.05
    assert groups["all"]["largest_error"] == pytest.approx(1 / 3, abs=0.1)
    assert groups["ps+async"]["points"] == 9


def test_every_strategy_fits_its_hosts():
    for hosts in model.HOSTS:
        for full in (False, True):
            for name in model.cases_of(hosts, full):
                assert strategy_of(name, Compression).fits(hosts), (hosts, name)
        assert set(model.cases_of(hosts, False)) <= set(model.cases_of(hosts, True))


@pytest.mark.slow
def test_earlier_runs_are_read_again(tmp_path, points, capsys):
    for number, some in enumerate((points[:9], points[9:])):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"measured": some}))
    files = [str(file) for file in sorted(tmp_path.glob("*.json"))]
    model.BENCHMARK.main([*files, "--out", str(tmp_path / "out")])
    assert "ps+async" in capsys.readouterr().out
    records = json.loads((tmp_path / "out" / "records.json").read_text())
    assert len(records) == len(points)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(Error, match="no model.json"):
        model.read([tmp_path / "bad.json"])
