"""Run a rank's process on its host, started by whatever starts processes there.

Reads from standard input, in a line of JSON, what to start: so nothing is said in arguments, which
everybody on the host can read. Where standard input ends, the launcher is gone, or has given this
rank up: its processes are killed then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run what standard input names, and return its exit code; 128 + n where signal n ended it."""
    task = json.loads(sys.stdin.buffer.readline())
    try:
        os.chdir(task["folder"])
        process = subprocess.Popen(
            task["command"],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **task["environment"]},
            start_new_session=True,
        )
    except OSError as error:
        name = error.filename or task["command"][0]
        print(
            f"hpctrain: error: {name} on {os.uname().nodename}: {error.strerror}.", file=sys.stderr
        )
        return 127

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 2**16):
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main())
