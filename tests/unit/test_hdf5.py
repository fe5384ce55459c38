"""Others' HDF5 files, read as h5py reads them: types, layouts, filters, fill values, links."""

import os
import subprocess
import sys
import threading
import zlib

import h5py
import hdf5plugin
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.data.adopt import adopt
from hpctrain.data.chunks import ChunkedDataset
from hpctrain.data.hdf5 import open_dataset, open_file, stored_as_numpy
from hpctrain.data.loader import Loader
from hpctrain.data.shards import ShardSet
from hpctrain.data.verify import verify
from hpctrain.errors import Error
from tests.waiting import SECONDS

FILTERS = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "shuffle": {"shuffle": True},
    "shuffle, gzip": {"shuffle": True, "compression": "gzip"},
    "lzf": {"compression": "lzf"},
    "checked": {"shuffle": True, "compression": "gzip", "fletcher32": True},
    "scale-offset": {"scaleoffset": 0},
    "lz4": dict(hdf5plugin.LZ4()),
    "zstd": dict(hdf5plugin.Zstd()),
    "shuffle, zstd": {"shuffle": True, **hdf5plugin.Zstd()},
}


def integer(size, precision, offset, signed, big):
    kind = h5t.py_create(np.dtype(f"{'>' if big else '<'}{'i' if signed else 'u'}{size}")).copy()
    kind.set_precision(precision)
    kind.set_offset(offset)
    return kind


def floating(size, exponent, bias, big):
    """Of sign, exponent and mantissa without anything between: bfloat16, 24 bits, IEEE's own."""
    bits = 8 * size
    mantissa = bits - 1 - exponent
    kind = (h5t.IEEE_F64BE if big else h5t.IEEE_F64LE).copy()
    kind.set_fields(bits - 1, mantissa, exponent, 0, mantissa)
    kind.set_precision(bits)
    kind.set_size(size)
    kind.set_ebias(bias)
    return kind


@st.composite
def types(draw):
    big = draw(st.booleans())
    if draw(st.booleans()):
        size = draw(st.sampled_from([1, 2, 4, 8]))
        precision = draw(st.one_of(st.just(8 * size), st.integers(2, 8 * size)))
        offset = draw(st.integers(0, 8 * size - precision))
        return integer(size, precision, offset, draw(st.booleans()), big)
    size, exponent, bias = draw(
        st.sampled_from(
            [(2, 5, 15), (2, 8, 127), (3, 8, 127), (4, 8, 127), (4, 8, 126), (8, 11, 1023)]
        )
    )
    return floating(size, exponent, bias, big)


def expected(path, name="x"):
    with h5py.File(path, "r", locking=False) as file:
        return file[name][()]


def delivered(split, name="x", batch=7):
    return np.concatenate(
        [b[name].numpy().copy() for b in Loader(split, batch, shuffle="none", workers=0)]
    )


def same(split, want, name="x"):
    wanted = np.random.default_rng(1).integers(0, len(want), 20)
    got = split.take(wanted)[name]
    assert got.dtype == want.dtype and np.array_equal(got, want[wanted], equal_nan=True)
    got = delivered(split, name)
    assert np.array_equal(got, want.astype(want.dtype.newbyteorder("=")), equal_nan=True)


NO_FIXTURE_RESET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=25, deadline=None, suppress_health_check=NO_FIXTURE_RESET)
@given(
    kind=types(),
    rows=st.integers(1, 40),
    shape=st.lists(st.integers(1, 4), max_size=2),
    chunks=st.one_of(st.none(), st.integers(1, 50)),
    filled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_stored_type(tmp_path, kind, rows, shape, chunks, filled, seed):
    """What is stored in another way than numpy's is converted by HDF5, never taken as it is."""
    file = tmp_path / f"a{os.urandom(6).hex()}.h5"
    with h5py.File(file, "w", userblock_size=512 * (seed % 2)) as handle:
        properties = h5p.create(h5p.DATASET_CREATE)
        if chunks:
            properties.set_chunk((chunks, *shape))
        space = h5s.create_simple((rows, *shape), (h5s.UNLIMITED if chunks else rows, *shape))
        dataset = h5py.Dataset(h5d.create(handle.id, b"x", kind, space, properties))
        values = np.random.default_rng(seed).integers(0, 4, (rows, *shape))
        dataset[: rows if filled else rows // 2] = values[: rows if filled else rows // 2]
        handle["z"] = np.arange(rows * 1000.0).reshape(rows, 1000)
    set_ = tmp_path / f"s{os.urandom(6).hex()}"
    shards = adopt([file], set_)
    same(shards.split("train"), expected(file))
    same(shards.split("train"), expected(file, "z"), "z")
    assert verify(set_) == []


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "?", "<c8", ">c16", ">u2", "i1", "<i8"])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_what_numpy_writes_is_mapped(tmp_path, dtype, libver):
    """The comparison must not lead all that is usual to HDF5."""
    with h5py.File(tmp_path / "a.h5", "w", libver=libver) as handle:
        handle["x"] = (np.arange(60).reshape(20, 3) % 2).astype(dtype)
        assert stored_as_numpy(handle["x"])
        handle.create_dataset("y", data=handle["x"][()], chunks=(4, 3), compression="gzip")
    shards = adopt([tmp_path / "a.h5"], tmp_path / "s")
    assert "x" in shards.index.splits["train"].shards[0].offsets
    same(shards.split("train"), expected(tmp_path / "a.h5"))
    dataset = ChunkedDataset(tmp_path / "a.h5", "y", shards.index.fields["y"])
    assert dataset._chunks is not None


