"""What a report reads, and what it chooses to show."""

import html.parser
import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.errors import Error
from hpctrain.report import cases, curves, scaling, variables
from hpctrain.report.benchmarks import read_benchmark
from hpctrain.report.compare import compare
from hpctrain.report.figures import Bars, Plot, Series, number, spread, thin, words
from hpctrain.report.page import read, render, report, sections_of
from hpctrain.report.runs import continued, name_runs, read_run

STEPS = 6


def write_run(folder, *, ranks=1, speed=100.0, config="", records=None, tail="", **start):
    """A run folder, of a run that is not completed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(
        f'task = "digits"\nstrategy = "horovod"\n[train]\nbatch_size = 64\n{config}'
    )
    if records is None:
        event = {"kind": "event", "step": 0, "time": 10.0, "size": ranks, "reason": "start"}
        records = [{**event, **start}]
        for step in range(1, STEPS):
            line = {"step": step, "time": 10.0 + step, "loss": 1 / step, "accuracy": step / STEPS}
            train = {"samples_per_second": speed, "lr": 0.1, "input_wait_ms": 0.5, "epoch": step}
            records += [{"kind": "train", **line, **train}, {"kind": "validation", **line}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


def write_benchmark(path, **document):
    path.write_text(json.dumps({"schema": 1, "benchmark": "b", **document}))
    return path


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=400))
def test_thinning_keeps_the_ends_and_the_extremes_of_every_stretch(values):
    buckets = 7
    x, y = thin(range(len(values)), values, buckets)
    assert len(y) <= max(2 * buckets + 2, 1) and list(x) == sorted(set(x))
    assert [values[place] for place in x] == y
    assert (x[0], x[-1]) == (0, len(values) - 1)
    for bucket in range(buckets):
        first = bucket * len(values) // buckets
        last = (bucket + 1) * len(values) // buckets
        if stretch := values[first:last]:
            kept = [value for place, value in zip(x, y, strict=True) if first <= place < last]
            assert (min(kept), max(kept)) == (min(stretch), max(stretch))


@pytest.mark.parametrize(
    ("key", "text"),
    [("median_ms", "median (ms)"), ("samples_per_second", "samples/s"), ("a_b", "a b"),
     ("goodput_MBps", "goodput (MB/s)"), ("seconds", "s"), ("bytes", "bytes")],
)  # fmt: skip
def test_keys_are_said_in_words(key, text):
    assert words(key) == text


def test_numbers_of_files():
    assert [number(v) for v in (1, 2.5, True, None, "3", float("nan"), 10**400)] == [
        *(1.0, 2.5, None, None, None, None, None)
    ]
    assert spread(2.0, 1.0, 3.0) == "2 (1..3)" and spread(2.0, 2.0, 2.0) == "2"


# Runs.


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path):
    run = read_run(write_run(tmp_path / "run", tail='{"kind": "train", "st'))
    assert run.state == "unfinished"
    assert [record["step"] for record in run.of("train")] == list(range(1, STEPS))
    assert run.metrics == {
        "train_loss": 0.2, "train_accuracy": 5 / STEPS, "val_loss": 0.2, "val_accuracy": 5 / STEPS
    }  # fmt: skip
    assert run.speed == 100 and run.step_ms == 640
    assert run.config["train.batch_size"] == 64


def test_how_runs_ended(tmp_path):
    for name, file, content in (
        ("done", "result.json", {"strategy": "ps"}),
        ("stopped", "interrupted.json", {"step": 3}),
        ("failed", "failure.json",
         {"rank": 1, "what": "Error", "message": "no room", "exit_code": 2}),
    ):  # fmt: skip
        (write_run(tmp_path / name) / file).write_text(json.dumps(content))
    states = {name: read_run(tmp_path / name).state for name in ("done", "stopped", "failed")}
    assert states == {
        "done": "completed", "stopped": "interrupted", "failed": "failed: rank 1: Error: no room"
    }  # fmt: skip


def test_what_was_undone_by_a_resume_counts_once_and_standstills_take_no_time():
    def line(kind, step, time, **values):
        return {"kind": kind, "step": step, "time": time, **values}

    records = [
        line("event", 0, 100.0, size=2, reason="start"),
        line("train", 1, 101.0, loss=1.0),
        line("event", 2, 101.5, size=1, reason="worker 1 was lost", lost=1, step_ms=9.0),
        line("train", 2, 102.0, loss=0.9),
        line("train", 3, 103.0, loss=0.8),
        line("event", 2, 500.0, size=1, reason="resumed at step 2"),
        line("train", 3, 501.0, loss=0.7),
    ]
    kept = continued(records)
    train = [(r["step"], r["loss"], r["seconds"]) for r in kept if r["kind"] == "train"]
    assert train == [(1, 1.0, 1.0), (2, 0.9, 2.0), (3, 0.7, 3.0)]
    assert [r["reason"] for r in kept if r["kind"] == "event"] == [
        "start", "worker 1 was lost", "resumed at step 2"
    ]  # fmt: skip


KEYS = ("size", "time", "loss", "lost", "reason", "oversubscribed", "samples_per_second", "epoch",
        "staleness_mean", "staleness_histogram", "step_ms", "moved_bytes",
        "compute_ms")  # fmt: skip
TEXT = st.text(max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
KINDS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["train", "validation", "timing", "exchange", "event"])}
)
LINES = st.tuples(KINDS, st.dictionaries(st.sampled_from(KEYS), JSON))


@pytest.mark.slow
@settings(max_examples=150)
@given(st.lists(LINES, max_size=5))
def test_whatever_lines_hold_there_is_a_report(tmp_path_factory, lines):
    loss = {"kind": "train", "step": 0, "loss": 1.0}
    records = [loss, *({**kind, "step": n, **values} for n, (kind, values) in enumerate(lines))]
    run = write_run(tmp_path_factory.mktemp("any") / "run", records=records)
    titles = [section.title for section in sections_of(*read([run]))]
    assert titles[:3] == ["Run", "Learning", "Speed"]


def test_labels_are_as_short_as_they_can_be(tmp_path):
    runs = [read_run(write_run(tmp_path / name)) for name in ("a/one", "b/one", "a/two")]
    runs.append(read_run(write_run(tmp_path / "three", oversubscribed=True)))
    name_runs(runs)
    assert [run.label for run in runs] == ["a/one", "b/one", "two", "three*"]


def test_curves_of_two_runs(tmp_path):
    runs, _ = read([write_run(tmp_path / "one"), write_run(tmp_path / "two", ranks=2)])
    plots = {plot.name: plot for plot in curves.learning(runs).figures}
    assert list(plots) == [
        "loss-over-step", "loss-over-seconds", "accuracy-over-step", "accuracy-over-seconds",
        "learning-rate",
    ]  # fmt: skip
    loss = plots["loss-over-seconds"]
    assert [(line.label, line.faint, line.look) for line in loss.series] == [
        ("", True, 0), ("one", False, 0), ("", True, 1), ("two", False, 1)
    ]  # fmt: skip
    assert list(loss.series[1].x) == [1, 2, 3, 4, 5]
    assert "one: from 1 to 0.2, least 0.2, largest 1." in str(loss)


def test_where_the_time_of_a_step_goes(tmp_path):
    loss = {"kind": "train", "step": 1, "loss": 1.0}
    lines = [
        {"kind": "timing", "step": n, "compute_ms": ms, "exchange_ms": 2.0, "other_ms": "x"}
        for n, ms in enumerate((99.0, 4.0, 6.0))
    ]
    runs, _ = read([write_run(tmp_path / "run", records=[loss, *lines]), write_run(tmp_path / "o")])
    (bars,) = curves.parts(runs)
    assert list(bars.labels) == ["run"] and list(map(list, bars.parts.values())) == [
        [0], [5], [2], [0], [0]
    ]  # fmt: skip
    assert "run: input 0, compute 5, exchange 2" in str(bars)


def test_staleness_and_losses(tmp_path):
    lost = {"lost": 1, "role": "worker", "host": "n1", "step_ms": 250.0}
    records = [
        {"kind": "event", "step": 0, "time": 1.0, "size": 2, "reason": "start"},
        {"kind": "train", "step": 4, "time": 2.0, "loss": 1.0, "samples_per_second": 640.0},
        {"kind": "exchange", "step": 4, "time": 2.0, "staleness_mean": 0.5, "moved_bytes": 0,
         "staleness_histogram": {"0": 3, "2": 1, "x": 1}},
        {"kind": "event", "step": 5, "time": 3.0, "size": 1, "reason": "worker 1 was lost", **lost},
    ]  # fmt: skip
    runs, _ = read([write_run(tmp_path / "run", records=records)])
    assert runs[0].ranks == "2 → 1"
    plots = {plot.name: plot for plot in curves.exchange(runs).figures}
    assert set(plots) == {"staleness-mean-over-workers", "largest-staleness", "staleness-histogram"}
    (line,) = plots["staleness-histogram"].series
    assert (list(line.x), list(line.y)) == ([0, 1, 2], [0.75, 0, 0.25])
    section = curves.changes(runs)
    assert section.tables[0].rows == [
        ["run", "lost", "5", "2.0", "1", "250", "100", "worker 1 was lost"]
    ]
    assert section.figures[0].marks == [(5.0, 0)]
    assert list(section.figures[0].series[0].y) == [2, 1, 1]


def test_scaling_is_by_the_rule_of_compare(tmp_path):
    paths = [
        write_run(tmp_path / str(ranks), ranks=ranks, speed=speed, oversubscribed=ranks > 2)
        for ranks, speed in ((1, 100.0), (2, 180.0), (4, 300.0))
    ]
    runs, _ = read(paths)
    section = scaling.section(runs)
    throughput, efficiency = section.figures
    (line,) = efficiency.series
    assert dict(zip(line.x, line.y, strict=True)) == {r.ranks: r.efficiency for r in compare(paths)}
    assert list(line.y) == [1.0, 0.9, 0.75] and list(line.hollow) == [False, False, True]
    assert line.label == "horovod, strong scaling, global batch 64"
    assert throughput.ideal == [(1, 100.0), (4, 400.0)]
    assert [row[1] for row in section.tables[0].rows] == ["1", "2", "4*"]


def test_what_makes_a_family_of_runs(tmp_path):
    one = write_run(tmp_path / "one", config="epochs = 3\n")
    two = write_run(tmp_path / "two", ranks=2, config="epochs = 4\n")
    other = write_run(tmp_path / "other", ranks=2, config='dtype = "bf16"\n')
    lost = [{"kind": "event", "step": s, "time": 1.0, "size": 4 - s, "reason": ""} for s in (0, 1)]
    lost.append({"kind": "train", "step": 2, "time": 2.0, "loss": 1.0, "samples_per_second": 1.0})
    runs, _ = read([one, two, other, write_run(tmp_path / "lost", records=lost)])
    assert [[run.label for run in family] for family in scaling.families(runs)] == [["one", "two"]]
    assert scaling.section(runs[:1]) is None


def test_runs_as_small_share_a_baseline(tmp_path):
    paths = [
        write_run(tmp_path / name, ranks=ranks, speed=speed)
        for name, ranks, speed in (("a", 1, 90.0), ("b", 1, 110.0), ("c", 2, 150.0))
    ]
    assert [row.efficiency for row in compare(paths)] == [0.9, 1.1, 0.75]


# Benchmarks.


def test_forms_of_benchmarks(tmp_path):
    flat = read_benchmark(write_benchmark(tmp_path / "a", records=[{"ranks": 1, "time_ms": 2.0}]))
    assert flat.records == [{"ranks": 1, "time_ms": 2.0}]
    nested = {"ours": {"small": {"speed": 3.0}, "large": {"skipped": "no"}}, "theirs": {"speed": 1}}
    cased = read_benchmark(
        write_benchmark(tmp_path / "b", cases=nested, versions={"torch": "2"}, cores=2)
    )
    assert cased.records == [
        {"case": "ours", "case 2": "small", "speed": 3.0},
        {"case": "ours", "case 2": "large", "skipped": "no"},
        {"case": "theirs", "speed": 1},
    ]
    assert cased.about == {"schema": 1, "torch": "2", "cores": 2}
    single = read_benchmark(write_benchmark(tmp_path / "c", model="m", ratio_median=1.0))
    assert single.records == [{"model": "m", "ratio_median": 1.0}]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot read"), ("[1]", "is not of a benchmark"), ('{"a": 1}', "is not of a benchmark"),
     ('{"schema": 1, "benchmark": "b", "records": []}', "holds no records"),
     ("[" * 100_000, "cannot read")],
)  # fmt: skip
def test_what_is_no_benchmark(tmp_path, text, words):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(Error, match=words) as error:
        read_benchmark(tmp_path / "file.json")
    assert "file.json" in error.value.message and error.value.hint


def timed(value, **variables):
    return {**variables, "oversubscribed": variables.get("ranks", 0) > 2, "time_us": value,
            "time_us_min": value - 1, "time_us_max": value + 2, "raw_us": [value]}  # fmt: skip


def test_lines_over_the_variable_with_the_most_values():
    records = [
        timed(float(size * ranks), engine=engine, bytes=size, ranks=ranks)
        for engine in ("mpi", "gloo")
        for ranks in (2, 4)
        for size in (8, 64, 4096)
    ]
    keys = variables.variables_of(records)
    assert keys == ["engine", "bytes", "ranks"]
    assert variables.measures_of(records, keys) == ["time_us"]
    assert variables.axis(records, keys) == ("bytes", ["engine", "ranks"])
    (plot,) = cases.figures("all-reduce", records, keys)
    assert plot.log_x and plot.log_y and plot.y_label == "time (us)"
    assert {line.label: list(line.hollow) for line in plot.series} == {
        "mpi, ranks 2": [False] * 3, "mpi, ranks 4": [True] * 3,
        "gloo, ranks 2": [False] * 3, "gloo, ranks 4": [True] * 3,
    }  # fmt: skip
    line = next(line for line in plot.series if line.label == "gloo, ranks 4")
    assert (list(line.x), list(line.y)) == ([8, 64, 4096], [32, 256, 16384])
    assert list(line.low) == [31, 255, 16383] and list(line.high) == [34, 258, 16386]


def test_a_name_that_follows_from_the_axis_makes_no_lines():
    records = [timed(float(n), case=f"hosts_{n}", servers=n, hosts=n + 4) for n in (1, 2, 4)]
    assert variables.axis(records, variables.variables_of(records)) == ("servers", [])


def test_bars_where_there_are_no_lines():
    records = [timed(float(n), case=f"c{n}", workers=1, vector_MB=n // 3) for n in range(1, 5)]
    keys = variables.variables_of(records)
    assert variables.axis(records, keys) is None
    (bars,) = cases.figures("b", records, keys)
    assert isinstance(bars, Bars) and list(bars.labels) == ["c1", "c2", "c3", "c4"]
    table = cases.table("b", records, keys)
    assert table.rows[0] == ["c1", "0", "1 (0..3)"] and "workers 1" in table.note


def test_records_that_differ_in_nothing_are_repeats():
    records = [timed(value, ranks=ranks) for ranks in (1, 2) for value in (9.0, 5.0, 6.0)]
    (plot,) = cases.figures("b", records, ["ranks"])
    (line,) = plot.series
    assert (list(line.y), list(line.low), list(line.high)) == ([6.0] * 2, [4.0] * 2, [11.0] * 2)


@pytest.mark.parametrize(
    ("record", "key"),
    [({"a_ms": 2.0, "a_ms_min": 1.0, "a_ms_max": 4}, "a_ms"), ({"a": 2.0, "a_spread": [1, 4]}, "a"),
     ({"a_median": 2.0, "a_quartiles": [1, 4]}, "a_median"), ({"a": 2.0, "spread": [1, 4]}, "a")],
)  # fmt: skip
def test_forms_of_spread(record, key):
    assert variables.measured([record], key) == (2.0, 1.0, 4.0)
    assert variables.measures_of([record], []) == [key]


def test_failed_cases_are_told():
    records = [timed(1.0, case="good"), {"case": "bad", "failed": ["no such library"]}]
    keys = variables.variables_of(records)
    assert cases.table("b", records, keys).rows == [
        ["good", "1 (0..3)", ""], ["bad", "", "no such library"]
    ]  # fmt: skip


# The page.


class Elements(html.parser.HTMLParser):
    """Tags, ids and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.references, self.text = Counter(), Counter(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        for key, value in attributes:
            if key == "id":
                self.ids[value] += 1
            if key in ("href", "xlink:href"):
                self.references.add(value)
            self.references |= {f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", value or "")}

    def handle_data(self, data):
        self.text += data


HOSTILE = "<script>alert(1)</script>&\"'$\\frac{$\x00\ud800"


@pytest.mark.slow
def test_what_files_hold_is_text(tmp_path):
    run = write_run(tmp_path / "_<b>run", config=f"[options]\nnote = {json.dumps('<img src=x>')}\n")
    line = {"kind": "train", "step": STEPS, "time": 20.0, HOSTILE: 1.0, "loss": 0.1}
    event = {"kind": "event", "step": 7, "time": 21.0, "size": 1, "lost": 1, "reason": HOSTILE}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(event) + "\n")
    records = [timed(float(n), case=f"{HOSTILE}{n}") for n in range(3)]
    benchmark = write_benchmark(tmp_path / "b.json", records=records, cpu=HOSTILE)
    page = render(sections_of(*read([run, run, benchmark])), HOSTILE)
    elements = Elements(page)
    assert not {"script", "img", "b", "iframe", "object"} & set(elements.tags)
    assert elements.text.count("<script>alert(1)</script>") > 8
    assert page.encode()


@pytest.mark.slow
def test_ids_are_one_of_a_kind_and_nothing_is_fetched(tmp_path):
    runs = [write_run(tmp_path / name, ranks=n) for n, name in enumerate("abc", start=1)]
    benchmark = write_benchmark(
        tmp_path / "b.json", records=[timed(float(n), case="x", ranks=n) for n in (1, 2, 4)]
    )
    elements = Elements(render(sections_of(*read([*runs, benchmark])), "title"))
    assert elements.tags["svg"] == 10
    assert set(elements.ids.values()) == {1}
    inside = {reference for reference in elements.references if reference != "data:,"}
    assert inside <= {f"#{name}" for name in elements.ids}


def test_plots_with_the_same_name_get_files_of_their_own(tmp_path):
    records = [timed(float(n), ranks=n) for n in (1, 2)]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_benchmark(tmp_path / folder / "b.json", records=records)
    inputs = [tmp_path / folder / "b.json" for folder in ("one", "two")]
    assert report(inputs, tmp_path / "page.html", tmp_path / "plots") == 2
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "b-time-us.png", "b-time-us.svg", "b-time-us-2.png", "b-time-us-2.svg"
    }  # fmt: skip


def test_plots_of_one_point_and_of_many_lines():
    from hpctrain.report.drawing import inline

    one = Plot("one", "One", "x", "y", [Series("a", [1.0], [0.0])], from_zero=True)
    lines = [Series(f"line {n}", [1, 10**6], [n + 1, 10.0**n], look=n) for n in range(25)]
    many = Plot("many", "Many", "x", "y", lines, log_x=True, log_y=True)
    for plot in (one, many):
        assert inline(plot, "p-").count("<title") == 1
