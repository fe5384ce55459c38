"""Whether ranks that differ are found, and which one and what is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpctrain.errors import Error
from hpctrain.world.agreement import check_tensors, checksum, compare
from hpctrain.world.world import Alone
from tests.unit.threads import on_ranks

TYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128,
    torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn,
]  # fmt: skip


def test_ranks_that_are_alike_are_left_alone() -> None:
    values = {"seed": "1", "data": "abc"}
    assert on_ranks(3, lambda comm: compare(comm, values)) == [None] * 3
    compare(Alone(), values)


@settings(max_examples=30)
@given(st.integers(2, 4), st.data())
def test_the_first_difference_is_named_with_ranks_and_values(size: int, data: Any) -> None:
    names = ["task", "seed", "train.lr", "data"]
    values = [dict.fromkeys(names, "same") for _ in range(size)]
    changes = data.draw(
        st.lists(st.tuples(st.integers(0, size - 1), st.sampled_from(names)), min_size=1)
    )
    for rank, name in changes:
        values[rank][name] = f"text {rank} ü"
    others = {name: {r for r in range(size) if values[r] != values[0]} for name in names}
    told = on_ranks(size, lambda comm: compare(comm, values[comm.rank]))
    if not any(others.values()):
        assert told == [None] * size
        return
    other = min(others["task"])
    first = next(name for name in names if values[other][name] != values[0][name])
    for error in told:
        assert isinstance(error, Error) and str(error) == str(told[0])
        assert f"differ in {first}: rank" in error.message
        assert values[0][first] in error.message and values[other][first] in error.message
        assert "\n" not in str(error)


def test_a_name_that_one_rank_lacks() -> None:
    values: list[dict[str, str]] = [{"a": "1"}, {"a": "1", "b": "x" * 500}]
    first, second = on_ranks(2, lambda comm: compare(comm, values[comm.rank]))
    assert str(first) == str(second)
    assert "differ in b: rank 0 has nothing of that name, rank 1 has xxx" in str(first)
    assert len(str(first)) < 400


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 300), nn.BatchNorm1d(300), nn.Linear(300, 3))


@settings(max_examples=25)
@given(st.integers(2, 3), st.data())
def test_one_changed_bit_is_found_and_its_parameter_named(size: int, data: Any) -> None:
    models = [copy.deepcopy(_model()) for _ in range(size)]
    names = [name for name, _ in models[0].named_parameters()]
    name = data.draw(st.sampled_from(names))
    rank = data.draw(st.integers(1, size - 1))
    parameter = models[rank].get_parameter(name)
    with torch.no_grad():
        place = data.draw(st.integers(0, parameter.numel() - 1))
        bits = parameter.view(-1)[place : place + 1].view(torch.int32)
        bits ^= 1 << data.draw(st.integers(0, 30))
    told = on_ranks(size, lambda c: check_tensors(c, models[c.rank].named_parameters()))
    for error in told:
        assert isinstance(error, Error)
        assert f"parameter '{name}': rank {rank} has not those of rank 0" in error.message


def test_all_ranks_alike_even_where_nothing_is_a_number() -> None:
    models = [_model() for _ in range(3)]
    for model in models:
        nn.init.constant_(model[0].weight, float("nan"))  # type: ignore[index, arg-type]
    told = on_ranks(3, lambda c: check_tensors(c, models[c.rank].named_parameters()))
    assert told == [None] * 3


@settings(max_examples=60)
@given(
    st.sampled_from(TYPES),
    st.lists(st.integers(1, 60), max_size=3),
    st.sampled_from(["transposed", "expanded", "offset"]),
    st.data(),
)
def test_a_checksum_is_of_the_values_and_sees_each_of_them(
    dtype: torch.dtype, shape: list[int], layout: str, data: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator).mul(7).to(dtype)
    if layout == "transposed" and tensor.ndim > 1:
        other = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded" and tensor.ndim:
        tensor = tensor[:1].expand(tensor.shape)
        other = tensor.clone()
    else:
        memory = torch.zeros(tensor.numel() + 3, dtype=torch.uint8).to(dtype)
        other = memory[3:].view(shape).copy_(tensor)
    assert checksum(other) == checksum(tensor)
    flat = other.contiguous().view(-1).view(torch.uint8).clone()
    place = data.draw(st.integers(0, len(flat) - 1))
    flat[place] ^= 1
    assert checksum(flat) != checksum(other.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("rows", [3, 64, 5000])
def test_rows_that_change_places_are_seen(rows: int) -> None:
    table = torch.randn(rows, 64)
    swapped = table.clone()
    swapped[[0, rows - 1]] = table[[rows - 1, 0]]
    assert checksum(swapped) != checksum(table)


def test_sparse_and_quantized_tensors_have_checksums() -> None:
    dense = torch.eye(6)
    for tensor in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()):
        assert checksum(tensor) == checksum(tensor.clone()) != checksum(2 * tensor)
    one = torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8)
    other = torch.quantize_per_tensor(2 * dense, 0.1, 0, torch.quint8)
    assert checksum(one) == checksum(one.clone()) != checksum(other)


def test_thousands_of_small_ones_are_told_apart() -> None:
    def check(comm: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(3, generator=generator) for _ in range(3000)]
        if comm.rank:
            tensors[2500][1] += 1
            tensors[2700][1] += 1
        check_tensors(comm, ((f"t{n}", tensor) for n, tensor in enumerate(tensors)), what="table")

    for error in on_ranks(2, check):
        assert "table 't2500' (and 1 more): rank 1 has not those of rank 0" in str(error)
