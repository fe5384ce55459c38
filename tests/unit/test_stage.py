"""Node-local copies: one process copies, checked, as much as there is room for."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from hpctrain.data import stage as stage_module
from hpctrain.data.loader import Loader
from hpctrain.data.shards import ShardSet
from hpctrain.data.stage import folder_of, stage, unstage
from hpctrain.data.writer import ShardWriter
from hpctrain.errors import Error
from tests.waiting import SECONDS


@pytest.fixture
def shards(tmp_path):
    x = np.random.default_rng(0).normal(size=(1000, 20))
    with ShardWriter(tmp_path / "s", shard_bytes=20_000) as writer:
        for start in range(0, 1000, 50):
            writer.write("train", {"x": x[start : start + 50]})
    return tmp_path / "s"


def contents(shard_set, local):
    split = ShardSet(shard_set, staged=folder_of(shard_set, local)).split("train")
    return np.concatenate([b["x"].numpy() for b in Loader(split, 64, shuffle="none")])


def test_copies_are_read(shards, tmp_path):
    local = tmp_path / "local"
    expected = contents(shards, tmp_path / "nowhere")
    first = stage(shards, local)
    assert (first.shards, first.copied) == (first.of, first.of) and first.of > 3
    assert stage(shards, local).copied == 0
    for file in shards.glob("*.h5"):
        file.unlink()  # the originals are not needed any more
    assert np.array_equal(contents(shards, local), expected)
    unstage(shards, local)
    assert list(local.iterdir()) == []


def test_what_is_kept_outlives_a_run(shards, tmp_path):
    stage(shards, tmp_path / "local", keep=True)
    unstage(shards, tmp_path / "local")
    assert folder_of(shards, tmp_path / "local").exists()
    unstage(shards, tmp_path / "local", kept=True)
    assert not folder_of(shards, tmp_path / "local").exists()


def test_what_does_not_fit_is_read_where_it_is(shards, tmp_path, monkeypatch):
    sizes = sorted(file.stat().st_size for file in shards.glob("*.h5"))
    left = [sum(sizes[:2]) + 100]

    def room(folder):
        return left[0] - sum(f.stat().st_size for f in folder.glob("*.h5"))

    monkeypatch.setattr(stage_module, "room", room)
    staged = stage(shards, tmp_path / "local")
    assert 0 < staged.shards < staged.of
    assert "no room for" in str(staged)
    assert len(contents(shards, tmp_path / "local")) == 1000


def test_a_corrupt_original_is_not_copied(shards, tmp_path):
    file = shards / "train-000001.h5"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(Error, match=r"train-000001.h5 differs from the index's checksum"):
        stage(shards, tmp_path / "local")
    folder = folder_of(shards, tmp_path / "local")
    assert not list(folder.glob("*.part")) and len(list(folder.glob("*.h5"))) == 1


def _stage(shards, local, results):
    results.put(stage(shards, local).copied)


def test_one_process_copies(shards, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    local = tmp_path / "local"
    processes = [context.Process(target=_stage, args=(shards, local, results)) for _ in range(3)]
    for process in processes:
        process.start()
    copied = sorted(results.get(timeout=SECONDS) for _ in processes)
    for process in processes:
        process.join(SECONDS)
    assert copied[:2] == [0, 0] and copied[2] == len(list(shards.glob("*.h5")))


HOLD = """
import sys, time
from pathlib import Path
from hpctrain.data.stage import _alone
with _alone(Path(sys.argv[1]), 10):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_waiting_for_another_is_bounded(shards, tmp_path):
    folder = folder_of(shards, tmp_path / "local")
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Error, match=f"process {holder.pid} on {os.uname().nodename} is stag"):
            stage(shards, tmp_path / "local", timeout_seconds=0.5)
    finally:
        holder.kill()
        holder.communicate()
    assert stage(shards, tmp_path / "local").copied > 0  # a dead one holds nothing


def test_no_place_to_stage_to(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="cannot stage to"):
        stage(shards, tmp_path / "file")
