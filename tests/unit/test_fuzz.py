"""Files that anybody may have written, mutated: each is read, or is an error in one line.

No other exception, no hang, no more than 512 MiB above the file's own size. ``make fuzz`` runs this
with more examples (``FUZZ_EXAMPLES`` for each reader). Inputs that were once handled wrongly are in
``FOUND``, as mutations of a right one.
"""

import contextlib
import faulthandler
import hashlib
import io
import json
import math
import os
import resource
import signal
import struct
import sys
import tarfile
import tempfile
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hpctrain.checkpoint.pieces import digest_of
from hpctrain.checkpoint.store import REST, TENSORS, CheckpointStore
from hpctrain.checkpoint.tensor_file import NAMED
from hpctrain.config import read_toml, resolve
from hpctrain.data.adopt import adopt
from hpctrain.data.importers import ImportOptions, import_data
from hpctrain.data.index import INDEX, _last_line
from hpctrain.data.shards import ShardSet
from hpctrain.data.writer import ShardWriter
from hpctrain.errors import Error
from hpctrain.report.page import read, sections_of
from hpctrain.slurm.jobs import find, outcome, progress
from hpctrain.world.failure_record import read_notes
from hpctrain.world.launcher import ALONE

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
SECONDS = 60
BYTES = 512 * 2**20

NASTY = [
    None, True, -1, 0, 2**31, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("-inf"), "", "x",
    "\0", "/etc/passwd", "../..", "|O", "\ud800", "a" * 5000, [], {}, [[]], [[[[None]]]],
    {"$tensor": "x"}, {"$items": [[[], 1]]}, 0.5, "-512", "99999999999",
]  # fmt: skip
"""What takes the place of a value of JSON."""

WORDS = [
    b"\0" * 16, b"\xff" * 16, b"[" * 3000, b"{\"a\":" * 3000, b"-512", b"99999999999",
    b"\x80" + b"\0" * 11, b"\xff" * 8 + b"\xfe\0\0\0", struct.pack("<q", -1),
    struct.pack("<q", 2**62), struct.pack("<i", 2**31 - 1),
    b"\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"a." * 2000, b"1e999", b"/etc/passwd", b"\r\n[x]\n",
]  # fmt: skip
"""What is put in the midst of bytes."""

# A mutation: what, where (as a part of the whole), and with which of the lists above or how much.
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["json", "json", "drop", "flip", "put", "over", "cut", "twice", "zero"]),
        st.integers(0, 2**16 - 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=5,
)


def mutated(content, mutations):
    """Bytes after some mutations; those of JSON are left out where it is none."""
    for what, where, how in mutations:
        at = where * len(content) >> 16
        if what in ("json", "drop"):
            with contextlib.suppress(ValueError, RecursionError):
                content = json.dumps(_changed(json.loads(content), what, where, how)).encode()
        elif what == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (how or 1)]) + content[at + 1 :]
        elif what == "put":
            content = content[:at] + WORDS[how % len(WORDS)] + content[at:]
        elif what == "over":
            word = WORDS[how % len(WORDS)]
            content = content[:at] + word + content[at + len(word) :]
        elif what == "cut":
            content = content[:at]
        elif what == "twice":
            content = content[:at] + content[at : at + 2 * how] * 2 + content[at + 2 * how :]
        elif what == "zero":
            content = content[:at] + bytes(how) + content[at + how :]
    return content


def _changed(tree, what, where, how):
    """A tree of which one value is another, or is not there."""
    places = []

    def walk(node):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value)

    if isinstance(tree, (dict, list)):
        walk(tree)
    if places:
        node, key = places[where % len(places)]
        if what == "drop":
            del node[key]
        else:
            node[key] = NASTY[how % len(NASTY)]
    return tree


@contextlib.contextmanager
def bounded(content):
    """No hang, and no more memory than there may be."""

    def too_long(number, frame):
        raise TimeoutError(f"not over after {SECONDS} s")

    most = psutil.Process().memory_info().vms + BYTES + len(content)
    _, hard = before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # of what no signal interrupts
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


