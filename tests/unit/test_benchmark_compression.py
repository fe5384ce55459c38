"""Where encoding pays, and what benchmarks.compression makes of measurements."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compression
from hpctrain.compression.codec import make_codec


@given(
    count=st.integers(1, 10**9),
    part=st.floats(0.001, 1),
    encode=st.floats(1e-5, 10),
    decode=st.floats(1e-5, 10),
    rate=st.floats(1e-3, 1e4),
)
def test_encoding_pays_below_the_break_even_rate(count, part, encode, decode, rate):
    encoded = int(part * count)
    limit = compression.break_even_gbps(count, encoded, encode, decode)
    dense_seconds = 8e-9 * count / rate
    coded_seconds = encode + 8e-9 * encoded / rate + decode
    if rate < 0.999 * limit:
        assert coded_seconds < dense_seconds
    if rate > 1.001 * limit:
        assert coded_seconds > dense_seconds


def test_what_grows_never_pays():
    assert compression.break_even_gbps(100, 120, 1.0, 1.0) == 0


def test_slices_are_decoded_where_they_belong():
    gradient = torch.randn(compression.SLICE + 1000)
    codec = make_codec("fp16")
    slices = compression.Slices(codec, gradient)
    slices.encode()
    slices.decode()
    assert torch.equal(slices.decoded, gradient.half().float())
    assert sum(slices.sizes) == 2 * gradient.numel()


def test_records_of_codecs():
    fp16, topk = compression.measure_codecs(["fp16", "topk:0.01"], 50_000, rounds=1)
    assert fp16["ratio"] == 2 and 0 < fp16["error"] < 1e-3
    assert topk["ratio"] == pytest.approx(50, rel=0.01) and 0.5 < topk["error"] < 1
    assert min(fp16["encode_GBps"], fp16["decode_GBps"], fp16["break_even_Gbps"]) > 0


def test_steps_are_compared_within_a_round():
    results = [{"step_ms": 10.0, "drift": 0.1}, {"step_ms": 20.0, "drift": 0.1}]
    dense = [{"step_ms": 30.0, "drift": 0.0}, {"step_ms": 20.0, "drift": 0.0}]
    record = compression.step_record(100.0, "int8", results, dense)
    assert record["speed_over_dense"] == 2.0 and record["speed_over_dense_max"] == 3.0
    assert record["drift"] == 0.1 and record["link_Mbps"] == 100.0
