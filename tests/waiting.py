"""Waiting in tests: always with a bound, and it is said for what.

A bound is there to end a test that would hang. It says nothing about speed, so it leaves room for a
machine that is busy with many other things.
"""

import asyncio
import time

SECONDS = 240.0
"""Longest wait for anything; each test is ended after ``timeout`` of pyproject.toml."""

LOOK_SECONDS = 0.02


def wait_until(condition, what, *, seconds=SECONDS, running=None, tell=str):
    """Wait until a condition holds; its value.

    Args:
        condition: Called again and again.
        what: For what the test waits, as the end of "waited 3 s for ...".
        seconds: The longest wait.
        running: A process; if it ends first, there is no use in waiting.
        tell: What else helps to understand a failure, such as a log.
    """
    began = time.monotonic()
    while True:
        over = running is not None and running.poll() is not None
        if found := condition():
            return found
        waited = time.monotonic() - began
        if over or waited > seconds:
            code = f"; the process ended with exit code {running.poll()}" if over else ""
            raise AssertionError(f"waited {waited:.0f} s for {what}{code}\n{tell()}")
        time.sleep(LOOK_SECONDS)


async def wait_until_async(condition, what, *, seconds=SECONDS):
    """The same as :func:`wait_until`, while other coroutines go on."""
    began = time.monotonic()
    while not (found := condition()):
        waited = time.monotonic() - began
        assert waited < seconds, f"waited {waited:.0f} s for {what}"
        await asyncio.sleep(LOOK_SECONDS)
    return found
