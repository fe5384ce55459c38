"""Tables as people write them, beside pyarrow and Python's own csv on the same file."""

import csv
import io
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pa = pytest.importorskip("pyarrow")

from hpctrain.data.importers import ImportOptions, import_data, look  # noqa: E402
from hpctrain.errors import Error  # noqa: E402
from hpctrain.world.launcher import ALONE  # noqa: E402


def values(folder, text, name="t.csv", **options):
    """Column -> its values, as imported; the folder is made anew."""
    folder.mkdir()
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    options = ImportOptions(validation_fraction=0, **options)
    shards = import_data(folder / name, folder / "s", options, ALONE)
    ((_, split),) = shards.splits.items()
    taken = split.take(np.arange(len(split)))
    found = {}
    for field in split.fields:
        if field + ".offsets" in taken:
            ends = taken[field + ".offsets"]
            rows = [taken[field][a:b].tobytes() for a, b in pairwise(ends)]
            found[field] = [row.decode() for row in rows]
        else:
            found[field] = taken[field].tolist()
    return found


@pytest.mark.parametrize(
    ("text", "options", "wanted"),
    [
        ("z,x\n007,1\n01234,2\n", {}, {"z": ["007", "01234"], "x": [1, 2]}),
        ("z\n18446744073709551615\n1\n", {}, {"z": [2**64 - 1, 1]}),
        ("z\n18446744073709551616\n1\n", {}, {"z": ["18446744073709551616", "1"]}),
        ("z\n-1\n9223372036854775808\n", {}, {"z": ["-1", "9223372036854775808"]}),
        ("z\n-9223372036854775808\n1\n", {}, {"z": [-(2**63), 1]}),
        ("z,x\n1,1\n,2\n", {"missing": "-9"}, {"z": [1, -9], "x": [1, 2]}),
        ("a;b\n1;2,5\n3;4,5\n", {"delimiter": ";", "decimal": ","}, {"a": [1, 3], "b": [2.5, 4.5]}),
        ("a\tb\n1\t2\n", {"delimiter": "\t"}, {"a": [1], "b": [2]}),
        ("5.5,a\n6,b\n", {"header": False}, {"f0": [5.5, 6.0], "f1": ["a", "b"]}),
        ("0,1\n5,6\n", {"header": True}, {"0": [5], "1": [6]}),
        ("a,b\n1,x\n", {"fields": ("b",)}, {"b": ["x"]}),
        ("\ufeffa,b\r\n1,x\r\n", {}, {"a": [1], "b": ["x"]}),
        ("a\nTrue\nfalse\n", {}, {"a": [True, False]}),
        ("x,label\n1,b\n2,a\n", {}, {"x": [1, 2], "label": [1, 0]}),
    ],
)
def test_what_is_written_is_what_is_imported(tmp_path, text, options, wanted):
    assert values(tmp_path / "a", text, **options) == wanted


def test_missing_floats_are_nan(tmp_path):
    found = values(tmp_path / "a", "b,c\n2.5,1\n,2\nNA,3\n")
    assert np.array_equal(found["b"], [2.5, np.nan, np.nan], equal_nan=True)
    found = values(tmp_path / "b", "b,c\n2,1\n,2\n", missing="nan")
    assert np.array_equal(found["b"], [2.0, np.nan], equal_nan=True) and found["c"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a;b\n1;2\n", "semicolons between its columns, not commas.*--delimiter ';'"),
        ("a\tb\n1\t2\n", "tabs between"),
        ("a b c\n1 2 3\n", "blanks between"),
        ("5.1,3.5,Iris\n4.9,3.0,Iris\n", "first line of .* seems not to name.*5.1.*--no-header"),
        ("5\n6\n", "--no-header"),
        ("# made by x\na\n1\n", "seems not to name the columns"),
        ("a,d\n1,2020-01-01\n", "column d of .* holds dates"),
        ("a,d\n1,31/12/2020\n", "column d of .* holds dates"),
        ("a,label\n1,x\n2,\n", "1 rows of column label of .* hold no class"),
        ("a,d\n1,\n2,\n", "column d of .* is empty"),
        ("\n\n1,2\n", "--no-header"),
        (f"{'a' * 200_000},b\n1,2\n", "first line of .* cannot be read"),
        ("a,b\n1,2\n,3\n", "1 rows of column a .* hold nothing.*--missing"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(Error, match=message):
        look(tmp_path / "t.csv", ImportOptions())


def test_decimal_commas_are_not_taken_for_text(tmp_path):
    (tmp_path / "t.csv").write_text("a;b\n1;2,5\n")
    with pytest.raises(Error, match="decimal commas.*--decimal"):
        look(tmp_path / "t.csv", ImportOptions(delimiter=";"))


CELLS = {
    "integer": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "text": st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map("t".__add__),
    "padded": st.integers(0, 9999).map("{:05d}".format),
}


@settings(max_examples=40)
@given(st.data(), st.sampled_from([",", ";", "\t", "|"]), st.sampled_from(["\n", "\r\n"]))
def test_any_table_comes_back(tmp_path_factory, data, delimiter, end):
    kinds = data.draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=2, max_size=4))
    rows = data.draw(st.lists(st.tuples(*(CELLS[kind] for kind in kinds)), min_size=1, max_size=6))
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, lineterminator=end)
    names = [f"{kind} {place}" for place, kind in enumerate(kinds)]
    writer.writerows([names, *rows])
    folder = tmp_path_factory.mktemp("t") / "a"
    found = values(folder, written.getvalue(), delimiter=delimiter)
    for place, name in enumerate(names):
        assert found[name] == [row[place] for row in rows]