class Index:
    """The index of a shard set, with the right checksum of itself."""

    def seed(self, folder):
        with ShardWriter(folder / "set", shard_bytes=2000) as writer:
            rows = np.arange(120.0).reshape(30, 4)
            writer.write("train", {"x": rows, "y": np.arange(30)})
            writer.write("val", {"x": rows[:6], "y": np.arange(6)})
        return (folder / "set" / INDEX).read_bytes()

    def use(self, folder, content):
        start = content.rfind(b' "sha256": "')
        if start < 0 and content.endswith(b"}"):  # JSON that was written anew, perhaps
            with contextlib.suppress(ValueError, RecursionError):
                tree = json.loads(content)
                tree.pop("sha256", None) if isinstance(tree, dict) else None
                content = json.dumps(tree).encode()[:-1] + b",\n"
                start = len(content)
        content = content[:start] + _last_line(hashlib.sha256(content[:start]).hexdigest()).encode()
        (folder / "set" / INDEX).write_bytes(content)
        for split in ShardSet(folder / "set").splits.values():
            if len(split):
                split.take(np.array([0, len(split) - 1]))


def _sum(data):
    return xxhash.xxh3_128_hexdigest(data)


class Checkpoint:
    """Both files of a checkpoint, with right checksums; else the one before it is loaded."""

    file = REST
    state = {"model": {"w": torch.ones(3), "b": [torch.zeros(2), 1]}, 7: {"step": 4, "text": "x"}}

    def seed(self, folder):
        store = CheckpointStore(folder / "checkpoints", 5)
        for step in (1, 2):
            store.save(step, {**self.state, "number": step})
            store.wait()
        return (store.path(2) / self.file).read_bytes()

    def use(self, folder, content):
        store = CheckpointStore(folder / "checkpoints", 5)
        (store.path(2) / self.file).write_bytes(content)
        with contextlib.suppress(Exception):
            head = json.loads((store.path(2) / REST).read_bytes())
            head.pop("sha256", None)
            data = (store.path(2) / TENSORS).read_bytes()
            for file in head["files"]:
                file |= {"bytes": len(data), "header": _sum(data[: file["header_bytes"]])}
            for tensor in head["tensors"].values():
                for box in tensor["boxes"]:
                    size = math.prod(box["sizes"]) * NAMED[tensor["dtype"]].itemsize
                    found = data[box["start"] : box["start"] + size]
                    box["xxh3_128"] = [_sum(found)] if found else []
            text = json.dumps({**head, "sha256": digest_of(head)})
            (store.path(2) / REST).write_text(text)
        complaints = []
        newest = store.newest(complaints.append)
        if complaints:
            assert newest["number"] == 1 and torch.equal(newest["model"]["w"], torch.ones(3))


class Tensors(Checkpoint):
    file = TENSORS


class Toml:
    def seed(self, folder):
        return b"""
seed = 1
train = { epochs = 3, batch_size = 64 }
[optimizer]
lr = 0.1
betas = [0.9, 0.99]
[options]
a.b.c = "x"
[[data.mixture]]
path = "p"
weight = 1.0
"""

    def use(self, folder, content):
        (folder / "c.toml").write_bytes(content)
        resolve([("c.toml", read_toml(folder / "c.toml"))])


class Import:
    """What is imported; each time anew."""

    name = ""
    options = ImportOptions()

    def use(self, folder, content):
        source = folder / self.name
        source.write_bytes(content)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            import_data(source, Path(name) / "set", self.options, ALONE)


def _image(kind):
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, kind)
    return file.getvalue()


def _tar(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


class Tar(Import):
    name = "images.tar"

    def seed(self, folder):
        long = "a" * 120
        return _tar([(f"train/{long}/1.png", _image("PNG")), ("train/b/2.jpg", _image("JPEG")),
                     ("val/b/3.png", _image("PNG"))])  # fmt: skip


class WebDataset(Import):
    name = "samples.tar"

    def seed(self, folder):
        return _tar([(f"{n:03}.{kind}", data) for n in range(3) for kind, data in (
            ("png", _image("PNG")), ("cls", b"1"), ("json", b'{"a": 1}'))])  # fmt: skip


class Npz(Import):
    name = "a.npz"

    def seed(self, folder):
        file = io.BytesIO()
        np.savez(file, x=np.arange(60.0).reshape(20, 3), y=np.arange(20))
        return file.getvalue()


class Arrow(Import):
    name = "a.feather"

    def seed(self, folder):
        import pyarrow.feather

        file = io.BytesIO()
        table = pyarrow.table({"n": [1, 2, 3], "word": ["a", "b", "a"], "row": [[1.0], [], [2.0]]})
        pyarrow.feather.write_feather(table, file, compression="uncompressed")
        return file.getvalue()


class Submission:
    def seed(self, folder):
        return json.dumps(
            {"job": "75", "name": "digits", "time": 1.5, "command": ["x"], "log": "a.out"}
        ).encode()

    def use(self, folder, content):
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / "submission.json").write_bytes(content)
        for run in find(folder):
            assert "\033" not in repr(run)


