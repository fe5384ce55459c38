"""Codecs: what comes back is close, nothing is forgotten, and garbage is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.compression.codec import (
    ErrorFeedback,
    decode_rows,
    encode_rows,
    make_codec,
    rows_capacity,
)
from hpctrain.errors import Error

SPECS = ["fp16", "bf16", "int8", "topk:0.01", "topk:0.3", "topk:1"]
DTYPES = [torch.float32, torch.float64]
LENGTHS = st.one_of(st.integers(0, 1100), st.sampled_from([256, 512, 40_000]))


def draw(length, seed, dtype=torch.float32):
    """Gradients of many magnitudes, in different places."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator, dtype=dtype)
    return values * 10 ** torch.linspace(-4, 2, length, dtype=dtype).roll(seed)


def encoded(codec, gradient):
    capacity = codec.capacity(gradient.numel(), gradient.element_size())
    out = torch.full((capacity + 8,), 0xA5, dtype=torch.uint8)
    size = codec.encode(gradient, out)
    assert size <= capacity
    assert (out[size:] == 0xA5).all()
    return out[:size]


def round_trip(codec, gradient):
    out = torch.full_like(gradient, math.nan)
    codec.decode(encoded(codec, gradient), out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@given(length=LENGTHS, seed=st.integers(0, 2**31))
def test_casts(dtype, length, seed):
    gradient = draw(length, seed, dtype)
    # Half a unit in the last place, or, of float16, of the smallest number.
    for spec, relative, absolute in (("fp16", 2**-11, 2**-25), ("bf16", 2**-8, 0)):
        error = (round_trip(make_codec(spec), gradient) - gradient).abs()
        assert (error <= gradient.abs() * relative + absolute).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(length=LENGTHS, seed=st.integers(0, 2**31))
def test_int8(dtype, length, seed):
    gradient = draw(length, seed, dtype)
    error = (round_trip(make_codec("int8"), gradient) - gradient).abs()
    for block, errors in zip(gradient.split(256), error.split(256), strict=True):
        if len(block):
            assert errors.max() <= block.abs().max() / 254 * (1 + 1e-4)


def test_int8_of_next_to_nothing():
    for value in (0.0, 1.4e-45, 3e-44, 2.5e-43, 1e-38):
        gradient = torch.tensor([value, -value, value / 3, 0.0])
        error = (round_trip(make_codec("int8"), gradient) - gradient).abs().max()
        assert error <= value / 250 + 1e-43


@pytest.mark.parametrize("dtype", DTYPES)
@given(length=LENGTHS, seed=st.integers(0, 2**31), fraction=st.sampled_from(["0.01", "0.3", "1"]))
def test_topk(dtype, length, seed, fraction):
    """So many of the largest exactly, zeros elsewhere; and nothing is nearer with so many."""
    gradient = draw(length, seed, dtype)
    sent = round_trip(make_codec(f"topk:{fraction}"), gradient)
    count = min(length, max(1, math.ceil(float(fraction) * length)))
    assert (sent != 0).sum() == count
    assert torch.equal(sent[sent != 0], gradient[sent != 0])
    wanted = gradient.abs().sort(descending=True).values[:count]
    assert torch.equal(sent.abs().sort(descending=True).values[:count], wanted)
    left, whole = (sent - gradient).square().sum(), gradient.square().sum()
    assert left <= (1 - count / max(1, length)) * whole * (1 + 1e-6)


@pytest.mark.parametrize("case", ["normal", "ties", "sample too high", "all alike"])
def test_topk_of_many(case):
    """Whatever the sampled threshold is worth, the choice is exact."""
    gradient = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    if case == "ties":
        gradient = gradient.round()
    elif case == "sample too high":
        gradient[::61] += 100
    elif case == "all alike":
        gradient.fill_(-1)
    sent = round_trip(make_codec("topk:0.05"), gradient)
    assert torch.equal(sent[sent != 0], gradient[sent != 0])
    wanted = gradient.abs().topk(10_000).values
    assert torch.equal(sent.abs().topk(10_001).values, torch.cat([wanted, torch.zeros(1)]))


def test_fractions_are_decimal():
    """7% of 100 are 7, although 0.07 * 100 > 7."""
    assert make_codec("topk:0.07").capacity(100, 4) == 7 * 8


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("length", [300, 100_000])
def test_what_is_not_finite_is_seen(spec, bad, length):
    """And not remembered."""
    gradient = torch.ones(length)
    gradient[123] = bad
    codec = make_codec(spec)
    assert not round_trip(codec, gradient).isfinite().all()
    feedback = ErrorFeedback(codec, length, torch.float32)
    feedback.encode(gradient, torch.empty(codec.capacity(length, 4), dtype=torch.uint8))
    assert feedback.residual.isfinite().all()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if make_codec(spec).feedback])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_feedback_forgets_nothing(spec, dtype):
    """The weights less what is still to be sent are those of plain SGD."""
    length, rate = 700, 0.1
    codec = make_codec(spec)
    feedback = ErrorFeedback(codec, length, dtype)
    weights, plain = torch.zeros(2, length, dtype=torch.float64)
    out = torch.empty(codec.capacity(length, dtype.itemsize), dtype=torch.uint8)
    sent = torch.empty(length, dtype=dtype)
    for step in range(50):
        gradient = draw(length, step, dtype)
        codec.decode(out[: feedback.encode(gradient, out)], sent)
        weights -= rate * sent
        plain -= rate * gradient
        assert (weights - rate * feedback.residual - plain).abs().max() < (
            1e-10 if dtype == torch.float64 else 1e-2
        )


