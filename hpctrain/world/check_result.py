"""Results of a check of the machine, and how they are printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import click

Level = Literal["ok", "note", "problem"]
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@dataclass(frozen=True)
class CheckResult:
    """What one check of the machine found.

    Attributes:
        level: ``problem`` makes the command exit with 2; a ``note`` is worth knowing.
        what: The thing looked at.
        detail: What was seen.
        hint: What to do; empty where there is nothing to do.
    """

    level: Level
    what: str
    detail: str
    hint: str = ""


def report(findings: list[CheckResult]) -> int:
    """Print findings, one a line with its hint below, and return the exit code they mean."""
    for finding in findings:
        click.echo(
            f"{click.style(f'{finding.level:8}', fg=_COLOURS[finding.level])}"
            f"{finding.what}: {finding.detail}"
        )
        if finding.hint:
            click.echo(f"{'':8}HINT: {finding.hint}")
    problems = sum(finding.level == "problem" for finding in findings)
    click.echo(f"{problems} problem{'' if problems == 1 else 's'} found.")
    return 2 if problems else 0
