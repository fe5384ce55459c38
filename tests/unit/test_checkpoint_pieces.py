"""Checkpoints in pieces: any division of any tensors, read by any other."""

import contextlib
import itertools
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hpctrain.checkpoint import pieces, state_tree, tensor_file
from hpctrain.checkpoint.by_name import load_by_name, state_by_name
from hpctrain.checkpoint.pieces import (
    Box,
    Checkpoint,
    Range,
    boxes_of_range,
    commit,
    copy_piece,
    write_piece,
)
from hpctrain.checkpoint.store import CheckpointStore, load_verified
from hpctrain.checkpoint.tensor_file import DTYPES, Memory
from hpctrain.errors import Error


def box_of(tensor, offsets, sizes):
    return tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]


def write(folder, states, shares=None):
    """Pieces by as many ranks as there are states, committed."""
    pending = folder.with_name(".pending")
    pending.mkdir(parents=True)
    for rank, state in enumerate(states):
        share = shares[rank] if shares else None
        write_piece(pending, rank, copy_piece(state, Memory(), share))
    commit(pending, folder, len(states), timeout_seconds=0)
    assert not pending.exists()


@contextlib.contextmanager
def small_blocks(size):
    before = tensor_file.BLOCK
    tensor_file.BLOCK = pieces.BLOCK = size
    try:
        yield
    finally:
        tensor_file.BLOCK = pieces.BLOCK = before


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def grids(draw, shape):
    """A division of a tensor along all its dimensions at once: boxes."""
    axes = []
    for size in shape:
        cuts = draw(st.lists(st.integers(0, size), max_size=2))
        edges = sorted({0, size, *cuts})
        axes.append(list(itertools.pairwise(edges)) or [(0, 0)])
    boxes = itertools.product(*axes)
    return [(tuple(a for a, _ in b), tuple(z - a for a, z in b)) for b in boxes]


@st.composite
def ranges(draw, shape):
    """A division of a flattened tensor."""
    size = math.prod(shape)
    edges = [0, *sorted(draw(st.lists(st.integers(0, size), max_size=3))), size]
    return list(itertools.pairwise(edges))


@st.composite
def divisions(draw):
    """A tensor, and how it is divided among ranks: by boxes or by ranges."""
    shape = draw(shapes)
    dtype = draw(st.sampled_from([torch.float64, torch.int8, torch.bfloat16, torch.bool]))
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    if draw(st.booleans()):
        shares = [
            (Box(shape, offsets), box_of(tensor, offsets, sizes))
            for offsets, sizes in draw(grids(shape))
        ]
    else:
        flat = tensor.reshape(-1)
        shares = [(Range(shape, a), flat[a:b]) for a, b in draw(ranges(shape))]
    return tensor, draw(st.permutations(shares))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data(), divided=st.lists(divisions(), min_size=1, max_size=3))
def test_any_division_is_read_by_any_other(data, divided):
    ranks = max(len(shares) for _, shares in divided)
    states, shares = [{} for _ in range(ranks)], [{} for _ in range(ranks)]
    for number, (_, given_shares) in enumerate(divided):
        for rank, (share, values) in enumerate(given_shares):
            states[rank][f"t{number}"] = values
            shares[rank][f"t{number}"] = share
    with tempfile.TemporaryDirectory() as name, small_blocks(16):
        folder = Path(name) / "step-1"
        write(folder, states, shares)
        whole = load_verified(folder)
        with Checkpoint(folder) as checkpoint:
            checkpoint.check()
            for number, (tensor, _) in enumerate(divided):
                key = f"t{number}"
                assert torch.equal(whole[key], tensor) and whole[key].dtype == tensor.dtype
                assert checkpoint.tensors[key] == (tensor.dtype, tuple(tensor.shape))
                for offsets, sizes in data.draw(grids(tuple(tensor.shape))):
                    found = checkpoint.read(key, offsets, sizes)
                    assert torch.equal(found, box_of(tensor, offsets, sizes))
                for start, stop in data.draw(ranges(tuple(tensor.shape))):
                    found = checkpoint.read_range(key, start, stop)
                    assert torch.equal(found, tensor.reshape(-1)[start:stop])


@given(data=st.data(), shape=shapes)
def test_a_range_is_of_few_boxes(data, shape):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    tensor = torch.arange(size).view(shape)
    boxes = boxes_of_range(shape, start, stop)
    assert len(boxes) <= max(2 * len(shape) - 1, 1)
    found = [value for box in boxes for value in box_of(tensor, *box).reshape(-1).tolist()]
    assert found == list(range(start, stop))


def test_each_type_is_what_safetensors_has(tmp_path):
    """The library's own reader is the oracle of the files."""
    bits = torch.arange(48, dtype=torch.uint8) % 2
    tensors = {str(dtype): bits.view(dtype).view(3, -1) for dtype in DTYPES}
    write(tmp_path / "step-1", [tensors])
    found = load_file(tmp_path / "step-1" / "tensors-00000.safetensors")
    ours = load_verified(tmp_path / "step-1")
    for name, tensor in tensors.items():
        for each in (found[name], ours[name]):
            assert each.dtype == tensor.dtype and each.shape == tensor.shape
            assert torch.equal(each.view(torch.uint8), tensor.view(torch.uint8))


