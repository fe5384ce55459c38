"""`hpctrain report` of a real run, and its page in a real browser."""

import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.e2e.conftest import Command

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PHONE, DESKTOP = (360, 740), (1280, 900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page of a run with a parameter server, one that was killed, and a benchmark."""
    folder = tmp_path_factory.mktemp("report")
    Command(folder).train(
        *("digits", "--strategy", "ps", "--consistency", "ssp:2", "--epochs", 2, "--out", "run"),
        ranks=2,
    )
    killed = folder / "killed"
    killed.mkdir()
    shutil.copy(folder / "run" / "config.toml", killed)
    lines = (folder / "run" / "metrics.jsonl").read_text()
    lost = {"kind": "event", "step": 40, "time": 0, "size": 1, "lost": 1, "role": "worker",
            "host": "n1", "step_ms": 31.5, "reason": "worker 1 on n1 was lost"}  # fmt: skip
    (killed / "metrics.jsonl").write_text(f"{lines}{json.dumps(lost)}\n{lines[:30]}")
    records = [
        {"case": case, "ranks": ranks, "oversubscribed": ranks > 2, "time_ms": time * ranks,
         "time_ms_min": time, "time_ms_max": 9.0 * ranks}
        for case, time in (("ours", 1.0), ("a peer with a very long name " * 3, 2.0))
        for ranks in (1, 2, 4)
    ]  # fmt: skip
    head = {"schema": 1, "benchmark": "exchange", "environment": {"cores": 2}}
    (folder / "bench.json").write_text(json.dumps({**head, "records": records}))
    result = Command(folder)("report", "run", "killed", "bench.json")
    assert result.returncode == 0, result.stdout
    assert result.stdout == f"report.html: {len(figures(folder))} plots\n"
    return folder


def figures(folder):
    return re.findall("<figure>", (folder / "report.html").read_text())


def test_page(folder):
    page = (folder / "report.html").read_text()
    for words in ("Loss over steps", "Learning rate", "Throughput", "Distribution of staleness",
                  "Where the time of a step goes",
                  "worker 1 on n1 was lost", "31.5", "unfinished", "completed", "ssp:2", "1 (1..9)",
                  "The configurations do not differ", "Benchmark: exchange"):  # fmt: skip
        assert words in page


def test_plots_as_files(hpctrain, folder):
    result = hpctrain("report", folder / "bench.json", "--plots", "plots", "--out", "report.html")
    assert result.stdout == "report.html: 1 plot, also in plots\n"
    assert len(figures(hpctrain.folder)) == 1
    stem = hpctrain.folder / "plots" / "exchange-time-ms"
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = ElementTree.parse(stem.with_suffix(".svg")).getroot()
    assert svg.tag.endswith("}svg") and svg.get("width")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing",), "missing does not exist"),
        (("empty",), "empty holds no metrics.jsonl"),
        (("begun",), "begun holds nothing yet"),
        (("text.json",), "cannot read text.json"),
        (("other.json",), "other.json is not of a benchmark"),
        (("bench.json", "--out", "text.json/report.html"), "cannot write text.json"),
        (("bench.json", "--plots", "text.json/plots"), "cannot write text.json"),
    ],
)
def test_bad_input_is_one_line(hpctrain, folder, arguments, words):
    place = hpctrain.folder
    (place / "empty").mkdir()
    (place / "begun").mkdir()
    (place / "begun" / "metrics.jsonl").write_text('{"kind": "event", "step": 0, "size": 1}\n')
    (place / "text.json").write_text("once upon a time")
    (place / "other.json").write_text('{"name": "package"}')
    shutil.copy(folder / "bench.json", place)
    result = hpctrain("report", *arguments)
    assert result.returncode == 2, result.stdout
    assert result.stdout.startswith("hpctrain: error: ") and result.stdout.count("\n") == 1
    assert words in result.stdout and "HINT: " in result.stdout


def test_damaged_files_of_a_run_are_named(hpctrain, folder):
    for name, text in (("result.json", "{"), ("config.toml", "= 1")):
        shutil.copytree(folder / "run", hpctrain.folder / name)
        (hpctrain.folder / name / name).write_text(text)
        result = hpctrain("report", name)
        assert result.returncode == 2 and result.stdout.count("\n") == 1, result.stdout
        assert f"{name}/{name}" in result.stdout


def test_a_long_run_gives_a_small_page(hpctrain):
    """100,000 lines, the last of them cut; the largest value is still there."""
    path = hpctrain.folder / "long"
    path.mkdir()
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(100_000):
            loss = 77.5 if step == 77_777 else 1 + step % 7
            file.write(f'{{"kind": "train", "step": {step}, "time": {step}, "loss": {loss}}}\n')
        file.write('{"kind": "train", "step')
    result = hpctrain("report", "long")
    assert result.returncode == 0, result.stdout
    page = hpctrain.folder / "report.html"
    assert page.stat().st_size < 100_000
    assert "largest 77.5" in page.read_text()


def test_without_matplotlib(hpctrain, folder):
    (hpctrain.folder / "matplotlib.py").write_text("raise ImportError")
    path = os.pathsep.join([str(hpctrain.folder), os.environ.get("PYTHONPATH", "")])
    result = hpctrain("report", folder / "bench.json", env={"PYTHONPATH": path})
    assert result.returncode == 2
    assert "pip install 'hpctrain[report]'" in result.stdout


@pytest.fixture(scope="module")
def browser():
    """Chromium; where there is none, what has to be installed for these tests."""
    reason = "no browser: pip install playwright, apt install chromium-headless-shell"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None and not Path(own).exists():
            pytest.skip(reason)
        # A sandbox in a container would need rights that root of a container has not.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found or own, args=options)
        yield browser
        browser.close()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(folder, browser, size, scheme):
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = (folder / "report.html").as_uri()
    page.goto(address)
    assert told == [] and asked == [address]
    assert page.title() == "digits, exchange: hpctrain report"
    assert page.locator("h1").count() == 1
    headings = page.locator("h2").all_inner_texts()
    assert headings == [
        "Runs", "Learning", "Speed", "Exchange", "Ranks lost and joined",
        "Benchmark: exchange",
    ]  # fmt: skip
    # The page fits; what does not fit of a table scrolls in its box.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    plots = page.locator("figure svg")
    assert plots.count() == page.locator("figure").count() > 10
    for box in (plot.bounding_box() for plot in plots.all()):
        assert box["width"] > 0.75 * min(width, 500) and box["height"] > 80
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    # Text is large enough to be read, and neither ink on ink nor beyond its plot.
    seen = page.evaluate(
        """() => [...document.querySelectorAll('figure svg text')].map(text => {
            const box = text.getBoundingClientRect()
            const plot = text.closest('svg').getBoundingClientRect()
            const style = getComputedStyle(text)
            return [Math.min(box.width, box.height) > 6.5, style.fill,
                    box.left >= plot.left - 3 && box.right <= plot.right + 3]
        })"""
    )
    paper = page.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor")
    assert seen and all(large and inside and fill != paper for large, fill, inside in seen)
    # Everyone can find a plot's name and what it shows.
    named = page.evaluate(
        """() => [...document.querySelectorAll('figure svg')].every(svg =>
            svg.getAttribute('aria-labelledby').split(' ').every(id =>
                document.getElementById(id).textContent.length > 1))"""
    )
    assert named
    page.locator("nav a").last.click()
    assert page.evaluate("document.querySelector(':target').textContent") == headings[-1]
    page.close()
