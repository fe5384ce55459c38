"""Site profiles: TOML files that say what jobs on a cluster need, and how ranks are launched."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hpctrain.config import Section, read_toml
from hpctrain.errors import Error, nearest
from hpctrain.process import which
from hpctrain.slurm.options import Options

HERE = Path(__file__).parent / "templates" / "sites"
LAUNCHERS = ("srun", "mpirun", "horovodrun")
PLACES = {
    "{nodes}": '"$SLURM_JOB_NUM_NODES"',
    "{ranks}": '"$SLURM_NTASKS"',
    "{ranks_per_node}": '"$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))"',
    "{cores}": '"${SLURM_CPUS_PER_TASK:-1}"',
}
"""The placeholders of a site's own launcher, and the bash expressions that replace them."""

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", re.ASCII)
_SPECIAL, _ESCAPED = r'([\\"`$])', r"\\\1"
# They take back what was loaded, or say where modules are: so they go before `module load`.
_FIRST = re.compile(r"\s*(?:module|ml)\s+(?:-\S+\s+)*(?:purge|reset|restore|use|unuse)\b")


def quote(word: str) -> str:
    """Quote a word for bash; only variables (``$SCRATCH``, ``${USER}``) are expanded."""
    if not _VARIABLE.search(word):
        return shlex.quote(word)
    text = ""
    end = 0
    for found in _VARIABLE.finditer(word):
        text += re.sub(_SPECIAL, _ESCAPED, word[end : found.start()]) + found[0]
        end = found.end()
    return f'"{text}{re.sub(_SPECIAL, _ESCAPED, word[end:])}"'


class Container(Section):
    """A container image that the ranks run in."""

    image: str = Field(description="An image file; see slurm/hpctrain.def.")
    runtime: Literal["apptainer", "singularity"] = Field("apptainer", description="The program.")
    binds: list[str] = Field([], description="Folders that are seen inside: SOURCE[:TARGET].")
    options: list[str] = Field([], description="More of its options, such as --nv or --rocm.")

    def line(self) -> list[str]:
        """Return the words that run a command inside the container when put before it."""
        binds = [word for bind in self.binds for word in ("--bind", bind)]
        return [self.runtime, "exec", *self.options, *binds, self.image]


class Site(Section):
    """A site's profile: what jobs on a cluster have in common."""

    scheduler: Literal["slurm", "pbs", "lsf", "flux"] = Field(
        "slurm", description="For others than Slurm scripts are made, and no more (`--dry-run`)."
    )
    directives: list[str] = Field(
        [], description="More lines for another scheduler than Slurm, without its `#PBS` or such."
    )
    launcher: str = Field(
        "srun",
        min_length=1,
        description="What starts the ranks within a job: srun, mpirun, horovodrun, or a command of "
        "the site's own, in which {nodes}, {ranks}, {ranks_per_node} and {cores} are filled in.",
    )
    mpi: str = Field("pmix", description="srun --mpi: how ranks find each other.")
    launcher_options: list[str] = Field([], description="More options of the launcher.")
    modules: list[str] = Field([], description="`module load` these.")
    setup: list[str] = Field(
        [],
        description="Lines of shell that come after the modules; those of `module purge`, `reset`, "
        "`restore` and `use` before them.",
    )
    environment: dict[str, str] = Field({}, description="Variables of the job.")
    interface: str | None = Field(
        None, description="Network interface of NCCL and Gloo. Unset: the one to the other nodes."
    )
    gpus_by: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="The option of sbatch by which GPUs are asked for here."
    )
    options: dict[str, str | int | bool] = Field(
        {}, description="Options of sbatch that every job gets, unless it says otherwise."
    )
    container: Container | None = Field(None, description="What the ranks run in.")

    def sbatch(self) -> Options:
        """Return the options of sbatch that the profile gives to every job."""
        return {
            name: "" if value is True else str(value)
            for name, value in self.options.items()
            if value is not False
        }

    def launch(
        self,
        launcher: str | None = None,
        *,
        elastic: bool = False,
        places: Mapping[str, str] = PLACES,
    ) -> str:
        """Return the command that starts the ranks, as the elements of a bash array.

        Args:
            launcher: A launcher to use instead of the profile's.
            elastic: Whether ranks may outlive the failure of another; if not, srun ends them.
            places: The values of {nodes} and the other placeholders in a command.

        Raises:
            Error: The launcher is not a valid command.
        """
        chosen = launcher or self.launcher
        end = [] if elastic else ["--kill-on-bad-exit=1"]
        known = {
            "srun": ["srun", f"--mpi={self.mpi}", *end],
            # Threads and GPUs are divided by hpctrain; a rank bound to one core would be slow.
            "mpirun": ["mpirun", "--bind-to", "none"],
            "horovodrun": ["hpctrain", "horovod", "run"],
        }
        words = known.get(chosen) or _own(chosen)
        more = self.launcher_options if launcher in (None, self.launcher) else []
        inside = self.container.line() if self.container is not None else []
        first = [_filled(word, places) for word in [*words, *more]]
        return " ".join([*first, *map(quote, inside)])

    def prepare(self) -> str:
        """Return the lines of shell that set up a job's environment."""
        first = [line for line in self.setup if _FIRST.match(line)]
        lines = [*first, *(f"module load {shlex.quote(module)}" for module in self.modules)]
        lines += [line for line in self.setup if line not in first]
        environment = {**self.environment}
        if self.interface is not None:
            environment["HPCTRAIN_INTERFACE"] = self.interface
        lines += [f"export {name}={quote(value)}" for name, value in environment.items()]
        return "\n".join(lines)


