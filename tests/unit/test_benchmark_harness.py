"""What all benchmarks share: turns, records, verdicts, and one command line."""

import importlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.all import ENTRIES
from benchmarks.harness.bars import at_least, at_most, judge, line_of
from benchmarks.harness.command import (
    Benchmark,
    NotHereError,
    Report,
    count,
    numbers,
    positive,
    words_of,
)
from benchmarks.harness.processes import Tail, scratch
from benchmarks.harness.rounds import compared, in_turn, quartiles, record_of
from benchmarks.harness.tables import by_group, table_of
from hpctrain.errors import Error


@given(
    cases=st.integers(1, 4), rounds=st.integers(0, 5), warm_up=st.integers(0, 3), back=st.booleans()
)
def test_cases_take_turns(cases, rounds, warm_up, back):
    order, told = [], []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in range(cases)}
    results = in_turn(
        runs, rounds, warm_up=warm_up, turn_back=back, tell=lambda *each: told.append(each)
    )
    assert len(order) == cases * (rounds + warm_up)
    for start in range(0, len(order), cases):
        number = start // cases - warm_up
        there = list(range(cases))
        assert order[start : start + cases] == (there[::-1] if back and number % 2 else there)
    assert all(len(each) == rounds for each in results.values())
    assert sorted(told) == sorted(
        (n, name, results[name][n]) for name in runs for n in range(rounds)
    )
    assert all(min(each, default=99) > cases * warm_up for each in results.values())


def test_a_record_of_rounds():
    rounds = [
        {"ms": 3.0, "exact": True, "times": [1, 2]},
        {"failed": "exit code 1", "ms": 99.0},
        {"ms": 1.0, "exact": False, "times": [3]},
    ]
    base = [{"ms": 6.0}, {"ms": 6.0}, {"failed": "why"}]
    rounds = compared(rounds, base, "speed", lambda one, other: other["ms"] / one["ms"])
    record = record_of({"case": "a"}, rounds, lists=("times",))
    assert record == {
        "case": "a", "rounds": 2, "ms": 2.0, "ms_min": 1.0, "ms_max": 3.0, "exact": False,
        "times": [[1, 2], [3]], "speed": 2.0, "speed_min": 2.0, "speed_max": 2.0,
        "failed": ["exit code 1"],
    }  # fmt: skip


def test_quartiles():
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


RECORDS = [
    {"case": "ours", "ranks": 2, "ms": 2.0},
    {"case": "ours", "ranks": 4, "ms": 5.0},
    {"case": "theirs", "ranks": 2, "ms": 9.0},
    {"case": "lost", "ranks": 2, "failed": ["exit code 1"]},
]


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (at_most("ms", 2, case="ours"), [True, False]),
        (at_least("ms", 9, ranks=lambda n: n < 4), [False, True, False]),
        (at_most("ms", 5, case=("ours", "theirs"), ranks=2), [True, False]),
        (at_most("ms", 5, case="lost"), [False]),
        (at_most("ms", 5, hosts=1), []),
        (at_most("other", 5, case="ours"), []),
    ],
)
def test_bars_find_their_records(bar, met):
    assert [each["met"] for each in judge([bar], RECORDS)] == met


def test_a_verdict_as_text():
    held, lost = judge([at_most("ms", 2.5, case="ours", ranks=2), at_most("ms", 2, case="lost")],
                       RECORDS)  # fmt: skip
    assert line_of(held) == "ours, 2: ms 2, <= 2.5: held"
    assert line_of(lost) == "lost: ms failed, <= 2: fell short"


def benchmark(measure, **more):
    def options(add):
        add("--rounds", type=count, default=5)
        add("--sizes", type=numbers(positive), default="1,2")
        add("--cases", type=words_of(["a", "b", "c"]), default="a,b,c")

    return Benchmark("mine", "First line.\n\nMore.", measure, options=options, **more)


def test_quick_gives_other_defaults_and_what_is_given_counts():
    mine = benchmark(lambda arguments: None, quick={"rounds": 1, "sizes": "4"})
    plain, quick = mine.parse([]), mine.parse(["--quick", "--cases", "c,a"])
    assert (plain.rounds, plain.sizes, plain.cases) == (5, [1.0, 2.0], ["a", "b", "c"])
    assert (quick.rounds, quick.sizes, quick.cases) == (1, [4.0], ["a", "c"])
    assert mine.parse(["--quick", "--rounds", "7"]).rounds == 7


