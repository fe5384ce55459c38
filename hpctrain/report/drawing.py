"""Draw plots by matplotlib: as files for papers, and as SVG that is part of a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from hpctrain.errors import Error
from hpctrain.report.figures import Bars, Figure, Plot, Series, Stacks, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK, LINE, PAPER = "#1b1f24", "#c9ced6", "#fefefe"
BLUE = "#0072b2"
PAGE_COLOURS = {
    INK: "currentColor", LINE: "var(--grid)", PAPER: "var(--paper)", BLUE: "var(--blue)"
}  # fmt: skip
"""What stands for these in a page, where it is bright or dark."""
COLOURS = (BLUE, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
"""Those of Okabe and Ito, "Color Universal Design" (2008), without yellow, which white hides."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
DASHES = ((), (5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5))
WIDTH, HEIGHT, DPI = 4.2, 2.9, 300  # inches: text is 10 px where a phone shows it 360 px wide
ROW, BAR = 0.2, 0.24
MOST_MARKERS = 12
LONGEST = 32  # letters of a label: more would leave no room for a plot on a phone
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.borderpad": 0.1,
    "legend.borderaxespad": 0.1,
    "text.parse_math": False,  # names that come from files are no formulas
    "svg.hashsalt": "hpctrain",  # the same plot gives the same file
}
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def require_matplotlib() -> None:
    """Refuse to go on without matplotlib, before anything is read.

    Raises:
        Error: It is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise Error(
            "the report's plots need matplotlib, which is not installed.",
            hint="pip install 'hpctrain[report]'.",
        ) from error


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem.png`` and ``stem.svg``, with text as outlines, for papers.

    Args:
        figure: What to draw.
        stem: The path without a suffix.
    """
    _save(figure, stem.with_name(stem.name + ".png"))
    _save(figure, stem.with_name(stem.name + ".svg"), style={"svg.fonttype": "path"})


