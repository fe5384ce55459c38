"""The command with many lists of arguments, for a test of what it says, and imported once.

The lists come as JSON; a copy of this process takes each. What the copies end with, and what they
print, goes out as JSON.
"""

import json
import os
import sys
import tempfile

import torch  # noqa: F401 - what takes a start's time

import hpctrain.run  # noqa: F401
from hpctrain.cli import main


def ended(arguments):
    """The exit code and the output of one."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = ["hpctrain", *arguments]
            main()  # ends the process
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode()


if __name__ == "__main__":
    json.dump([ended(each) for each in json.loads(sys.argv[1])], sys.stdout)