def test_error_feedback_learns():
    """With one value of a hundred sent, a quadratic is minimised all the same."""
    target = torch.randn(200, generator=torch.Generator().manual_seed(0))
    codec = make_codec("topk:0.01")
    feedback = ErrorFeedback(codec, 200, torch.float32)
    weights, sent = torch.zeros(200), torch.empty(200)
    out = torch.empty(codec.capacity(200, 4), dtype=torch.uint8)
    for _ in range(4000):
        codec.decode(out[: feedback.encode(weights - target, out)], sent)
        weights -= 0.01 * sent
    assert (weights - target).norm() < 0.05 * target.norm()


@pytest.mark.parametrize("spec", SPECS)
@given(data=st.binary(max_size=200), length=st.integers(0, 40), double=st.booleans())
def test_garbage(spec, data, length, double):
    """Any bytes are decoded, or refused by an error of ours."""
    codec, dtype = make_codec(spec), DTYPES[double]
    size = codec.capacity(length, dtype.itemsize)
    exact = (data * (size // max(1, len(data)) + 1))[:size]
    for message in (data, exact):
        out = torch.full((length,), math.inf, dtype=dtype)
        try:
            codec.decode(torch.frombuffer(bytearray(message + b"x"), dtype=torch.uint8)[:-1], out)
        except Error:
            continue
        assert len(message) == size


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("by", [-4, -1, 1, 4])
def test_another_length_is_refused(spec, by):
    codec = make_codec(spec)
    data = torch.zeros(codec.capacity(1000, 4) + by, dtype=torch.uint8)
    with pytest.raises(Error, match="HINT"):
        codec.decode(data, torch.empty(1000))


@pytest.mark.parametrize("indices", [[-1, 3], [3, 10], [3, 3], [4, 3], [-(2**31), 2**31 - 1]])
def test_wrong_indices_are_refused(indices):
    codec = make_codec("topk:0.2")
    data = encoded(codec, torch.ones(10))
    data[8:].view(torch.int32).copy_(torch.tensor(indices))
    with pytest.raises(Error, match="HINT"):
        codec.decode(data, torch.empty(10))


@pytest.mark.parametrize("dtype", DTYPES)
@given(count=st.integers(0, 20), width=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_rows(dtype, count, width, seed):
    rows = torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed))
    values = draw(count * width, seed, dtype).view(count, width)
    out = torch.empty(rows_capacity(count, width, dtype.itemsize) + 16, dtype=torch.uint8)
    size = encode_rows(rows, values, out)
    assert size == out.numel() - 16
    back = decode_rows(out[:size], width, dtype, height=50)
    assert torch.equal(back[0], rows) and torch.equal(back[1], values)
    if count:
        with pytest.raises(Error, match="HINT"):
            decode_rows(out[: size - 1], width, dtype)
        with pytest.raises(Error, match="HINT"):
            decode_rows(out[:size], width, dtype, height=int(rows.max()))


@given(data=st.binary(max_size=200), width=st.integers(1, 9))
def test_garbage_rows(data, width):
    message = torch.frombuffer(bytearray(data + b"x"), dtype=torch.uint8)[:-1]
    try:
        rows, values = decode_rows(message, width, torch.float32, height=1000)
    except Error:
        return
    assert values.shape == (len(rows), width)
    assert rows.nbytes + values.nbytes == len(data)
    assert ((rows >= 0) & (rows < 1000)).all()


def test_specs():
    assert make_codec("none") is None
    for spec in SPECS:
        assert make_codec(spec).name == spec
    for spec in (
        "",
        "fp17",
        "topk",
        "topk:",
        "topk:0",
        "topk:1.1",
        "topk:-1",
        "topk:nan",
        "int8:1",
    ):
        with pytest.raises(Error, match="HINT"):
            make_codec(spec)
    with pytest.raises(Error, match="did you mean 'fp16'"):
        make_codec("fp61")
