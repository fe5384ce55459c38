"""Sources as people, tools and attackers leave them: what is taken, what is left out and said."""

import io
import os
import resource
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpctrain.data.adopt import look as look_at_files
from hpctrain.data.importers import ImportOptions, import_data, look
from hpctrain.errors import Error
from hpctrain.world.launcher import ALONE

OPTIONS = ImportOptions(validation_fraction=0)


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path, members, mode="w"):
    """Members are (name, bytes), or (name, type, what a link leads to)."""
    with tarfile.open(path, mode) as archive:
        for name, *what in members:
            member = tarfile.TarInfo(name)
            if len(what) == 2:
                member.type, member.linkname = what
                archive.addfile(member)
            else:
                member.size = len(what[0])
                archive.addfile(member, io.BytesIO(what[0]))
    return path


def samples(folder, source, options=OPTIONS):
    """Brightness -> class of each image, and the summary."""
    said = []
    shards = import_data(source, folder, options, ALONE, said.append)
    found = []
    for split in shards.splits.values():
        taken = split.take(np.arange(len(split)))
        names = [shards.attributes["classes"][label] for label in taken["label"]]
        found += zip(taken["image"][:, 0, 0, 0].tolist(), names, strict=True)
    return sorted(found), "\n".join(said)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_a_tar_are_what_they_lead_to(tmp_path, mode):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    members = [
        ("d/b/later.png", soft, "../a/1.png"),
        ("d/a/1.png", png(1)),
        ("d/a/2.png", png(2)),
        ("d/b/hard.png", hard, "d/a/2.png"),
        ("d/b/chain.png", soft, "hard.png"),
        ("d/c", soft, "a"),
        ("d/pipe.png", tarfile.FIFOTYPE, ""),
    ]
    found, said = samples(tmp_path / "s", pack(tmp_path / "x.tar", members, mode))
    wanted = [(1, "a"), (2, "a"), (1, "b"), (2, "b"), (2, "b"), (1, "c"), (2, "c")]
    assert found == sorted(wanted)
    assert "1 not a file (a pipe, socket or device): d/pipe.png" in said
    for name, target in (("d/a/x.png", "nowhere.png"), ("d/a/up", "..")):
        pack(tmp_path / "y.tar", [*members, (name, soft, target)])
        with pytest.raises(Error, match=f"{name} in .*y.tar is a link to"):
            look(tmp_path / "y.tar", OPTIONS)