def test_json_lines_and_compressed_tables(tmp_path):
    import gzip

    lines = [{"a": i, "t": f"x{i}", "v": [i, i + 1], "f": i / 2} for i in range(5)]
    text = "\n".join(map(json.dumps, lines))
    wanted = {key: [line[key] for line in lines] for key in lines[0]}
    assert values(tmp_path / "a", text, "t.jsonl") == wanted
    assert values(tmp_path / "b", gzip.compress(text.encode()), "t.jsonl.gz") == wanted
    assert values(tmp_path / "c", gzip.compress(b"a\n1\n"), "t.csv.gz") == {"a": [1]}
    assert values(tmp_path / "d", "a\tb\n1\t2\n", "t.tsv") == {"a": [1], "b": [2]}
    (tmp_path / "deep.jsonl").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(Error, match="nested too deeply"):
        look(tmp_path / "deep.jsonl", ImportOptions())


def test_parquet_with_nulls_dictionaries_and_numbers_that_are_none(tmp_path):
    import pyarrow.parquet

    table = pa.table(
        {
            "f": pa.array([1.5, None]),
            "i": pa.array([1, None], pa.int16()),
            "d": pa.array(["b", "a"]).dictionary_encode(),
            "t": pa.array(["x", None]),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    with pytest.raises(Error, match="1 rows of column i .* hold nothing"):
        look(tmp_path / "t.parquet", ImportOptions())
    found = values(tmp_path / "a", data, "t.parquet", missing="-1")
    assert found["i"] == [1, -1] and found["d"] == ["b", "a"] and found["t"] == ["x", ""]
    assert np.isnan(found["f"][1])
    found = values(tmp_path / "b", data, "t.parquet", missing="nan", fields=("i",))
    assert found["i"][0] == 1.0 and np.isnan(found["i"][1])
    import decimal

    odd = {"m": [decimal.Decimal("1.5")], "n": [[[1]]], "s": [{"a": 1}]}
    for name, column in odd.items():
        pyarrow.parquet.write_table(pa.table({name: column}), tmp_path / "o.parquet")
        with pytest.raises(Error, match=f"column {name} of .* is of type .*--fields"):
            look(tmp_path / "o.parquet", ImportOptions())


@pytest.mark.parametrize("form", ["file", "stream", "feather"])
def test_arrow_files(tmp_path, form):
    """In several batches, one of them empty; compressed, with dictionaries, lists and nulls."""
    import pyarrow.feather

    table = pa.table(
        {
            "n": pa.array([3, None, 5, 7, 8], pa.int16()),
            "word": pa.array(["a", "b", "a", None, "c"]).dictionary_encode(),
            "pair": pa.array([[1.0, 2.0]] * 5, pa.list_(pa.float64(), 2)),
        }
    )
    file = tmp_path / ("t.feather" if form == "feather" else "t.arrow")
    if form == "feather":
        pyarrow.feather.write_feather(table, file, compression="zstd", chunksize=2)
    else:
        make = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with make(str(file), table.schema) as writer:
            for part in (table.slice(0, 2), table.slice(2, 0), table.slice(2)):
                writer.write_table(part.combine_chunks() if len(part) else part)
    found = values(tmp_path / "a", file.read_bytes(), file.name, missing="-1")
    assert found["n"] == [3, -1, 5, 7, 8] and found["pair"] == [[1.0, 2.0]] * 5
    assert found["word"] == ["a", "b", "a", "", "c"]


def test_damaged_arrow_files_are_named(tmp_path):
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), pa.schema({"x": pa.int64()})) as writer:
        writer.write_table(pa.table({"x": list(range(1000))}))
    whole = (tmp_path / "t.arrow").read_bytes()
    (tmp_path / "t.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Error, match="t.arrow"):
        look(tmp_path / "t.arrow", ImportOptions())
    (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(40) + b"FEA1")
    with pytest.raises(Error, match="Feather of version 1"):
        look(tmp_path / "old.feather", ImportOptions())
