"""What the benchmarks of losses read out of a run's files."""

import json
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import elastic_hosts, elastic_overhead
from benchmarks.elastic_engines import ENGINES, LISTED, PROBED, Work
from benchmarks.elastic_tasks import Process
from hpctrain.train import sample_trace
from tests.unit.test_elastic import train


def test_samples_that_were_taken_twice_and_never(tmp_path):
    train(tmp_path, 3, {4: (1, False), 6: (0, True)}, 8)
    assert elastic_hosts.samples(tmp_path) == (0, 0, 0)
    path = tmp_path / sample_trace.FOLDER / "0-2.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    step = next(line for line in lines if line.get("begun") == 7 and line["samples"])
    other = next(line for line in lines if line.get("begun") == 8)
    step["samples"][0] = other["samples"][0]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert elastic_hosts.samples(tmp_path) == (0, 1, 1)


def test_steps_that_were_done_again(tmp_path):
    train(tmp_path, 2, {}, 4)
    for path in (tmp_path / sample_trace.FOLDER).glob("*"):
        # As after a loss: back to a state that had been kept before steps 3 and 4.
        text = path.read_text().split('{"begun": 3', 1)[1]
        again = ('{"begun": 3' + text).replace('"world": [0, 0]', '"world": [0, 1]')
        path.write_text(path.read_text() + again)
    assert elastic_hosts.samples(tmp_path) == (2, 0, 0)


@given(
    st.lists(st.floats(0.01, 0.2), min_size=4, max_size=30),
    st.floats(0.5, 90),
    st.floats(0, 1),
    st.data(),
)
def test_a_stall_is_found(steps, stall, moment, data):
    """Also where steps that were under way end after the fault."""
    place = data.draw(st.integers(1, len(steps) - 1))
    late = data.draw(st.integers(0, place - 1).map(lambda n: min(n, 2)))
    steps[place] = stall
    ends = np.cumsum(steps).tolist()
    begin = ends[place - 1 - late]
    hit = begin + moment * (ends[place - late] - begin) * 0.99
    assert elastic_hosts.stall_seconds(ends, hit) == pytest.approx(stall)
    assert elastic_hosts.stall_seconds(ends, ends[-1] + 1) is None


@pytest.mark.parametrize(
    ("hosts", "kind", "lost"),
    [
        ("n1 n2 n3", "worker", "n3"),
        ("n3 n2 n1", "cable", "n2"),
        ("n3 n2 n1", "first", "n1"),
        ("n4 n2 n3", "first", "n4"),
        ("n4 n2 n3", "worker", "n3"),
    ],
)
def test_which_host_is_lost(hosts, kind, lost):
    workers = [Process(host, rank, []) for rank, host in enumerate(hosts.split())]
    assert elastic_hosts.target(kind, "n1", workers) == lost


@pytest.mark.parametrize("name", ["stock", "stock-tuned"])
def test_job_scripts(tmp_path, name):
    script = ENGINES[name].script(Work("digits", None, 36, 60), tmp_path)
    for text in (script, LISTED, PROBED):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert '"rank_batch_size": 12' in script
    assert f"--nodes={4 if name == 'stock-tuned' else 3} " in script


@settings(max_examples=15)
@given(st.floats(0.9, 1.1), st.integers(0, 2**32 - 1))
def test_overhead_is_that_of_the_pairs(ratio, seed):
    rng = np.random.default_rng(seed)
    off = rng.uniform(0.5, 1.5, 60)
    pairs = [(ratio * x * rng.uniform(0.98, 1.02), x) for x in off]
    record = elastic_overhead.record("Perceptron", False, pairs)
    low, high = record["ratio_interval_95"]
    assert low <= record["ratio_median"] <= high
    assert high - low < 0.03
    assert abs(record["ratio_median"] - ratio) < 0.015