@settings(max_examples=40, deadline=None, suppress_health_check=NO_FIXTURE_RESET)
@given(
    filters=st.sampled_from(sorted(FILTERS)),
    rows=st.integers(1, 60),
    width=st.integers(1, 5),
    chunk=st.integers(1, 70),
    narrow=st.booleans(),
    dtype=st.sampled_from(["u1", "<i2", ">i4", "<i8"]),
    fill=st.integers(-3, 3),
    parts=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=4),
    libver=st.sampled_from(["earliest", "latest"]),
)
def test_any_chunks(tmp_path, filters, rows, width, chunk, narrow, dtype, fill, parts, libver):
    """Chunks that were never written give the fill value, whatever the filters and their shape."""
    file = tmp_path / f"a{os.urandom(6).hex()}.h5"
    with h5py.File(file, "w", libver=libver) as handle:
        dataset = handle.create_dataset(
            "x",
            (rows, width),
            dtype,
            chunks=(chunk, max(1, width - narrow)),
            maxshape=(None, None),
            fillvalue=np.array(fill).astype(dtype),
            **FILTERS[filters],
        )
        for start, count in parts:
            dataset[start : start + count] = np.array(start + 5).astype(dtype)
    set_ = tmp_path / f"s{os.urandom(6).hex()}"
    same(adopt([file], set_, checksums=False).split("train"), expected(file))
    assert verify(set_) == []


@settings(max_examples=15, deadline=None, suppress_health_check=NO_FIXTURE_RESET)
@given(masks=st.lists(st.integers(0, 3), min_size=1, max_size=5), shuffle=st.booleans())
def test_filters_that_were_left_out(tmp_path, masks, shuffle):
    file = tmp_path / f"a{os.urandom(6).hex()}.h5"
    x = np.arange(8 * len(masks) * 4, dtype="<i4").reshape(-1, 4)
    with h5py.File(file, "w") as handle:
        dataset = handle.create_dataset(
            "x", x.shape, x.dtype, chunks=(8, 4), compression="gzip", shuffle=shuffle
        )
        for number, mask in enumerate(masks):
            mask = mask if shuffle else mask >> 1
            data = x[8 * number : 8 * number + 8].tobytes()
            if shuffle and not mask & 1:
                data = np.frombuffer(data, "u1").reshape(-1, 4).T.tobytes()
            if not mask >> shuffle & 1:
                data = zlib.compress(data)
            dataset.id.write_direct_chunk((8 * number, 0), data, mask)
    assert np.array_equal(expected(file), x)
    split = adopt([file], tmp_path / f"s{os.urandom(6).hex()}").split("train")
    same(split, x)


@pytest.mark.parametrize("kept", ["unfiltered edge", "user block"])
def test_what_the_addresses_do_not_tell(tmp_path, kept, monkeypatch):
    """A last chunk stored without filters, and addresses without what precedes the file."""
    x = np.random.default_rng(0).integers(0, 9, (19, 5)).astype("f4")
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as handle:
        dataset = handle.create_dataset("x", (19, 5), "f4", chunks=(8, 5), compression="gzip")
        dataset[:] = x
    want = ChunkedDataset(tmp_path / "a.h5", "x", _spec(tmp_path / "a.h5"))
    where = want._chunks
    assert where is not None
    out = np.zeros((19, 20), np.uint8)
    if kept == "user block":
        where._offsets = where._offsets - 512
        where._dataset = h5py.File(tmp_path / "a.h5")["x"]
        assert where.as_hdf5_reads(512)
    else:
        content = bytearray((tmp_path / "a.h5").read_bytes())
        plain = np.zeros((8, 5), "f4")
        plain[:3] = x[16:]
        where._offsets[2], where._sizes[2] = len(content), plain.nbytes
        where._bytes = memoryview(bytes(content) + plain.tobytes())
        where._dataset = h5py.File(tmp_path / "a.h5")["x"]
        assert where.as_hdf5_reads(0) and where._plain_edge == 2
    where.read(0, 19, out)
    assert out.tobytes() == x.tobytes()


