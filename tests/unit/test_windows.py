"""Windows are the rows that plain slices give, and share the memory of their arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain import Loader, Windows
from hpctrain.errors import Error


@settings(max_examples=30)
@given(st.data())
def test_windows_are_slices(data):
    rows = data.draw(st.integers(1, 40))
    length, stride = data.draw(st.integers(1, rows)), data.draw(st.integers(1, 9))
    x = np.random.default_rng(rows).normal(size=(rows, 2))
    windows = Windows({"x": x, "t": np.arange(rows)}, length, stride)
    every = [slice(s, s + length) for s in range(0, rows, stride) if s + length <= rows]
    assert len(windows) == len(every)
    chosen = data.draw(st.lists(st.sampled_from(range(len(every))), min_size=1))
    batch = windows.take(np.array(chosen))
    assert (batch["x"] == np.stack([x[every[each]] for each in chosen])).all()
    assert batch["t"].shape == (len(chosen), length) and batch["t"].dtype == np.int64


def test_a_file_is_read_where_it_lies(tmp_path):
    np.save(tmp_path / "long.npy", np.arange(1000, dtype="float32"))
    long = np.load(tmp_path / "long.npy", mmap_mode="r")
    windows = Windows({"x": long}, length=100, stride=50)
    assert np.shares_memory(windows._fields["x"], long)
    seen = np.concatenate([b["x"].numpy() for b in Loader(windows, 4, shuffle="none")])
    assert (seen == np.lib.stride_tricks.sliding_window_view(long, 100)[::50]).all()


def test_digests_tell_windows_apart():
    x = np.arange(10)
    every = [
        Windows({"x": x}, 4, 3),
        Windows({"x": x}, 4),
        Windows({"y": x}, 4),
        Windows({"x": x + 1}, 4),
    ]
    assert len({each.digest for each in every}) == 4
    assert Windows({"x": x.copy()}, 4).digest == every[1].digest


@pytest.mark.parametrize(
    ("fields", "numbers", "message"),
    [
        ({"x": [1, 2], "y": [1]}, (1,), "differ in length"),
        ({"x": [1, 2]}, (3,), "a window has 3 rows, and there are 2"),
        ({"x": [1, 2]}, (0,), "windows of length 0"),
        ({"x": [1, 2]}, (1, 0), "stride 0"),
        ({}, (1,), "differ in length"),
    ],
)
def test_mistakes_are_one_line(fields, numbers, message):
    with pytest.raises(Error, match=message) as raised:
        Windows(fields, *numbers)
    assert raised.value.hint
