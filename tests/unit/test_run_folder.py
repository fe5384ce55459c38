"""Run folders: one run each, whoever starts when; and what a state is on its way to a file."""

import json
import os
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpctrain.checkpoint import state_tree
from hpctrain.checkpoint.store import load_verified, save
from hpctrain.data.batch import Batch
from hpctrain.data.buffers import Buffers
from hpctrain.data.loader import Loader
from hpctrain.errors import Error
from hpctrain.run_folder import LOCK, claim, new_folder
from hpctrain.world.broadcast import broadcast_tree
from tests.unit.threads import on_ranks


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    names = [new_folder("my_task.py:Net").name for _ in range(3)]
    assert names == [f"Net-20260101-000000{end}" for end in ("", "-2", "-3")]


def test_a_folder_is_held_by_one_run_and_let_go_with_its_process(tmp_path):
    code = (
        "import sys, pathlib, time; from hpctrain.run_folder import claim;"
        "lock = claim(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Error, match=rf"in use by a run .*process {holder.pid} on"):
            claim(tmp_path / "run")
    finally:
        holder.kill()
        holder.wait()
    claim(tmp_path / "run").close()
    assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / ("x" * 300), "File name too long.*shorter --out"),
        (tmp_path / "file", "File exists.*it is a file"),
        (tmp_path / "file" / "run", "Not a directory.*within a file"),
    ):
        with pytest.raises(Error, match=message) as raised:
            claim(folder)
        assert len(str(raised.value)) < 300


class Versioned(nn.Module):
    """Turns over what an older version wrote."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].t()
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def get_extra_state(self):
        return {"calls": 3, "bytes": b"\x00\xff", "pair": (1, np.float32(2.5))}

    def set_extra_state(self, state):
        assert state == self.get_extra_state() and isinstance(state["pair"], tuple)


def tensors():
    dense = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = [dense.to(kind) for kind in (torch.float32, torch.bfloat16, torch.complex64,
             torch.complex128, torch.int16, torch.bool, torch.float8_e4m3fn)]  # fmt: skip
    layouts = [dense.t(), dense[::2, 1:], dense[:1].expand(3, 4), torch.linalg.qr(dense)[0],
        torch.zeros(0, 3), torch.tensor(1.5), torch.zeros(3, dtype=torch.uint16)]  # fmt: skip
    eye = torch.eye(4)
    sparse = [eye.to_sparse(), eye.to_sparse_csr(), eye.to_sparse_csc()]
    quantized = [
        torch.quantize_per_tensor(dense.float(), 0.1, zero, kind)
        for kind, zero in ((torch.quint8, 3), (torch.qint8, -2), (torch.qint32, 0))
    ]
    return plain + layouts + sparse + quantized


def alike(one, other):
    assert (one.dtype, one.layout, one.shape) == (other.dtype, other.layout, other.shape)
    if one.is_quantized:
        assert (one.q_scale(), one.q_zero_point()) == (other.q_scale(), other.q_zero_point())
        one, other = one.int_repr(), other.int_repr()
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    one, other = one.contiguous().view(-1), other.contiguous().view(-1)
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_state_comes_back_as_torch_gave_it(tmp_path):
    model = nn.Sequential(Versioned(), nn.BatchNorm1d(3))
    for number, tensor in enumerate(tensors()):
        model.register_buffer(f"b{number}", tensor)
    state = {"model": model.state_dict(), "a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    save(tmp_path / "c", state)
    told = on_ranks(2, lambda comm: broadcast_tree(comm, state if comm.rank == 0 else None))
    for found in (load_verified(tmp_path / "c"), *told):
        assert isinstance(found["model"], OrderedDict)
        assert found["model"]._metadata == state["model"]._metadata
        assert found["a.b"] == 1 and found["a"]["b"] == 0
        for name, tensor in state["model"].items():
            if isinstance(tensor, torch.Tensor):
                alike(found["model"][name], tensor)


def test_a_layers_version_reaches_it_when_it_is_loaded(tmp_path):
    model = Versioned()
    save(tmp_path / "c", model.state_dict())
    other = Versioned()
    other.load_state_dict(load_verified(tmp_path / "c"))
    assert torch.equal(other.weight, model.weight)


@given(st.dictionaries(st.text("$ab", max_size=8) | st.integers() | st.booleans(), st.integers()))
def test_any_keys_are_kept(values):
    parts, rest = state_tree.split({"tree": values})
    assert state_tree.join(parts, json.loads(json.dumps(rest)))["tree"] == values


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([0, 2]))
def test_batches_in_page_locked_memory_are_torchs_own(samples, batch_size, workers):
    """PyTorch finds by the storage what a copy is still under way from; here, with ordinary memory.

    Its allocator gives memory out again when nothing refers to the storage and no copy reads it.
    """
    given_out = {}
    ordinary = torch.empty

    def allocate(*shape, pin_memory=False, **options):
        tensor = ordinary(*shape, **options)
        if pin_memory:
            given_out[tensor.untyped_storage()._cdata] = tensor.data_ptr()
        return tensor

    fields = {"x": np.arange(3 * samples, dtype=">f4").reshape(samples, 3),
              "n": np.arange(samples)}  # fmt: skip
    loader = Loader(fields, batch_size, shuffle="none", workers=workers)
    loader._buffers = Buffers(pinned=True)
    torch.empty = allocate
    try:
        for batch in loader:
            n = batch["n"]
            assert n.untyped_storage()._cdata in given_out
            assert n.tolist() == list(range(batch.start, batch.stop))
            made = batch.empty(2, 3)
            assert made.untyped_storage()._cdata in given_out and made.shape == (2, 3)
            assert isinstance(batch, Batch) and torch.equal(batch["x"][:, 0].long(), 3 * n)
    finally:
        torch.empty = ordinary
        loader.close()
