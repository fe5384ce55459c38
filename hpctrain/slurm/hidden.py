"""An environment that horovodrun hands on without writing it into arguments.

horovodrun starts a rank by ``env NAME=VALUE... COMMAND``, with all of its own environment, and
everybody on a host can read arguments. It leaves out what begins with ``BASH_FUNC_``, but its
processes inherit that. So all but what it needs to start programs goes by under such names, and is
given its own back before the command runs: here, or where srun is called instead of ssh.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

PREFIX = "BASH_FUNC_HPCTRAIN_"
OPEN = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH",
    "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HOROVOD_START_TIMEOUT",
}  # fmt: skip
"""What is needed to start programs, and no secret."""


def hide(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment of which horovodrun writes no more than :data:`OPEN` into arguments."""
    return {
        name if name in OPEN or name.startswith("BASH_FUNC_") else PREFIX + name: value
        for name, value in environment.items()
    }


def show(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the names that :func:`hide` took away; others' values give way."""
    hidden = {
        name.removeprefix(PREFIX): value
        for name, value in environment.items()
        if name.startswith(PREFIX)
    }
    rest = {name: value for name, value in environment.items() if not name.startswith(PREFIX)}
    return {**hidden, **rest}


def main() -> NoReturn:
    """Become the command in the arguments, with the environment as it was."""
    command = sys.argv[1:]
    try:
        os.execvpe(command[0], command, show(os.environ))  # noqa: S606 - without a shell
    except OSError as error:
        sys.exit(f"hpctrain: error: {command[0]} on {os.uname().nodename}: {error.strerror}.")


if __name__ == "__main__":
    main()
