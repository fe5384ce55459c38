"""Commands of one process, in forks of an interpreter that has imported already what they import.

Importing torch is most of what a short command does. So tests that start many of them have one
process import it, which does nothing else than fork: each command runs in a process of its own,
with its own folder, environment and output, by the very function that the installed script calls.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

from hpctrain.process import search_path, which

LIKE_TIMEOUT = 124  # the exit code of timeout(1)


class WarmInterpreter:
    """The process that forks; to be ended by ``close``."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def close(self):
        self._process.communicate()

    def run(self, arguments, *, timeout_seconds, cwd):
        """Run `hpctrain ARGUMENTS`; the same as :func:`hpctrain.process.run` of it."""
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            command = {
                "arguments": [str(which("hpctrain")), *arguments],
                "folder": str(cwd),
                "environment": {**os.environ, "PATH": search_path()},
                "output": f"/proc/{os.getpid()}/fd/{output.fileno()}",
            }
            print(json.dumps(command), file=self._process.stdin, flush=True)
            group = int(self._process.stdout.readline())
            timer = threading.Timer(timeout_seconds, os.killpg, [group, signal.SIGKILL])
            timer.daemon = True
            timer.start()
            code = int(self._process.stdout.readline())
            late = not timer.is_alive()
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)  # what it has left behind
            output.seek(0)
            code = LIKE_TIMEOUT if late else code
            return subprocess.CompletedProcess(command["arguments"], code, output.read())


def serve():
    """Fork for each line of standard input, a command; answer with its number and exit code."""
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import hpctrain.run  # noqa: F401
    from hpctrain.cli import main

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            be(json.loads(line))
            main()
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def be(command):
    """Make a fork into what a shell would have started."""
    os.setsid()
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.argv = command["arguments"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    with Path(os.devnull).open() as nothing, Path(command["output"]).open("a") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


if __name__ == "__main__":
    serve()
