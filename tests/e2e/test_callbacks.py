"""Callbacks of one's own, by the installed command: as documented, and failing."""

import json

from tests.e2e.test_docs import ROOT, blocks

QUIET = ("--set", "log.tensorboard=false")

MINE = """
import hpctrain


class Fails(hpctrain.Callback):
    ranks = "all"

    def on_step(self, run):
        if run.step == 3 and run.world.rank == 1:
            raise ZeroDivisionError("of my own making")
"""


def test_the_documented_ones(hpctrain):
    page = (ROOT / "docs" / "callbacks.md").read_text()
    drift, lines = blocks(page, "python")
    (hpctrain.folder / "drift.py").write_text(drift)
    (hpctrain.folder / "lines.py").write_text(lines)
    commands = blocks(page, "console")[0].strip().splitlines()
    for command in commands:
        hpctrain(*command.split()[1:], *QUIET, "--set", 'log.loggers=["lines:Lines,file=all.txt"]')
    text = (hpctrain.folder / "first" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    moved = {r["step"]: r["distance"] for r in records if r["kind"] == "drift"}
    assert list(moved) == [20, 40, 60]
    assert moved[60] > moved[20] > 0
    written = (hpctrain.folder / "first" / "all.txt").read_text().splitlines()
    assert len(written) == len(records)


def test_a_failure_on_one_rank_ends_all(hpctrain):
    (hpctrain.folder / "mine.py").write_text(MINE)
    result = hpctrain(
        "train", "digits", "--steps", 2000, *QUIET, "--callback", "mine:Fails", ranks=2
    )
    assert result.returncode == 2, result.stdout
    line = (
        "callback 'mine:Fails' failed in on_step() at step 3 on rank 1: ZeroDivisionError: "
        "of my own making"
    )
    said = [each for each in result.stdout.splitlines() if "hpctrain: error:" in each]
    assert len(said) == 1 and line in said[0]
    assert 'raise ZeroDivisionError("of my own making")' in result.stdout