def inline(figure: Figure, prefix: str) -> str:
    """Draw SVG for a page: its text is text, and ink and grid have the page's colours.

    Args:
        figure: What to draw.
        prefix: Makes the ids of this plot differ from those of others on the page.
    """
    file = io.BytesIO()
    clear = {"figure.facecolor": "none", "axes.facecolor": "none"}
    _save(figure, file, style={"svg.fonttype": "none", **clear})
    # What matplotlib has just written.
    root = ElementTree.fromstring(file.getvalue())  # noqa: S314
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}title {prefix}desc")
    for place, (tag, text) in enumerate((("title", figure.title), ("desc", str(figure)))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{prefix}{tag}"})
        element.text = printable(text)
        root.insert(place, element)
    _own_ids(root, prefix)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, of_page in PAGE_COLOURS.items():
        text = text.replace(colour, of_page)
    return text


def _own_ids(root: ElementTree.Element, prefix: str) -> None:
    """Begin ids that are referred to with the prefix, and leave out the others."""
    reference = re.compile(r"url\(#([^)]+)\)")
    href = f"{{{XLINK}}}href"
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == href:
                used.add(value.removeprefix("#"))
                element.set(key, f"#{prefix}{value.removeprefix('#')}")
            elif found := reference.findall(value):
                used |= set(found)
                element.set(key, reference.sub(rf"url(#{prefix}\1)", value))
    for element in root.iter():
        name = element.get("id", "")
        if name in used:
            element.set("id", prefix + name)
        elif name and not name.startswith(prefix):
            del element.attrib["id"]


def _save(figure: Figure, file: Any, style: Any = None) -> None:
    """Save a figure as SVG in a style, or as PNG without."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, **(style or {})}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name may have letters that no font has
        if isinstance(figure, Bars):
            canvas = _bars(figure)
        elif isinstance(figure, Stacks):
            canvas = _stacks(figure)
        else:
            canvas = _lines(figure)
        if style is None:
            canvas.savefig(file, format="png", dpi=DPI)
        else:
            canvas.savefig(file, format="svg", metadata={"Date": None})


def _canvas(height: float) -> tuple[Canvas, Axes]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
    return canvas, canvas.add_subplot()


def _lines(plot: Plot) -> Canvas:
    from matplotlib.lines import Line2D

    named = [each for each in plot.series if each.label]
    nameless = any(each.faint and not each.label for each in plot.series)
    entries = len(named) + nameless if len(named) + nameless > 1 or plot.ideal else 0
    longest = max((len(each.label) for each in named), default=0)
    columns = 1 if longest > 20 else 2 if longest > 9 else 3
    canvas, axes = _canvas(HEIGHT + ROW * -(-entries // columns))
    for x, look in plot.marks:
        axes.axvline(x, color=COLOURS[look % len(COLOURS)], linewidth=0.9, dashes=(3, 2))
    if plot.ideal:
        axes.plot(*zip(*plot.ideal, strict=True), color=INK, linewidth=0.9, dashes=(4, 3))
    handles = [_line(axes, each) for each in plot.series]
    if entries:
        shown = [h for h, each in zip(handles, plot.series, strict=True) if each.label]
        labels = [_label(each.label) for each in named]
        if nameless:
            shown.append(Line2D([], [], color=INK, linewidth=0.8, alpha=0.6))
            labels.append("training")
        canvas.legend(shown, labels, loc="outside lower left", ncols=columns, handlelength=2.6)
    xs = [x for each in plot.series for x in each.x]
    ys = [y for each in plot.series for y in (*each.y, *each.high)] + [y for _, y in plot.ideal]
    _axis(axes, "x", plot.log_x, xs)
    _axis(axes, "y", plot.log_y, ys)
    if plot.from_zero and not plot.log_y:
        axes.set_ylim(0, 1.08 * max(ys) or 1)
    axes.set(xlabel=_label(plot.x_label), ylabel=_label(plot.y_label))
    return canvas


def _line(axes: Axes, series: Series) -> Any:
    colour = COLOURS[series.look % len(COLOURS)]
    dashes = DASHES[series.look % len(DASHES)]
    shape: dict[str, Any] = {"drawstyle": "steps-post"} if series.stepped else {}
    if dashes:
        shape["dashes"] = dashes
    if series.faint:
        (line,) = axes.plot(series.x, series.y, color=colour, linewidth=0.8, alpha=0.6, **shape)
        return line
    if series.low and (list(series.low), list(series.high)) != (list(series.y), list(series.y)):
        ends = zip(series.y, series.low, series.high, strict=True)
        errors = list(zip(*((y - low, high - y) for y, low, high in ends), strict=True))
        axes.errorbar(series.x, series.y, errors, fmt="none", ecolor=colour, capsize=3, linewidth=1)
    hollow = list(series.hollow) or [False] * len(series.y)
    marker = MARKERS[series.look % len(MARKERS)]
    every = max(1, -(-len(series.y) // MOST_MARKERS))
    (line,) = axes.plot(
        series.x, series.y, color=colour, marker=marker, markevery=every,
        markerfacecolor=PAPER if all(hollow) else colour, **shape,
    )  # fmt: skip
    points = [
        p for p, star in zip(zip(series.x, series.y, strict=True), hollow, strict=True) if star
    ]
    if any(hollow) and not all(hollow):
        axes.plot(
            *zip(*points, strict=True), linestyle="none", marker=marker, color=colour,
            markerfacecolor=PAPER,
        )  # fmt: skip
    return line


def _bars(bars: Bars) -> Canvas:
    canvas, axes = _canvas(0.75 + BAR * len(bars.labels))
    ends = zip(bars.values, bars.low, bars.high, strict=True)
    errors = list(zip(*((value - low, high - value) for value, low, high in ends), strict=True))
    places = range(len(bars.labels))
    axes.errorbar(
        bars.values, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5,
        zorder=3,
    )  # fmt: skip
    if bars.log_x:  # the length of a bar would depend on where the axis begins
        faces = [PAPER if hatched else COLOURS[0] for hatched in bars.hatched]
        axes.scatter(bars.values, places, 30, color=faces, edgecolors=COLOURS[0], zorder=4)
        axes.set_xlim(min(bars.low) / 2, max(bars.high) * 4)
    else:
        drawn = axes.barh(places, bars.values, 0.62, color=COLOURS[5], edgecolor=COLOURS[0])
        for bar, hatched in zip(drawn, bars.hatched, strict=True):
            if hatched:
                bar.set(hatch="////", facecolor="none")
        axes.margins(x=0.18)
    for place, value, high in zip(places, bars.values, bars.high, strict=True):
        axes.annotate(
            short(float(f"{value:.3g}")), (max(value, high), place), (5, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(places, [_label(label) for label in bars.labels])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _axis(axes, "x", bars.log_x, bars.values)
    axes.set_xlabel(_label(bars.x_label))
    return canvas


def _stacks(stacks: Stacks) -> Canvas:
    canvas, axes = _canvas(0.75 + BAR * len(stacks.labels) + ROW * -(-len(stacks.parts) // 3))
    places = range(len(stacks.labels))
    begin = [0.0] * len(stacks.labels)
    for look, (part, lengths) in enumerate(stacks.parts.items()):
        colour = COLOURS[look % len(COLOURS)]
        axes.barh(
            places, lengths, 0.62, begin, color=colour, edgecolor=PAPER, linewidth=0.4, label=part
        )
        begin = [a + b for a, b in zip(begin, lengths, strict=True)]
    axes.set_yticks(places, [_label(label) for label in stacks.labels])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _axis(axes, "x", False, begin)
    axes.set_xlabel(_label(stacks.x_label))
    canvas.legend(loc="outside lower left", ncols=3, handlelength=1.2)
    return canvas


def _axis(axes: Axes, which: str, log: bool, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        axes.set(**{f"{which}scale": "log"})
        axis.set_minor_formatter(NullFormatter())
    elif all(float(value).is_integer() for value in values):
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.6g}{letter}"
    return f"{value:.6g}"


def printable(text: str) -> str:
    """Return text without what XML cannot hold."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _label(text: str) -> str:
    """Short enough to stand beside a plot; the end of a path says more than its start."""
    text = printable(text)
    text = text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]
    return " " + text if text.startswith("_") else text  # a legend leaves out what begins so
