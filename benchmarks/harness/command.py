"""The command line that all benchmarks share, from its options to the verdicts.

A benchmark's module ends so::

    BENCHMARK = Benchmark("peers", __doc__, measure, options=options, bars=BARS, quick=QUICK)

    if __name__ == "__main__":
        BENCHMARK.run()

Exit codes: 0; 1 where something was not right (a bar that *must* hold fell short); 2 where an
option is wrong or the measurement failed; 3 where this machine cannot run the benchmark.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.harness.bars import Bar, judge, line_of
from hpctrain.errors import Error

Record = dict[str, Any]
Arguments = argparse.Namespace
Add = Callable[..., Any]
"""``ArgumentParser.add_argument``."""


class NotHereError(Error):
    """This machine lacks what the benchmark needs."""

    exit_code = 3


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        records: One a case, its independent variables first, or one a run.
        text: Tables, to be printed.
        more: What else the JSON file is to hold.
        summary: What the bars are about, where it is not the records.
        figures: Plots to be drawn instead of those that `hpctrain report` has of the records.
    """

    records: list[Record]
    text: str
    more: Record = field(default_factory=dict)
    summary: list[Record] | None = None
    figures: Sequence[Any] = ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its options, what measures, and the figures it is to reach.

    Attributes:
        name: Of its module, and of the files that it writes.
        text: Its module's docstring; ``--help`` shows the first line.
        measure: Measures as the arguments say; None on a rank that has nothing to tell.
        options: Adds its own options.
        check: Refuses arguments that do not go together, by ``parser.error``.
        bars: Figures to reach.
        quick: Defaults of options under ``--quick``, for the smallest form that shows that it runs.
        plots: Whether ``--out`` gets plots.
    """

    name: str
    text: str | None
    measure: Callable[[Arguments], Report | None]
    options: Callable[[Add], object] = lambda add: None
    check: Callable[[argparse.ArgumentParser, Arguments], object] = lambda parser, arguments: None
    bars: Sequence[Bar] = ()
    quick: Mapping[str, Any] = field(default_factory=dict)
    plots: bool = True

    def parser(self) -> argparse.ArgumentParser:
        """Return what reads the command line."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{self.name}",
            description=(self.text or "").partition("\n")[0],
            allow_abbrev=False,
        )
        parser.add_argument(
            "--out", type=Path, help="folder for records, as JSON and CSV, and plots"
        )
        parser.add_argument("--quick", action="store_true", help="the smallest form, as a trial")
        self.options(parser.add_argument)
        return parser

    def parse(self, command: Sequence[str] | None = None) -> Arguments:
        """Return the arguments, checked.

        Among them are ``command``, the words, and ``load_before``, how busy the machine is.

        Args:
            command: The words; None: this process's.

        Raises:
            SystemExit: With code 2, where they are wrong.
        """
        command = list(sys.argv[1:] if command is None else command)
        parser = self.parser()
        if "--quick" in command:
            parser.set_defaults(**self.quick)
        arguments = parser.parse_args(command)
        arguments.command = command
        arguments.load_before = round(os.getloadavg()[0], 2)
        self.check(parser, arguments)
        return arguments

    def main(self, command: Sequence[str] | None = None) -> int:
        """Measure, print and write.

        Args:
            command: The words of the command line; None: this process's.

        Returns:
            The exit code, if no option is wrong.
        """
        arguments = self.parse(command)
        try:
            report = self.measure(arguments)
        except NotHereError as error:
            print(f"benchmarks.{self.name} cannot run here: {error}", flush=True)
            return error.exit_code
        except Error as error:
            self.parser().error(str(error))
        return 0 if report is None else self._finish(report, arguments)

    def run(self) -> NoReturn:
        """Be the program: measure, and end with the exit code."""
        # What was begun is ended and cleaned up, as by Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        sys.exit(self.main())

    def _finish(self, report: Report, arguments: Arguments) -> int:
        print(report.text)
        verdicts = judge(self.bars, report.records if report.summary is None else report.summary)
        if verdicts:
            print("\n" + "\n".join(map(line_of, verdicts)), flush=True)
        if arguments.out is not None:
            self.save(report, arguments, verdicts)
        return int(any(each["must"] and not each["met"] for each in verdicts))

    def save(self, report: Report, arguments: Arguments, verdicts: Sequence[Record] = ()) -> None:
        """Write records, verdicts and plots to the folder that ``--out`` names."""
        from benchmarks.harness.results import plots, write

        given = {key: value for key, value in vars(arguments).items() if key != "command"}
        if report.summary is not None:
            report.more["summary"] = report.summary
        write(
            arguments.out, self.name, report.records, targets=list(verdicts), arguments=given,
            **report.more,
        )  # fmt: skip
        if self.plots and report.records:
            plots(arguments.out, self.name, report.figures)


def words(text: str) -> list[str]:
    """Return an option's words between commas."""
    return [word for word in text.split(",") if word]


def words_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return what reads an option's words between commas, each of them one that is known.

    They come out in the order of those that are known.
    """

    def read(text: str) -> list[str]:
        found = words(text)
        if unknown := [word for word in found if word not in known]:
            raise argparse.ArgumentTypeError(
                f"there is no {', '.join(unknown)}; there are {', '.join(known)}"
            )
        return [word for word in known if word in found]

    return read


def count(text: str) -> int:
    """Return an option's whole number, of 1 or more."""
    if (found := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return found


def positive(text: str) -> float:
    """Return an option's number, above 0."""
    if not (found := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return found


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return what reads an option's numbers between commas, each by another type's function."""
    return lambda text: [kind(word) for word in words(text)]
