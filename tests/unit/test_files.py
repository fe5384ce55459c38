"""Files of others: regular ones alone, within bounds; and reports of plots with one name."""

import json
import os

import pytest

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import read_toml, value_of
from hpctrain.data.shards import ShardSet
from hpctrain.errors import Error
from hpctrain.files import is_own, json_lines, open_regular, read_json, read_regular
from hpctrain.report.benchmarks import read_benchmark
from hpctrain.report.compare import records_of
from hpctrain.report.figures import Plot, file_name
from hpctrain.report.page import _distinct
from hpctrain.report.runs import read_run
from hpctrain.train import sample_trace
from hpctrain.world.failure_record import read_notes


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for read in (open_regular, read_json, lambda path: list(json_lines(path))):
        for path in (fifo, tmp_path, "/dev/zero"):
            with pytest.raises(OSError, match="not a regular file"):
                read(path)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("{}")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"{}"
    with pytest.raises(OSError, match="ymbolic link"):
        open_regular(tmp_path / "link", follow=False)
    for name in ("a\0b", "\ud800"):
        with pytest.raises(OSError, match="not a name of a file"):
            open_regular(tmp_path / name)
    with pytest.raises(OSError, match="larger than 1 bytes"):
        read_regular(tmp_path / "file", 1)


@pytest.mark.parametrize("kind", ["fifo", "deep"])
def test_readers_of_what_others_may_have_written(tmp_path, kind):
    """A FIFO is not waited for, and what is nested a million deep is an error in one line."""

    def make(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        else:
            path.write_text("a = " * path.name.endswith("toml") + "[" * 1_000_000)
        return path

    with pytest.raises(Error, match="cannot read|not TOML"):
        read_toml(make(tmp_path / "c.toml"))
    with pytest.raises(Error, match="cannot read"):
        read_benchmark(make(tmp_path / "b.json"))
    make(tmp_path / "set" / "hpctrain-index.json")
    with pytest.raises(Error, match="damaged|cannot be read"):
        ShardSet(tmp_path / "set")
    for name in ("state.json", "tensors.safetensors"):
        make(tmp_path / "checkpoints" / "step-00000001" / name)
    with pytest.raises(Error, match="all 1 checkpoints"):
        CheckpointStore(tmp_path / "checkpoints", 2).newest(lambda text: None)
    make(tmp_path / "run" / "rank-0.json")
    assert read_notes(tmp_path / "run") == []
    make(tmp_path / "run" / "metrics.jsonl")
    assert records_of(tmp_path / "run") == []
    (tmp_path / "run" / "metrics.jsonl").unlink()
    record = {"kind": "train", "step": 1, "time": 1.0, "loss": 1.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    for name in ("result.json", "config.toml"):
        path = make(tmp_path / "run" / name)
        with pytest.raises(Error, match="cannot read|not TOML"):
            read_run(tmp_path / "run")
        path.unlink()
    assert read_run(tmp_path / "run").state == "unfinished"


def test_deep_keys_and_values_of_toml(tmp_path):
    for text in ("a." * 100_000 + "a = 1", "[" + "a." * 900 + "a]", "a = " + "[" * 100 + "]" * 100):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(Error, match="not TOML: (a line with|nested more than 64 deep)"):
            read_toml(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff")
    with pytest.raises(Error, match="not TOML"):
        read_toml(tmp_path / "c.toml")
    assert value_of("[" * 100_000) == "[" * 100_000
    assert value_of("[1, 2]") == [1, 2]


def test_notes_and_traces_of_wrong_types(tmp_path):
    for number, note in enumerate(
        [
            {"what": "a", "message": "b", "time": 2},
            {"what": "a", "message": "b", "time": "x"},
            {"message": "b"},
            {"what": 1, "message": "b"},
            [],
        ]
    ):
        (tmp_path / f"rank-{number}.json").write_text(json.dumps(note))
    assert [note.time for note in read_notes(tmp_path)] == [2.0]
    folder = tmp_path / sample_trace.FOLDER
    folder.mkdir()
    ended = {"ended": 10**15, "world": [0], "members": [0]}
    (folder / "0-0.jsonl").write_text(json.dumps(ended) + "\n")
    assert sample_trace.check(tmp_path).wrong[0] == "step 1 never ended"
    (folder / "0-0.jsonl").write_text(json.dumps({**ended, "members": "x", "ended": "y"}) + "\n")
    with pytest.raises(Error, match="cannot be read"):
        sample_trace.check(tmp_path)


def test_whose_a_file_is(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    assert is_own(tmp_path) and is_own(tmp_path / "file")
    assert not is_own(tmp_path / "link") and not is_own(tmp_path / "none")
    (tmp_path / "file").chmod(0o666)
    assert not is_own(tmp_path / "file")
    assert not is_own("/") or os.geteuid() == 0


@pytest.mark.parametrize("letters", [10, 79, 80, 200])
def test_plots_with_one_name_have_files_of_their_own(letters):
    figures = [Plot(file_name("x" * letters), "title", "x", "y", ()) for _ in range(12)]
    named = _distinct(figures)
    assert list(named.values()) == figures
    assert all(len(name) <= 80 for name in named)