def test_what_is_left_out_of_a_folder_is_said(tmp_path):
    source = tmp_path / "in"
    for name in ("a/1.png", "b/2.png", ".git/x.png", "__MACOSX/a/1.png", "a/.hidden.png", "3.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(png(int(name[-5]) if name[-5].isdigit() else 0))
    (source / "README.md").write_text("x")
    os.mkfifo(source / "a" / "pipe.png")
    found, said = samples(tmp_path / "s", source)
    assert found == [(1, "a"), (2, "b")]
    for line in (
        "left out  3 hidden: .git, __MACOSX, a/.hidden.png",
        "left out  1 not a file (a pipe, socket or device): a/pipe.png",
        "left out  1 file that is no image by its name: README.md",
        "left out  1 image in no folder of a class: 3.png",
        "classes   2: a 1, b 1",
        "splits    train 2",
    ):
        assert line in said


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.png").write_bytes(png(1))
    (tmp_path / "in" / "labels.csv").write_text("id,breed\n1,2\n")
    with pytest.raises(Error, match=r"images \(a/1.png.*tables \(labels.csv.*--kind images or"):
        look(tmp_path / "in", OPTIONS)
    _, said = samples(tmp_path / "s", tmp_path / "in", ImportOptions(kind="images"))
    assert "left out  1 file that is no image by its name: labels.csv" in said
    said = look(tmp_path / "in", ImportOptions(kind="tables", validation_fraction=0))
    assert "fields    id int64(), breed int64()" in said and "left out  1 no table: a/1.png" in said


def test_a_tar_of_tars_is_refused(tmp_path):
    inner = pack(tmp_path / "n01.tar", [("x.png", png(1))]).read_bytes()
    outer = pack(tmp_path / "all.tar", [("n01.tar", inner), ("n02.tar", inner)])
    with pytest.raises(Error, match="all.tar holds nothing but archives, such as n01.tar"):
        look(outer, OPTIONS)


def test_webdataset_members_of_many_kinds(tmp_path):
    def npy(array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    (tmp_path / "in" / "val").mkdir(parents=True)
    members = [
        (f"{i}.{kind}", content)
        for i in range(4)
        for kind, content in (
            ("jpg", png(i)),
            ("png", png(i + 9)),
            ("a.npy", npy(np.full(i + 1, i, ">f4"))),
        )
    ]
    pack(tmp_path / "in" / "val" / "0.tar", [("._0.jpg", b""), *members])
    (tmp_path / "in" / "val" / "0.tar.idx").write_text("x")
    said = []
    split = import_data(tmp_path / "in", tmp_path / "s", OPTIONS, ALONE, said.append).split(
        "validation"
    )
    assert {name: str(spec) for name, spec in split.fields.items()} == {
        "jpg": "uint8(rows)",
        "png": "uint8(rows)",
        "a_npy": "float32(rows)",
    }
    taken = split.take(np.arange(4))
    assert taken["a_npy"].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert "left out  1 no tar: val/0.tar.idx" in said and "left out  1 hidden: ._0.jpg" in said


@pytest.mark.parametrize("name", ["x_train", "x"])
def test_adopt_and_import_say_the_same(tmp_path, name):
    with h5py.File(tmp_path / "test_run7.h5", "w") as file:
        file[name], file["y" + name[1:]] = np.arange(20.0), np.arange(20, dtype=">i4") % 2
        file["version"] = 3
        file["again"] = h5py.SoftLink(f"/{name}")
    adopted = look_at_files([tmp_path / "test_run7.h5"])
    imported = look(tmp_path / "test_run7.h5", OPTIONS)
    split = "train" if name == "x_train" else "test"
    for said in (adopted, imported):
        assert f"splits    {split} 20" in said and "classes   2: 0 10, 1 10" in said
        assert any("single value" in line and line.endswith("version") for line in said)
        assert any("link" in line and line.endswith("again") for line in said)
    assert list(tmp_path.iterdir()) == [tmp_path / "test_run7.h5"]


def test_hdf5_put_together_from_other_files(tmp_path):
    x = np.arange(40).reshape(20, 2)
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file["x"] = x
    layout = h5py.VirtualLayout(x.shape, x.dtype)
    layout[:] = h5py.VirtualSource("part.h5", "x", x.shape)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_virtual_dataset("x", layout, fillvalue=0)
    split = import_data(tmp_path / "whole.h5", tmp_path / "s", OPTIONS, ALONE).split("train")
    assert np.array_equal(split.take(np.arange(20))["x"], x)
    (tmp_path / "part.h5").unlink()
    with pytest.raises(Error, match=r"x is put together from .*part.h5, which is not there"):
        import_data(tmp_path / "whole.h5", tmp_path / "t", OPTIONS, ALONE)


def header(name, size_field, kind=b"0"):
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size_field)] = size_field
    block[156:157], block[257:263] = kind, b"ustar\0"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(b"a/0.png", (-512).to_bytes(12, "big", signed=True)), "a negative number"),
        (header(b"a/0.png", b"-1000"), "is no number"),
        (header(b"a/0.png", b"\x80" + b"\xff" * 11), "a member at byte"),
        (header(b"long", b"26264057000", b"L"), "the name of a member|a member at byte"),
        (header(b"p", b"20", b"x") + b"99 path=x\n".ljust(512, b"\0"), "a broken pax header"),
    ],
)
def test_tars_that_lie_about_sizes(tmp_path, data, message):
    good = pack(tmp_path / "good.tar", [("a/1.png", png(1))]).read_bytes()
    (tmp_path / "x.tar").write_bytes(good[:1024] + data + bytes(1024))
    with pytest.raises(Error, match=f"x.tar cannot be read to its end: .*({message})"):
        look(tmp_path / "x.tar", OPTIONS)


def npy_of(head, content=b""):
    head = head.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + content


@pytest.mark.parametrize(
    "head",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 1000000000), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 8), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f8', 'fortran_order': True, 'shape': (1152921504606846976, 16), }",
        "(" * 100,
        "",
    ],
)
def test_arrays_that_lie_about_sizes(tmp_path, head):
    (tmp_path / "x.npy").write_bytes(npy_of(head, bytes(64)))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy_of(head, bytes(64)))
    for name in ("x.npy", "x.npz"):
        with pytest.raises(Error, match=name):
            look(tmp_path / name, OPTIONS)


def test_a_row_that_would_fill_memory_is_refused(tmp_path):
    head = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 300000000), }"
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w") as file,
    ):
        file.write(npy_of(head))
        for _ in range(300):
            file.write(bytes(10**6))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Error, match="a row of x has 300,000,000 bytes, more than the file"):
        import_data(tmp_path / "x.npz", tmp_path / "s", OPTIONS, ALONE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100 * 1024


def test_no_pipe_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(Error, match="x.tar is a pipe, socket or device"):
        look(tmp_path / "x.tar", OPTIONS)


def mutants(folder):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    x = np.arange(60.0).reshape(20, 3)
    np.savez(folder / "m.npz", x=x, y=np.arange(20))
    np.save(folder / "m.npy", x)
    pack(folder / "m.tar", [(f"{'ab'[i % 2]}/{i}.png", png(i)) for i in range(3)])
    pack(folder / "w.tar", [("0.png", png(1)), ("0.cls", b"1"), ("0.json", b"{}")])
    table = pyarrow.table({"x": [1, 2], "t": ["a", "b"]})
    pyarrow.parquet.write_table(table, folder / "m.parquet")
    (folder / "m.csv").write_text("a,b,label\n1,2.5,x\n3,4.5,y\n")
    (folder / "m.jsonl").write_text('{"a": 1, "b": [1, 2]}\n{"a": 2, "b": [3, 4]}\n')
    return sorted(folder.glob("*"))


@settings(max_examples=60)
@given(st.data())
def test_damaged_files_are_refused_in_one_line_or_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("m")
    path = data.draw(st.sampled_from(mutants(folder)))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(1, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    try:
        import_data(path, folder / "s", OPTIONS, ALONE)
    except Error as error:
        assert "\n" not in str(error) and "HINT" in str(error)