STATES = [
    {"model": {"a": torch.arange(40.0)}, "step": 3, "layers": {"first": [1, (2,)]}},
    {"model": {"b": torch.arange(12.0).view(3, 4).T}, "step": 3, "layers": {"second": [4]}},
]


def test_the_rest_of_all_pieces_is_one(tmp_path):
    write(tmp_path / "step-1", STATES)
    found = load_verified(tmp_path / "step-1")
    assert torch.equal(found["model"]["b"], STATES[1]["model"]["b"])
    assert found["layers"] == {"first": [1, (2,)], "second": [4]} and found["step"] == 3


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def changed(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm, said",
    [(Path.unlink, "cannot be read"), (truncated, "damaged: it has"), (changed, "its checksum")],
)
def test_a_bad_piece_has_the_checkpoint_before_taken(tmp_path, harm, said):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        states = [{**STATES[0], "step": step}, {**STATES[1], "step": step}]
        write(store.path(step), states)
    harm(store.path(2) / "tensors-00001.safetensors")
    complaints = []
    assert store.newest(complaints.append)["step"] == 1
    (complaint,) = complaints
    assert "step-00000002/tensors-00001.safetensors" in complaint and said in complaint
    with Checkpoint(store.path(2)) as checkpoint:
        assert torch.equal(checkpoint.read("model.a", [3], [2]), torch.tensor([3.0, 4.0]))
        for read in (lambda: checkpoint.read("model.b", [3, 2], [1, 1]), checkpoint.check):
            with pytest.raises(Error, match=said):
                read()


def test_damage_is_found_where_it_is_read(tmp_path):
    """Of a box, the blocks that are read are checked; others may be bad."""
    tensor = torch.arange(4096, dtype=torch.uint8).view(64, 64)
    with small_blocks(512):
        write(tmp_path / "step-1", [{"t": tensor}])
        changed(tmp_path / "step-1" / "tensors-00000.safetensors")
        with Checkpoint(tmp_path / "step-1") as checkpoint:
            assert torch.equal(checkpoint.read("t", [0, 3], [56, 2]), tensor[:56, 3:5])
            with pytest.raises(Error, match="damaged: its checksum differs"):
                checkpoint.read("t", [0, 3], [57, 2])


def test_pieces_that_are_no_whole_are_refused(tmp_path):
    with pytest.raises(Error, match="the boxes of 't' do not make up a whole"):
        write(tmp_path / "gap", [{"t": torch.ones(2)}], [{"t": Box((3,), (0,))}])
    with pytest.raises(Error, match="the boxes of 't' do not make up a whole"):
        shares = [{"t": Box((4,), (0,))}, {"t": Box((4,), (1,))}]
        write(tmp_path / "2" / "overlap", [{"t": torch.ones(2)}] * 2, shares)
    with pytest.raises(Error, match=r"has 't' as I64 of shape \[2\], another as F32"):
        write(tmp_path / "3" / "types", [{"t": torch.ones(2)}, {"t": torch.arange(2)}])
    assert [path.name for path in tmp_path.glob("**/state.json")] == []


