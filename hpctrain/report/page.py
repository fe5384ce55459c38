"""Write the report as one HTML page that needs nothing else, and its plots as files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from hpctrain import __version__
from hpctrain.errors import Error
from hpctrain.files import write_text
from hpctrain.report import accuracy, cases, comparison, curves, drawing, scaling
from hpctrain.report.benchmarks import Benchmark, read_benchmark
from hpctrain.report.figures import Figure, Section, file_name
from hpctrain.report.runs import HINT, Run, name_runs, read_run

TEMPLATE = "page.html"
STEM = 70
"""Letters of a plot's name where a number follows."""

OWN = {"scaling": scaling.of_benchmark, "accuracy": accuracy.section}
"""Benchmarks of which more is shown than their cases."""


def report(inputs: Sequence[Path], out: Path, plots: Path | None = None) -> int:
    """Write the page, and the plots as ``plots/NAME.png`` and ``plots/NAME.svg``.

    Args:
        inputs: Run folders, and JSON files of benchmarks.
        out: The page.
        plots: Folder for the plots, or None.

    Returns:
        How many plots there are.

    Raises:
        Error: An input cannot be read, or an output not be written.
    """
    drawing.require_matplotlib()
    runs, benchmarks = read(inputs)
    sections = sections_of(runs, benchmarks)
    names = _distinct([each for section in sections for each in section.figures])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, render(sections, _title(runs, benchmarks)))
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            for name, figure in names.items():
                drawing.save(figure, plots / name)
    except OSError as error:
        raise Error(
            f"cannot write {error.filename or out}: {error.strerror}.",
            hint="make room, or choose another --out or --plots.",
        ) from error
    return len(names)


def figures_of(path: Path) -> dict[str, Figure]:
    """Return the plots of a benchmark's file, by names of files.

    Raises:
        Error: It cannot be read.
    """
    sections = sections_of([], [read_benchmark(path)])
    return _distinct([each for section in sections for each in section.figures])


def read(inputs: Sequence[Path]) -> tuple[list[Run], list[Benchmark]]:
    """Read each input once, as what it is: a run or a benchmark.

    Raises:
        Error: One is neither, or damaged.
    """
    runs, benchmarks = [], []
    for path in {os.path.realpath(path): path for path in inputs}.values():
        if path.is_dir():
            runs.append(read_run(path))
        elif path.exists():
            benchmarks.append(read_benchmark(path))
        else:
            raise Error(f"{path} does not exist.", hint=HINT)
    name_runs(runs)
    return runs, benchmarks


def sections_of(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> list[Section]:
    """Return the sections of the page that have something to show.

    Args:
        runs: To compare.
        benchmarks: Each a section of its own.
    """
    found = []
    if runs:
        found += [comparison.section(runs), curves.learning(runs), curves.speed(runs)]
        if any(run.of("exchange") for run in runs):
            found.append(curves.exchange(runs))
        if any(map(curves.changed, runs)):
            found.append(curves.changes(runs))
        if (scales := scaling.section(runs)) is not None:
            found.append(scales)
    return [*found, *(OWN.get(each.name, cases.section)(each) for each in benchmarks)]


def render(sections: Sequence[Section], title: str) -> str:
    """Render the page as HTML.

    Args:
        sections: Of the page, in order.
        title: Of the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    number = 0

    def draw(figure: Figure) -> Markup:
        nonlocal number
        number += 1
        # Made by matplotlib and serialized as XML, which has escaped what came from files.
        return Markup(drawing.inline(figure, f"p{number}-"))  # noqa: S704

    environment = Environment(
        loader=PackageLoader("hpctrain.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(TEMPLATE).render(
        title=title,
        sections=sections,
        draw=draw,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # JSON can hold half a character


def _title(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> str:
    tasks = dict.fromkeys(str(run.config.get("task", run.label)) for run in runs)
    names = dict.fromkeys(benchmark.name for benchmark in benchmarks)
    return ", ".join([*tasks, *names])


def _distinct(figures: Sequence[Figure]) -> dict[str, Figure]:
    """Plots by names of files that no two of them share."""
    named: dict[str, Figure] = {}
    for figure in figures:
        name, count = figure.name, 1
        while name in named:
            count += 1
            name = file_name(figure.name[:STEM], str(count))
        named[name] = figure
    return named
