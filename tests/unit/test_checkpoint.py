import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hpctrain.checkpoint import state_tree
from hpctrain.checkpoint.pieces import Checkpoint
from hpctrain.checkpoint.store import REST, TENSORS, CheckpointStore, load_verified, save
from hpctrain.errors import Error

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.builds(lambda n: torch.arange(n), st.integers(0, 4))
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abc", max_size=3) | st.integers(0, 5), inner, max_size=4)
    ),
    max_leaves=15,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b and type(a) is type(b)


@pytest.mark.slow
@given(state=trees)
def test_a_tree_survives_being_split(state):
    tensors, rest = state_tree.split(state)
    assert same(state_tree.join(tensors, json.loads(json.dumps(rest))), state)


def test_other_leaves_are_refused():
    with pytest.raises(Error, match=r"'a.0.b' is a set"):
        state_tree.split({"a": [{"b": {1}}]})


STATE = {"model": {"w": torch.arange(6.0), "b": torch.tensor(2, dtype=torch.int64)}, "step": 7}


def test_save_and_load(tmp_path):
    save(tmp_path / "step-00000007", STATE)
    assert same(load_verified(tmp_path / "step-00000007"), STATE)
    save(tmp_path / "step-00000007", {"step": 8})
    assert load_verified(tmp_path / "step-00000007") == {"step": 8}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def write_old(folder, state, version):
    """As hpctrain wrote checkpoints of versions 1 and 2."""
    folder.mkdir(parents=True)
    tensors, rest = state_tree.split(state)
    save_file(tensors, folder / "tensors.safetensors")
    digest = hashlib.sha256((folder / "tensors.safetensors").read_bytes()).hexdigest()
    head = {"format": "hpctrain-checkpoint", "version": version, "tensors_sha256": digest}
    head["state"] = rest
    head["sha256"] = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(head))


@pytest.mark.parametrize("version", [1, 2])
def test_old_checkpoints_load_and_are_verified(tmp_path, version):
    state = {**STATE, "mixed": [torch.ones(3, dtype=torch.int8), torch.ones(2, 2).bfloat16()]}
    write_old(tmp_path / "step-00000001", {**state, "step": 1}, version)
    write_old(tmp_path / "step-00000002", {**state, "step": 2}, version)
    store = CheckpointStore(tmp_path, keep=2)
    assert same(store.newest(pytest.fail), {**state, "step": 2})
    with Checkpoint(store.path(2)) as old:
        assert torch.equal(old.read("model.w", [2], [3]), torch.tensor([2.0, 3.0, 4.0]))
    file = store.path(2) / TENSORS
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    said = []
    assert same(store.newest(said.append), {**state, "step": 1})
    assert "step-00000002/tensors.safetensors is damaged: its checksum differs" in said[0]
    store.save(3, {**state, "step": 3})
    store.wait()
    assert store.steps() == [2, 3] and same(store.newest(pytest.fail), {**state, "step": 3})


def test_a_version_of_the_future_is_refused(tmp_path):
    write_old(tmp_path / "c", STATE, 4)
    with pytest.raises(Error, match="is of version 4, not 3. HINT: use the hpctrain that wrote"):
        load_verified(tmp_path / "c")


@pytest.mark.parametrize("name", [TENSORS, REST])
def test_any_flipped_byte_is_found(tmp_path, name):
    save(tmp_path / "c", STATE)
    file = tmp_path / "c" / name
    good = file.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        with pytest.raises(Error, match="damaged|cannot be read"):
            load_verified(tmp_path / "c")
    for length in (0, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(Error, match="damaged"):
            load_verified(tmp_path / "c")
    file.unlink()
    with pytest.raises(Error, match=f"{name} cannot be read"):
        load_verified(tmp_path / "c")


def test_keeps_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 7):
        store.save(step, {"step": step}, best=step in (1, 3))
    store.wait()
    assert store.steps() == [3, 5, 6]
    assert load_verified(store.best()) == {"step": 3}
    assert same(store.newest(pytest.fail), {"step": 6})


def test_the_state_may_change_while_it_is_written(tmp_path):
    tensor = torch.zeros(1_000_000)
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"t": tensor})
    tensor.fill_(1)
    store.wait()
    assert not load_verified(store.path(1))["t"].any()


def test_goes_back_to_the_newest_good_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(step, {"t": torch.tensor(step)})
    store.wait()
    (store.path(3) / TENSORS).write_bytes(b"x")
    (store.path(2) / REST).unlink()
    said = []
    assert store.newest(said.append) == {"t": torch.tensor(1)}
    assert "step-00000003" in said[0] and "step-00000002" in said[1]
    (store.path(1) / REST).write_text("{}")
    with pytest.raises(Error, match="all 3 checkpoints"):
        store.newest(said.append)
    assert CheckpointStore(tmp_path / "none", keep=1).newest(said.append) is None


def test_a_full_disk_loses_nothing(tmp_path):
    """The kernel refuses to write beyond a size, as it does beyond the disk's end."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"t": torch.zeros(10)})
    store.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        store.save(2, {"t": torch.zeros(100_000)})
        with pytest.raises(Error, match=r"cannot write .*step-00000002.*HINT: make room"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert store.steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
    store.save(3, {"t": torch.zeros(100_000)})
    store.wait()
    assert store.steps() == [3]


ENDLESS = """
import itertools, os, sys, torch
from pathlib import Path
from hpctrain.checkpoint.store import CheckpointStore

def save():
    print(os.getpid(), flush=True)
    store = CheckpointStore(Path(sys.argv[1]), keep=2)
    store.clean()
    first = (store.newest(print) or {"step": 0})["step"]
    for step in itertools.count(first + 1):
        state = {"step": step, "t": torch.full((200_000,), float(step))}
        store.save(step, state, best=step % 5 == 0)
        print(step, flush=True)

torch.set_num_threads(1)
for _ in sys.stdin:
    child = os.fork()  # so that what takes long, importing torch, is done once
    if child == 0:
        save()
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


@pytest.fixture
def saver(tmp_path):
    """A process that has others save until they are killed, one for each line that it is given."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_killed_at_any_instant_a_good_one_is_left(tmp_path, saver):
    """SIGKILL at random moments of a process that does nothing but save."""
    random.seed(0)
    newest = 0
    for _ in range(8):
        saver.stdin.write("\n")
        saver.stdin.flush()
        child, *_ = [int(saver.stdout.readline()) for _ in range(4)]  # and three steps
        time.sleep(random.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        for line in saver.stdout:
            if line == "killed\n":
                break
        state = CheckpointStore(tmp_path, keep=2).newest(pytest.fail)
        assert state["step"] > newest
        assert (state["t"] == float(state["step"])).all()
        newest = state["step"]