@pytest.mark.parametrize(
    "command",
    [["--rounds", "0"], ["--sizes", "1,-2"], ["--cases", "a,d"], ["--round", "1"], ["x"]],
)
def test_mistakes_are_told(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark(lambda arguments: None).main(command)
    assert exit_.value.code == 2 and "error:" in capsys.readouterr().err


def test_what_is_measured_is_judged_and_written(tmp_path, capsys):
    bars = [at_most("ms", 1, case="ours", ranks=2)]
    mine = benchmark(lambda arguments: Report(RECORDS, "a table"), bars=bars, plots=False)
    assert mine.main(["--out", str(tmp_path / "new" / "out")]) == 0  # being slow is no error
    assert capsys.readouterr().out == "a table\n\nours, 2: ms 2, <= 1: fell short\n"
    document = json.loads((tmp_path / "new" / "out" / "mine.json").read_text())
    assert document["benchmark"] == "mine" and document["records"] == RECORDS
    assert document["arguments"]["rounds"] == 5 and document["environment"]["cores"] > 0
    (verdict,) = document["targets"]
    assert verdict["value"] == 2.0 and not verdict["met"]
    assert len((tmp_path / "new" / "out" / "mine.csv").read_text().splitlines()) == 5


def test_what_must_hold_is_the_exit_code(capsys):
    bars = [at_least("good_share", 1.0, must=True)]
    summary = [{"good_share": 0.5}]
    report = Report([], "", summary=summary)
    assert benchmark(lambda arguments: report, bars=bars).main([]) == 1
    summary[0]["good_share"] = 1.0
    assert benchmark(lambda arguments: report, bars=bars).main([]) == 0


def test_what_cannot_be_measured(capsys):
    def fails(arguments):
        raise Error("no luck.", hint="try again.")

    def elsewhere(arguments):
        raise NotHereError("no Slurm.", hint="install it.")

    with pytest.raises(SystemExit) as exit_:
        benchmark(fails).main([])
    assert exit_.value.code == 2 and "no luck. HINT: try again." in capsys.readouterr().err
    assert benchmark(elsewhere).main([]) == 3
    assert "cannot run here: no Slurm. HINT: install it." in capsys.readouterr().out


def test_tables():
    records = [{"group": g, "case": c, "ms": 1.0, "oversubscribed": c == "b"} for g in "xy"
               for c in "ab"]  # fmt: skip
    (first, some), (second, _) = by_group(records)
    assert (first, second) == ("x", "y") and len(some) == 2
    assert table_of("x", some, "case", ("ms", ("twice", lambda each: str(2 * each["ms"])))) == (
        "x   ms  twice\na    1    2.0\nb*   1    2.0"
    )


def test_a_file_is_read_on(tmp_path):
    tail = Tail(tmp_path / "file")
    assert tail.read() == []
    with tail.path.open("a") as file:
        file.write('{"a": 1}\n{"a"')
        file.flush()
        assert tail.read() == [{"a": 1}]
        file.write(': 2}\n{"a": {"a": 3}\n{"a": 4}\n')  # one was killed while it wrote
    assert tail.new() == [{"a": 2}, {"a": 4}]
    assert tail.read() == [{"a": 1}]


def test_scratch_is_made_where_it_is_missing(tmp_path):
    with scratch(tmp_path / "not" / "there") as folder:
        (folder / "file").touch()
        assert folder.parent == tmp_path / "not" / "there"
    assert not folder.exists() and folder.parent.exists()


NAMES = sorted({entry.name for entry in ENTRIES.values()} - {"overhead"})  # it sets Horovod up


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_a_quick_form(name):
    module = importlib.import_module(f"benchmarks.{name}")
    arguments = module.BENCHMARK.parse(["--quick", "--out", "x"])
    assert module.BENCHMARK.name == name and arguments.quick and str(arguments.out) == "x"
    assert set(module.BENCHMARK.quick) <= set(vars(arguments))