def _spec(path):
    return adopt([path], path.parent / f"s{os.urandom(6).hex()}").index.fields["x"]


@pytest.mark.parametrize("counts", [(7, 0, 5), (0, 7), (7, 5, 0)])
@pytest.mark.parametrize("chunks", [None, 4])
def test_files_without_samples(tmp_path, counts, chunks):
    parts = []
    for number, count in enumerate(counts):
        parts.append(np.full((count, 3), number, "f4"))
        with h5py.File(tmp_path / f"{number}.h5", "w") as handle:
            options = {"chunks": (chunks, 3), "maxshape": (None, 3)} if chunks else {}
            handle.create_dataset("x", data=parts[-1], **options)
    same(adopt([tmp_path], tmp_path / "s").split("train"), np.concatenate(parts))
    assert verify(tmp_path / "s") == []
    with pytest.raises(Error, match="no samples"):
        adopt([tmp_path / f"{counts.index(0)}.h5"], tmp_path / "empty")
    assert not (tmp_path / "empty" / "hpctrain-index.json").exists()


def test_text_and_sequences(tmp_path):
    texts = ["", "ü", "three", "four"] * 20
    rows = [np.arange(n % 5, dtype="<f4") for n in range(80)]
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle["text"] = texts
        handle["fixed"] = np.array([t.encode() for t in texts], "S8")
        sequences = handle.create_dataset("rows", (80,), h5py.vlen_dtype("f4"))
        for number, row in enumerate(rows):
            sequences[number] = row
        handle["y"] = np.arange(80)
    split = adopt([tmp_path / "a.h5"], tmp_path / "s").split("train")
    assert verify(tmp_path / "s") == []
    for batch in Loader(split, 16):
        for place, number in enumerate(batch["y"].tolist()):
            assert bytes(batch.rows("text")[place].numpy()).decode() == texts[number]
            assert bytes(batch.rows("fixed")[place].numpy()).decode() == texts[number]
            assert np.array_equal(batch.rows("rows")[place].numpy(), rows[number])


def unusable(handle, name):
    if name == "long double":
        handle["x"] = np.arange(3).astype(np.longdouble)
    elif name == "quad":
        kind = h5t.IEEE_F64LE.copy()
        kind.set_size(16)
        kind.set_precision(128)
        kind.set_fields(127, 112, 15, 0, 112)
        h5d.create(handle.id, b"x", kind, h5s.create_simple((3,)))
    elif name == "time":
        h5d.create(handle.id, b"x", h5t.UNIX_D32LE, h5s.create_simple((3,)))
    elif name == "reference":
        handle.create_dataset("x", (3,), h5py.ref_dtype)
    elif name == "opaque":
        handle["x"] = np.zeros(3, "V5")
    elif name == "table":
        handle["x"] = np.zeros(3, "i4,f8")
    elif name == "huge rows":
        handle.create_dataset("x", (3, 2**40, 2**40), "f8", chunks=(1, 2**8, 2**8))
    elif name == "huge":
        handle.create_dataset("x", (2**45,), "u1", chunks=(1024,))
    elif name == "x.offsets":
        handle["x"], handle["x.offsets"] = np.arange(3), np.arange(3)
    elif name == "raw data elsewhere":
        handle.create_dataset("x", (3,), "u1", external=[("/etc/passwd", 0, 3)])


@pytest.mark.parametrize(
    "name",
    [
        "long double",
        "quad",
        "time",
        "reference",
        "opaque",
        "table",
        "huge rows",
        "huge",
        "x.offsets",
        "raw data elsewhere",
    ],
)
def test_what_cannot_be_a_field(tmp_path, name):
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        unusable(handle, name)
    with pytest.raises(Error) as error:
        split = adopt([tmp_path / "a.h5"], tmp_path / "s").split("train")
        split.take(np.array([0]))
    assert "\n" not in str(error.value) and "HINT" in str(error.value)