def test_a_rank_that_does_not_write_is_named(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save_piece(5, STATES[0], rank=0, ranks=2, attempt="x", timeout_seconds=0.1)
    with pytest.raises(Error, match="rank 1 of 2 has not written its piece"):
        store.wait()
    assert store.steps() == []
    store.clean()
    assert list(tmp_path.iterdir()) == []


def test_ranks_save_in_the_background(tmp_path):
    """Each with its own store; rank 0's thread waits for the others' files alone."""
    stores = [CheckpointStore(tmp_path, keep=1) for _ in range(2)]
    for step in (1, 2):
        for rank, store in enumerate(stores):
            how = {"rank": rank, "ranks": 2, "attempt": "x", "timeout_seconds": 60}
            store.save_piece(step, {**STATES[rank], "step": step}, **how, best=step == 1)
        for store in stores:
            store.wait()
    assert stores[0].steps() == [1, 2] and stores[0].best() == stores[0].path(1).resolve()
    assert stores[0].newest(pytest.fail)["step"] == 2


def hostile(change):
    def harm(folder):
        head = json.loads((folder / "state.json").read_text())
        head.pop("sha256")
        change(head)
        digest = pieces.digest_of(head)
        (folder / "state.json").write_text(json.dumps({**head, "sha256": digest}))

    return harm


def _put(tensor="a", **values):
    return hostile(lambda head: head["tensors"][f"model.{tensor}"]["boxes"][0].update(values))


@pytest.mark.parametrize(
    "harm",
    [
        hostile(lambda head: head["files"][0].update(name="../x")),
        hostile(lambda head: head["files"][0].update(bytes=2**70)),
        hostile(lambda head: head["tensors"]["model.a"].update(shape=[2**40])),
        hostile(lambda head: head["tensors"].update(x=head["tensors"]["model.a"])),
        hostile(lambda head: head["tensors"].pop("model.a")),
        hostile(lambda head: head.pop("files")),
        _put(file=7), _put(start=-1), _put(start=10**6), _put(start=1.0), _put(sizes=[True]),
        _put(offsets=[1]), _put(offsets=[]), _put(xxh3_128=[]), _put(xxh3_128=None),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_one_line(tmp_path, harm):
    write(tmp_path / "step-1", STATES)
    harm(tmp_path / "step-1")
    with pytest.raises(Error, match="step-1.* (damaged|cannot be read)"):
        load_verified(tmp_path / "step-1")


def test_reading_into_tensors_that_fit(tmp_path):
    state = {"a": torch.arange(6.0), "b": torch.arange(4), "c": torch.ones(2, 3), "tied": None}
    state["tied"] = state["a"].clone()
    write(tmp_path / "step-1", [state])
    shared = torch.zeros(6)
    into = {"a": shared, "b": torch.zeros(4), "c": torch.zeros(3, 2).T, "tied": shared}
    found = load_verified(tmp_path / "step-1", into)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found["a"].data_ptr() == shared.data_ptr() and torch.equal(shared, state["a"])
    assert not into["b"].any() and not into["c"].any()
    assert found["tied"].data_ptr() != shared.data_ptr()


def test_memory_is_kept_between_saves():
    memory = Memory()
    first = memory.take(3_000_000, pinned=False)
    assert memory.take(2_900_000, pinned=False).data_ptr() == first.data_ptr()
    assert first.data_ptr() % 4096 == 0 and len(first) % 4096 == 0
    del first
    assert len(memory.take(100, pinned=False)) == 4096


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 10_000])
def test_files_are_written_past_the_page_cache_whole(tmp_path, size, monkeypatch):
    """With and without a last page that is not full, in several spans."""
    monkeypatch.setattr(tensor_file, "_DIRECT", 1)
    monkeypatch.setattr(tensor_file, "_SPAN", 4096)
    image = Memory().take(size, pinned=False)
    image[:] = torch.arange(len(image)) % 251
    assert tensor_file.write_durably(tmp_path / "f", image, size, lambda: 7) == 7
    assert (tmp_path / "f").read_bytes() == bytes(image[:size].tolist())


def test_file_systems_that_refuse_direct_writes(tmp_path, monkeypatch):
    """Whether at once, or when it comes to writing: as where an address is not as it asks."""
    monkeypatch.setattr(tensor_file, "_DIRECT", 1)
    odd = torch.arange(8193) % 251
    odd = odd.to(torch.uint8)[1:]
    tensor_file.write_durably(tmp_path / "f", odd, 8192, lambda: None)
    assert (tmp_path / "f").read_bytes() == bytes(odd.tolist())
    opened = tensor_file.os.open

    def refuse(path, flags, mode=0o777):
        if flags & tensor_file.os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(tensor_file.os, "open", refuse)
    image = Memory().take(5000, pinned=False)
    tensor_file.write_durably(tmp_path / "g", image, 5000, lambda: None)
    assert (tmp_path / "g").stat().st_size == 5000


def test_a_failed_job_is_told():
    done = []

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        tensor_file.in_threads([(2**22, job) for job in [fail, lambda: done.append(1)] * 4])
    assert len(done) == 4


def adam(model, order=1):
    parameters = list(model.parameters())[::order]
    return torch.optim.Adam(parameters, lr=0.1)


def stepped(model, optimizer):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizers_by_name(tmp_path):
    """Saved by two processes that hold a layer each, gone on with by one that holds both."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = adam(model)
    stepped(model, optimizer)
    saved = state_by_name(model, optimizer)
    names = [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    states = [{**saved, "state": {name: saved["state"][name] for name in mine}} for mine in names]
    write(tmp_path / "step-1", [{"optimizer": state} for state in states])
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    other.load_state_dict(model.state_dict())
    another = adam(other, order=-1)  # its numbers are not those of the first
    load_by_name(other, another, load_verified(tmp_path / "step-1")["optimizer"])
    for each, its in ((model, optimizer), (other, another)):
        stepped(each, its)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(Error, match="has no parameter '2.weight'"):
        third = torch.nn.Sequential(*other, torch.nn.Linear(2, 2))
        load_by_name(third, adam(third), saved)
    with pytest.raises(Error, match="parameter 0 of the optimizer, of shape .* is not the model's"):
        state_by_name(torch.nn.Linear(1, 1), optimizer)


def test_trees_are_united():
    one = {"a": {"b": 1}, "c": [1]}
    assert state_tree.merge(one, {"a": {"b": 2, "d": 3}, "c": [2], "e": None}) == {
        "a": {"b": 1, "d": 3}, "c": [1], "e": None,
    }  # fmt: skip
