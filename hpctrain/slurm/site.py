"""A cluster, described once in a TOML file: what its jobs need, and how they are launched there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hpctrain.config import Section, read_toml
from hpctrain.errors import Error, nearest
from hpctrain.slurm.options import Options, check

HERE = Path(__file__).parent / "templates" / "sites"
Launcher = Literal["srun", "mpirun", "horovodrun"]


class Container(Section):
    """What the ranks run in."""

    image: str = Field(description="An image file; see slurm/hpctrain.def.")
    runtime: Literal["apptainer", "singularity"] = Field("apptainer", description="The program.")
    binds: list[str] = Field([], description="Folders that are seen inside: SOURCE[:TARGET].")
    options: list[str] = Field([], description="More of its options, such as --nv or --rocm.")

    def line(self) -> list[str]:
        """What stands before a command that is to run inside."""
        binds = [word for bind in self.binds for word in ("--bind", bind)]
        return [self.runtime, "exec", *self.options, *binds, self.image]


class Site(Section):
    """What jobs on a cluster have in common."""

    launcher: Launcher = Field("srun", description="What starts the ranks within a job.")
    mpi: str = Field("pmix", description="srun --mpi: how ranks find each other.")
    launcher_options: list[str] = Field([], description="More options of the launcher.")
    modules: list[str] = Field([], description="`module load` these.")
    setup: list[str] = Field([], description="Lines of shell that go before everything else.")
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
        """Its options of sbatch.

        Raises:
            Error: There is no such option.
        """
        return {
            check(name): "" if value is True else str(value)
            for name, value in self.options.items()
            if value is not False
        }

    def launch(self, launcher: Launcher | None = None, *, elastic: bool = False) -> str:
        """The words that start ranks, as the elements of a bash array.

        Args:
            launcher: Instead of the site's own.
            elastic: Whether others may live when a rank fails; `hpctrain job` decides.
        """
        end = [] if elastic else ["--kill-on-bad-exit=1"]
        words = {
            "srun": ["srun", f"--mpi={self.mpi}", *end],
            # Threads and GPUs are divided by hpctrain; a rank bound to one core would be slow.
            "mpirun": ["mpirun", "--bind-to", "none"],
            "horovodrun": ["hpctrain", "horovod", "run"],
        }[launcher or self.launcher]
        more = self.launcher_options if launcher in (None, self.launcher) else []
        inside = self.container.line() if self.container is not None else []
        return shlex.join([*words, *more, *inside])

    def prepare(self) -> str:
        """The lines of shell that make a job's environment."""
        lines = [f"module load {shlex.quote(module)}" for module in self.modules]
        lines += self.setup
        environment = {**self.environment}
        if self.interface is not None:
            environment["HPCTRAIN_INTERFACE"] = self.interface
        lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        return "\n".join(lines)


def load(name: str | None, environment: Mapping[str, str] = os.environ) -> Site:
    """A site's profile.

    Args:
        name: A TOML file, or the name of one in ``~/.config/hpctrain/sites`` or of those that come
            with hpctrain. None: what ``HPCTRAIN_SITE`` says, else ``default``, if there is one.
        environment: With ``HPCTRAIN_SITE``, and ``XDG_CONFIG_HOME``.

    Raises:
        Error: There is none, or it is wrong.
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
        site = Site.model_validate(layer)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        names = list(Site.model_fields)
        hint = nearest(key, names) if first["type"] == "extra_forbidden" else f"see {HERE}."
        raise Error(f"{path}: {key}: {first['msg']}.", hint=hint) from error
    site.sbatch()
    return site