def test_links(tmp_path):
    x = np.arange(60).reshape(20, 3)
    (tmp_path / "in").mkdir()
    for file in ("out.h5", "in/part.h5"):
        with h5py.File(tmp_path / file, "w") as handle:
            handle["g/y"] = np.arange(20)
    with h5py.File(tmp_path / "in" / "a.h5", "w") as handle:
        handle["data/x"] = x
        handle["soft"] = h5py.SoftLink("/data/x")
        handle["z"] = handle["data/x"]
        handle["there"] = h5py.ExternalLink("part.h5", "/g")
        handle["away"] = h5py.ExternalLink("../out.h5", "/g/y")
        handle["dangling"] = h5py.SoftLink("/nowhere")
        handle["round"] = h5py.SoftLink("/round")
        handle["data/self"] = handle["data"]
    notes: list[str] = []
    file = tmp_path / "in" / "a.h5"
    shards = adopt([file], tmp_path / "s", say=notes.append)
    assert list(shards.index.fields) == ["data_x"]
    text = "\n".join(notes)
    for name in ("soft", "z", "there", "away", "dangling", "data/self"):
        assert name in text
    for name in ("soft", "z"):
        same(adopt([file], tmp_path / f"s-{name}", fields=(name,)).split("train"), x, name)
    split = adopt([file], tmp_path / "s-there", fields=("there/y",)).split("train")
    same(split, np.arange(20), "there_y")
    for name, message in (("away", "outside"), ("dangling", "no dataset"), ("round", "nowhere")):
        with pytest.raises(Error, match=message):
            adopt([file], tmp_path / f"s-{name}", fields=(name,))


def test_files_that_a_dataset_is_put_together_from(tmp_path):
    (tmp_path / "in").mkdir()
    layout = h5py.VirtualLayout((8,), "i8")
    for number, file in enumerate(("in/v0.h5", "in/v1.h5")):
        with h5py.File(tmp_path / file, "w") as handle:
            handle["x"] = np.arange(4) + 10 * number
        layout[4 * number : 4 * number + 4] = h5py.VirtualSource(f"v{number}.h5", "x", (4,))
    path = tmp_path / "in" / "a.h5"
    (tmp_path / "in" / "raw.bin").write_bytes(np.arange(8).tobytes())
    with h5py.File(path, "w") as handle:
        handle.create_virtual_dataset("v", layout)
        handle.create_dataset("r", (8,), "i8", external=[("raw.bin", 0, 64)])
    with open_file(path) as file:
        assert open_dataset(file, path, "v")[:].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
        assert open_dataset(file, path, "r")[:].tolist() == list(range(8))
    (tmp_path / "in" / "v1.h5").rename(tmp_path / "v1.h5")
    (tmp_path / "in" / "raw.bin").write_bytes(bytes(60))
    with open_file(path) as file:
        with pytest.raises(Error, match="v1.h5, which is not there"):
            open_dataset(file, path, "v")
        with pytest.raises(Error, match="shorter"):
            open_dataset(file, path, "r")


def test_folders_that_are_links(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "far" / "deep" / "scratch").mkdir(parents=True)
    (tmp_path / "home" / "scratch").symlink_to(tmp_path / "far" / "deep" / "scratch")
    with h5py.File(tmp_path / "home" / "a.h5", "w") as handle:
        handle["x"] = np.arange(20)
    for checksums in (True, False):
        set_ = tmp_path / "home" / "scratch" / f"s{checksums}"
        adopt([tmp_path / "home" / "a.h5"], set_, checksums=checksums)
        same(ShardSet(set_).split("train"), np.arange(20))