class Run:
    """A run folder's files, as a report and `hpctrain jobs` read them."""

    def seed(self, folder):
        lines = [
            {"kind": "event", "step": 0, "size": 2, "time": 1.0, "steps": 9, "reason": "start"}
        ]
        for step in range(1, 6):
            lines.append({"kind": "train", "step": step, "time": 1.0 + step, "loss": 1 / step,
                          "samples_per_second": 9.0, "lr": 0.1})  # fmt: skip
            lines.append({"kind": "timing", "step": step, "time": 1.0 + step, "input_ms": 1.0})
        lines.append({"kind": "validation", "step": 5, "time": 7.0, "loss": 0.2, "accuracy": 0.5})
        return json.dumps({
            "lines": lines,
            "result": {"strategy": "horovod", "metrics": {"final": {"val_loss": 0.2}}},
            "note": {"what": "ValueError", "message": "x", "rank": 0, "host": "a", "exit_code": 1},
        }).encode()  # fmt: skip

    def use(self, folder, content):
        run = folder / "run"
        run.mkdir(exist_ok=True)
        parts = None
        with contextlib.suppress(ValueError, RecursionError):
            parts = json.loads(content)
        if isinstance(parts, dict):
            lines = parts.get("lines")
            text = "\n".join(map(json.dumps, lines if isinstance(lines, list) else [lines]))
            (run / "metrics.jsonl").write_text(text)
            for name, part in (("result.json", "result"), ("rank-0.json", "note"),
                               ("failure.json", "note")):  # fmt: skip
                (run / name).write_text(json.dumps(parts.get(part)))
        else:
            for name in ("metrics.jsonl", "result.json", "rank-0.json", "failure.json"):
                (run / name).write_bytes(content)
        read_notes(run)
        progress(run)
        outcome(run)
        sections_of(*read([run]))


class Hdf5:
    """Somebody's HDF5 file. The library may end the process, so each is read in a child."""

    def seed(self, folder):
        path = folder / "seed.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=np.arange(300.0).reshape(100, 3))
            file.create_dataset("z", data=np.arange(100), chunks=(16,), compression="gzip")
        return path.read_bytes()

    def use(self, folder, content):
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / "a.h5").write_bytes(content)
        child = os.fork()
        if child == 0:
            code = 3
            try:
                with contextlib.suppress(Error):
                    for split in adopt([folder / "in"], folder / "set").splits.values():
                        if len(split):
                            split.take(np.array([0, len(split) - 1]))
                code = 0
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


READERS = [Index, Checkpoint, Tensors, Toml, Tar, WebDataset, Npz, Arrow, Submission, Run, Hdf5]
FOUND = {
    # Counts that are none, negative, not finite or too large; paths that are none; no chunk at all.
    Index: [[("json", 166, 0)], [("json", 38, 90)], [("json", 38, 65)], [("json", 38, 33)],
            [("json", 38, 0)], [("json", 37, 45)], [("json", 37, 13)], [("json", 37, 0)],
            [("json", 18, 19)], [("json", 17, 19)], [("json", 6, 25)], [("json", 6, 5)]],
    # Nested so deeply that JSON's and TOML's readers give up; and what is no number in a run.
    Checkpoint: [[("put", 40_000, 2)], [("put", 30_000, 3)]],
    Tensors: [[("over", 0, 7)], [("cut", 0, 0)]],
    Toml: [[("put", 65_535, 13)], [("put", 30_000, 2)]],
    Run: [[("json", 3, 7)], [("json", 5, 7)], [("json", 6, 7)], [("put", 30_000, 2)]],
}  # fmt: skip
"""Mutations that were once handled wrongly, as seeds of what comes next."""


@pytest.fixture(params=READERS, ids=lambda reader: reader.__name__)
def reader(request, tmp_path):
    return request.param()


@pytest.mark.slow
@pytest.mark.timeout(0 if EXAMPLES > 1000 else 300)
def test_mutated_inputs(reader, tmp_path):
    seed = reader.seed(tmp_path)
    reader.use(tmp_path, seed)  # as it is, it is right

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(MUTATIONS)
    def read_or_refused(mutations):
        tried(mutations)

    def tried(mutations):
        content = mutated(seed, mutations)
        with bounded(content), contextlib.suppress(Error):
            reader.use(tmp_path, content)

    for mutations in FOUND.get(type(reader), []):
        tried(mutations)
    read_or_refused()
