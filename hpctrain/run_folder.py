"""The files of a run folder by which a run says how it ended, and is asked to end."""

from __future__ import annotations

RESULT = "result.json"
"""Written last, and only at success: its being there is the proof."""

INTERRUPTED = "interrupted.json"
"""Instead of it: the run was asked to stop, has saved a checkpoint, and can be gone on with."""

INTERRUPTED_CODE = 75
"""The exit code of such a run: that of sysexits.h for "try again later"."""

STOP = "stop"
"""Asks the run to save a checkpoint and end."""