@pytest.mark.parametrize("value", ["", "TRUE", "BEST_EFFORT"])
def test_files_that_others_have_locked(tmp_path, value):
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle.create_dataset("x", data=np.arange(40), chunks=(10,), compression="lzf")
    lock = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.flock(f, fcntl.LOCK_EX); "
    program = (
        "import sys; from pathlib import Path; from hpctrain.data.adopt import adopt; "
        "from hpctrain.data.verify import verify; import numpy as np; "
        "split = adopt([Path(sys.argv[1])], Path(sys.argv[2])).split('train'); "
        "assert not verify(Path(sys.argv[2])); "
        "print(split.take(np.arange(40))['x'].tolist() == list(range(40)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", lock + "print('on', flush=True); sys.stdin.read()", "a.h5"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout and holder.stdout.readline()
        done = subprocess.run(
            [sys.executable, "-c", program, "a.h5", "s"],
            cwd=tmp_path,
            env={**os.environ, "HDF5_USE_FILE_LOCKING": value},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        holder.communicate(timeout=SECONDS)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_a_file_open_in_this_process(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle["x"] = np.arange(20)
        handle.flush()
        with h5py.File(tmp_path / "b.h5", "w") as other:
            other["x"] = np.arange(20)
        with h5py.File(tmp_path / "b.h5", "r", locking=True):
            same(adopt([tmp_path / "b.h5"], tmp_path / "s").split("train"), np.arange(20))
        adopt([tmp_path / "a.h5"], tmp_path / "t")


def test_a_pipe_is_no_shard(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle["x"] = np.arange(20)
    shards = adopt([tmp_path / "a.h5"], tmp_path / "s")
    (tmp_path / "a.h5").unlink()
    os.mkfifo(tmp_path / "a.h5")
    with pytest.raises(Error, match="not a regular file"):
        shards.split("train").take(np.array([0]))
    with pytest.raises(Error, match="not a regular file"):
        adopt([tmp_path / "a.h5"], tmp_path / "t")
    (verdict,) = verify(tmp_path / "s")
    assert "not a regular file" in verdict.reason


def test_a_batch_reads_few_chunks(tmp_path, monkeypatch):
    """Images in small chunks beside labels in large ones: neither makes the other's large."""
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        image = np.zeros((4000, 4096), "u1")
        handle.create_dataset("x", data=image, chunks=(7, 4096), compression="gzip")
        handle.create_dataset("y", data=np.arange(4000), chunks=(1024,))
    notes: list[str] = []
    adopt([tmp_path / "a.h5"], tmp_path / "s", say=notes.append)
    assert any("an epoch reads" in note for note in notes)
    read = []
    original = ChunkedDataset.read

    def counted(self, number, out):
        read.append(min(self.block, self.rows) * out.shape[1])
        original(self, number, out)

    monkeypatch.setattr(ChunkedDataset, "read", counted)
    split = ShardSet(tmp_path / "s").split("train")
    loader = Loader(split, 8, workers=0)
    next(iter(loader))
    assert sum(read) < 8 * 16 * 4096 + 8 * 2**16
    for _ in loader:
        pass
    assert sum(read) < 1.5 * (image.nbytes + 8 * 4000)


def test_large_chunks_have_few_lanes(tmp_path, monkeypatch):
    """Where not as many chunks as a batch has samples can be open, several samples come of each."""
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        x = np.arange(4000 * 64).reshape(4000, 64)
        handle.create_dataset("x", data=x, chunks=(100, 64), compression="gzip")
    split = adopt([tmp_path / "a.h5"], tmp_path / "s").split("train")
    monkeypatch.setattr("hpctrain.data.shards.OPEN_BYTES", 8 * 100 * 64 * 8)
    order = split.order(0, 0, "block", 64)
    indices = order.indices(np.arange(4000, dtype=np.uint64))
    assert np.array_equal(np.sort(indices), np.arange(4000))
    assert len(np.unique(indices[:64] // 100)) <= 8
    # A rank's part of each batch comes from its own lanes.
    parts = [np.unique(indices[:3968].reshape(-1, 64)[:, part] // 100) for part in (slice(0, 32),)]
    assert len(parts[0]) < 40


def test_a_fork_while_threads_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        x = np.random.default_rng(0).normal(size=(400, 6))
        handle.create_dataset("x", data=x, chunks=(8, 6), compression="gzip")
        handle.create_dataset("z", data=x, chunks=(8, 3), compression="lzf")
    split = adopt([tmp_path / "a.h5"], tmp_path / "s").split("train")
    stop = threading.Event()

    def read(seed):
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            split.take(rng.integers(0, 400, 32))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                try:
                    good = np.array_equal(split.take(np.arange(400))["x"], x)
                finally:
                    os._exit(0 if good else 3)
            assert _waited(child) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _waited(child):
    """A child's exit code; None, and the child is ended, if it hangs."""
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        stop = threading.Event()
        stop.wait(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def test_an_epoch_of_which_nothing_is_left(tmp_path):
    for name in ("a", "b"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as handle:
            handle["x"] = np.arange(20)
    adopt([tmp_path], tmp_path / "s")
    (tmp_path / "a.h5").write_bytes(b"gone")
    split = ShardSet(tmp_path / "s", on_bad_shard="skip").split("train")
    assert sum(batch.samples for batch in Loader(split, 8)) == 20
    (tmp_path / "b.h5").unlink()
    split = ShardSet(tmp_path / "s", on_bad_shard="skip").split("train")
    with pytest.raises(Error, match="every sample of epoch 0 is lost"):
        list(Loader(split, 8))