def _own(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Error(f"{command!r} is no command: {error}.", hint="quotes come in pairs.") from error
    close = difflib.get_close_matches(words[0], LAUNCHERS, n=1, cutoff=0.8) if words else []
    if not words or (len(words) == 1 and close and which(words[0]) is None):
        raise Error(f"there is no launcher {command!r}.", hint=nearest(command, LAUNCHERS))
    return words


def _filled(word: str, places: Mapping[str, str]) -> str:
    if unknown := [each for each in re.findall(r"(?<!\$)\{\w*\}", word) if each not in PLACES]:
        raise Error(f"{unknown[0]} in the launcher is unknown.", hint=f"{', '.join(PLACES)} are.")
    parts = re.split("(" + "|".join(map(re.escape, PLACES)) + ")", word)
    return "".join(places.get(part) or quote(part) for part in parts if part) or "''"


def load(name: str | None, environment: Mapping[str, str] = os.environ) -> Site:
    """Load a site's profile.

    Args:
        name: A TOML file, or the name of a profile in ``~/.config/hpctrain/sites`` or among those
            that come with hpctrain. None: the one that ``HPCTRAIN_SITE`` names, or ``default``
            if that exists, or an empty profile.
        environment: The environment, for ``HPCTRAIN_SITE`` and ``XDG_CONFIG_HOME``.

    Raises:
        Error: There is no such profile, or it is invalid.
    """
    home = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    own = Path(home) / "hpctrain" / "sites"
    wanted = name or environment.get("HPCTRAIN_SITE")
    if wanted is None:
        path = own / "default.toml"
        return _read(path) if path.is_file() else Site()
    if wanted.endswith(".toml"):
        return _read(Path(wanted))
    known = {path.stem: path for folder in (HERE, own) for path in folder.glob("*.toml")}
    if wanted not in known:
        raise Error(f"there is no site {wanted!r}.", hint=nearest(wanted, known) + f" See {own}.")
    return _read(known[wanted])


def _read(path: Path) -> Site:
    layer: dict[str, Any] = read_toml(path)
    try:
        return Site.model_validate(layer)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        names = list(Site.model_fields)
        hint = nearest(key, names) if first["type"] == "extra_forbidden" else f"see {HERE}."
        raise Error(f"{path}: {key}: {first['msg']}.", hint=hint) from error
