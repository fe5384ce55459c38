"""Node-local copies: one process copies, checked, as much as there is room for."""

import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data import stage as stage_module
from hpctrain.data.index import read_index
from hpctrain.data.loader import Loader
from hpctrain.data.shards import ShardSet, staged_name
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


@pytest.mark.slow
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
with _alone(Path(sys.argv[1]), 10, Path(sys.argv[1])):
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


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_are_kept(shards, tmp_path):
    """Nobody else gets to read copies of what nobody else may read."""
    before = os.umask(0o022)
    try:
        shards.chmod(0o700)
        files = sorted(shards.glob("*.h5"))
        for file, mode in zip(files, (0o600, 0o640, 0o666, 0o400, *[0o644] * 9), strict=False):
            file.chmod(mode)
        staged = stage(shards, tmp_path / "local")
        assert mode_of(staged.path) == 0o700
        copies = sorted(staged.path.glob("*.h5"), key=lambda path: path.name.rpartition("-")[2])
        assert [mode_of(copy) for copy in copies[:4]] == [0o600, 0o640, 0o644, 0o400]
        staged.path.chmod(0o755)
        stage(shards, tmp_path / "local")
        assert mode_of(staged.path) == 0o700
    finally:
        os.umask(before)


def test_a_copy_that_is_found_is_checked(shards, tmp_path):
    expected = contents(shards, tmp_path / "nowhere")
    staged = stage(shards, tmp_path / "local")
    first, second, third, *_ = sorted(staged.path.glob("*.h5"))
    for copy in (first, second):
        content = bytearray(copy.read_bytes())
        content[-50] ^= 1
        status = copy.stat()
        copy.write_bytes(content)
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    third.unlink()
    third.symlink_to(shards / "train-000000.h5")
    again = stage(shards, tmp_path / "local")
    assert again.copied == 3 and again.shards == again.of
    assert not third.is_symlink()
    assert np.array_equal(contents(shards, tmp_path / "local"), expected)
    assert stage(shards, tmp_path / "local").copied == 0
    (staged.path / "checked.json").write_text("[" * 100_000)
    assert stage(shards, tmp_path / "local").copied == 0  # all were read again, and are right


def test_others_may_not_replace_what_is_staged(shards, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    local.chmod(0o777)
    with pytest.raises(Error, match=r"everybody may replace .* HINT: .chmod \+t"):
        stage(shards, local)
    local.chmod(0o1777)
    assert stage(shards, local).copied > 3


AS_ANOTHER = """
import os, sys
os.setgid(1600)
os.setuid(1600)
"""


def as_another(script, *arguments):
    """Run Python as another user."""
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER + script, *map(str, arguments)],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("what", ["folder", "link", "file", "fifo"])
def test_what_another_user_left_is_not_touched(shards, what):
    """His copies are not read, and through his links nothing is written."""
    expected = contents(shards, shards / "nowhere")
    with tempfile.TemporaryDirectory() as name:
        world = Path(name)
        world.chmod(0o755)
        local, victim = world / "tmp", world / "victim"
        local.mkdir()
        local.chmod(0o1777)
        victim.mkdir(mode=0o700)
        (victim / "precious").write_text("mine")
        place = folder_of(shards, local)
        names = [staged_name(shard) for _, _, shard in read_index(shards).shards()]
        as_another(
            """
place, what, victim, names = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
if what == "folder":
    os.mkdir(place)
    os.chmod(place, 0o777)
    for name in names:
        open(place + "/" + name, "w").write("x" * 1000)
        os.symlink(victim + "/precious", place + "/" + name + ".part")
    for name in ("copying", "lock", "keep"):
        os.symlink(victim + "/precious", place + "/" + name)
elif what == "link":
    os.symlink(victim, place)
elif what == "file":
    open(place, "w").close()
else:
    os.mkfifo(place)
""",
            place, what, victim, *names,
        )  # fmt: skip
        assert np.array_equal(contents(shards, local), expected)
        staged = stage(shards, local)
        assert staged.path != place and staged.copied == staged.of
        assert staged.path.stat().st_uid == 0 and mode_of(staged.path) == 0o700
        assert folder_of(shards, local) == staged.path
        assert np.array_equal(contents(shards, local), expected)
        assert stage(shards, local).copied == 0
        peek = "import pathlib; print(list(pathlib.Path(sys.argv[1]).iterdir()))"
        with pytest.raises(AssertionError, match="Permission denied"):
            as_another(peek, staged.path)
        unstage(shards, local)
        assert not staged.path.exists() and os.path.lexists(place)
        assert [path.read_text() for path in victim.iterdir()] == ["mine"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_place_taken_after_it_was_looked_for(shards):
    """Who does not stage, but would read copies, does not read those another user puts there."""
    expected = contents(shards, shards / "nowhere")
    with tempfile.TemporaryDirectory() as name:
        local = Path(name)
        local.chmod(0o1777)
        split = ShardSet(shards, staged=(place := folder_of(shards, local))).split("train")
        sizes = {staged_name(s): s.bytes for _, _, s in read_index(shards).shards()}
        as_another(
            "os.mkdir(sys.argv[1])\n"
            "for each in sys.argv[2:]:\n"
            "    name, size = each.split('=')\n"
            "    open(sys.argv[1] + '/' + name, 'wb').write(b'x' * int(size))\n",
            place, *(f"{name}={size}" for name, size in sizes.items()),
        )  # fmt: skip
        found = np.concatenate([b["x"].numpy() for b in Loader(split, 64, shuffle="none")])
        assert np.array_equal(found, expected)
