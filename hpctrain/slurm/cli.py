"""The commands about Slurm's jobs, and about many runs."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hpctrain import process
from hpctrain.errors import Error
from hpctrain.files import open_regular
from hpctrain.run_folder import INTERRUPTED_CODE
from hpctrain.slurm import commands, jobs, options
from hpctrain.slurm.owner import Elsewhere
from hpctrain.slurm.supervise import Job

if TYPE_CHECKING:
    from hpctrain.slurm.submit import Request

FOLLOW_SECONDS = 0.5
OURS = ("--out", "--resume", "--world-size")
"""Options of ``hpctrain train`` that the batch script gives."""


def split(arguments: tuple[str, ...], known: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Split arguments into those of ``hpctrain train`` and those of sbatch.

    Args:
        arguments: The arguments as given.
        known: The options of ``hpctrain train``, and whether they take a value.

    Returns:
        The arguments of ``hpctrain train``, with TASK first if there is one; and sbatch's.
    """
    task: list[str] = []
    train: list[str] = []
    sbatch: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            if task:
                raise Error(f"{word!r} is one word too many after {task[0]!r}.",
                            hint="options that take a value are written --name=value.")  # fmt: skip
            task.append(word)
        elif name in known:
            train.append(word)
            if known[name] and not equals and left:
                train.append(left.pop(0))
        else:
            word = options.long(word)
            name, equals, _ = word.removeprefix("--").partition("=")
            sbatch.append(word)
            # After an option that is not known here, it may be its value or TASK.
            takes = name in options.VALUED or (task and not options.known(name))
            if takes and not equals and left and not left[0].startswith("-"):
                if not options.known(name):
                    options.parse([word, left[0]])  # says so
                sbatch[-1] = f"{word}={left.pop(0)}"
    return [*task, *train], sbatch


def submission(
    train: click.Command, config_of: Callable[[dict[str, Any]], Any]
) -> list[click.Command]:
    """Make the commands `hpctrain submit` and `hpctrain sweep`.

    Args:
        train: The command `hpctrain train`, whose options they take, too.
        config_of: Resolves the configuration from that command's parameters.
    """
    known = {
        name: not getattr(parameter, "is_flag", False)
        for parameter in train.params
        for name in parameter.opts
    }

    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.option("--space", metavar="FILE", required=True, help="What to choose from, in TOML.")
    @click.option("--trials", default=20, show_default=True, help="How many.")
    @click.option("--jobs", "at_once", default=1, show_default=True, help="How many at a time.")
    @click.option("--ranks", default=0, help="Ranks of each trial, by mpirun, on this machine.")
    @click.option("--submit", "queued", is_flag=True, help="As a Slurm job array.")
    @click.option("--site", metavar="NAME|FILE", help="Profile of the cluster, in TOML.")
    @click.option("--dry-run", is_flag=True, help="Print the batch script; needs no Slurm.")
    @click.option("--wait", "waits", is_flag=True, help="Wait for the array, and show its trials.")
    def sweep(
        arguments: tuple[str, ...],
        space: str,
        trials: int,
        at_once: int,
        ranks: int,
        queued: bool,
        site: str | None,
        dry_run: bool,
        waits: bool,
    ) -> None:
        """Choose hyperparameters of TASK by trials; --out is the sweep's folder.

        \b
          hpctrain sweep digits --space space.toml --trials 20 --jobs 2 --epochs 5
          hpctrain sweep my_task.py --space space.toml --trials 64 --jobs 8 --submit --nodes 2

        \b
        With a file such as this:
          metric = "val_accuracy"          # of the validation; default val_loss
          direction = "maximize"
          [space]
          "optimizer.lr" = {low = 1e-4, high = 1e-1, log = true}
          "train.batch_size" = {choices = [32, 64, 128]}

        \b
        Values are chosen by Optuna's TPE sampler; a trial that is worse than the median of the
        others at a validation is ended. `hpctrain trials DIR` shows them, and keeps best.toml:
          hpctrain train --config DIR/best.toml --out runs/best
        """
        from hpctrain.slurm import sweep as sweeps
        from hpctrain.slurm.site import load
        from hpctrain.slurm.submit import Request, command_line
        from hpctrain.slurm.submit import submit as submit_request

        words, sbatch = split(arguments, known)
        config = config_of(train.make_context("hpctrain sweep", list(words)).params)
        asked = options.parse(sbatch)
        name = _name(config.task)
        folder = config.out or Path("runs") / f"{name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
        command = ["hpctrain", "train", *_without(words)]
        if not queued and not dry_run:
            if asked:
                raise Error(f"--{next(iter(asked))} is an option of sbatch.", hint="add --submit.")
            prefix = process.mpirun(ranks) if ranks else []
            failed = sweeps.run_here(folder, Path(space), [*prefix, *command], trials, at_once)
            _trials(folder)
            sys.exit(1 if failed else 0)
        request = Request(
            name, command, {"array": f"1-{trials}%{at_once}", **asked}, load(site), "array", folder,
            blocks={"space": f"space={shlex.quote(space)}"},
        )  # fmt: skip
        made = command_line()
        if dry_run:
            _unchecked(asked)
            click.echo(request.script(made), nl=False)
            return
        sweeps.prepare(folder, Path(space))
        with _hinted(request, known):
            number = submit_request(request, made, config.to_toml())
        click.echo(f"job array {number}: {folder}")
        if waits:
            tasks = [f"{number}_{task}" for task in range(1, trials + 1)]

            def finish() -> int:
                jobs.wait_for_all(tasks, click.echo)
                _trials(folder)
                return 0

            _waited(finish, f"the array runs on: `hpctrain trials {folder}` shows its trials, "
                    f"`scancel {number}` ends it.")  # fmt: skip

    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.option("--site", metavar="NAME|FILE", help="Profile of the cluster, in TOML.")
    @click.option("--launcher", metavar="srun|mpirun|horovodrun|COMMAND", help="Starts the ranks.")
    @click.option("--tasks-per-node", metavar="N", help="Ranks on each node (--ntasks-per-node).")
    @click.option("--elastic", is_flag=True, help="Go on within the job when a node is lost.")
    @click.option("--scaling", is_flag=True, help="Measure on 1, 2, 4, ... of the nodes.")
    @click.option("--stage-dir", metavar="DIR", help="Node-local folder to copy the shards to.")
    @click.option(
        "--max-requeues", default=20, show_default=True, help="How often to be started again."
    )
    @click.option(
        "--signal",
        "told_by",
        metavar="NAME[@SECONDS]",
        help="How Slurm tells that time is up, and when. [default: USR1@120]",
    )
    @click.option("--keep-diff", is_flag=True, help="Keep `git diff HEAD` with the run.")
    @click.option("--dry-run", is_flag=True, help="Print the batch script; needs no Slurm.")
    @click.option("--test-only", is_flag=True, help="Ask Slurm when it would start.")
    @click.option("--wait", "waits", is_flag=True, help="Wait, and end with its exit code.")
    @click.option(
        "--to",
        "target",
        type=click.Choice(["slurm", "kubernetes"]),
        default="slurm",
        help="`kubernetes`: print an MPIJob for kubectl. [default: slurm]",
    )
    @click.option("--image", metavar="IMAGE", help="Its container image.")
    @click.option(
        "--volume", "volumes", metavar="CLAIM:PATH", multiple=True, help="A volume of it."
    )
    def submit(
        arguments: tuple[str, ...],
        site: str | None,
        launcher: str | None,
        tasks_per_node: str | None,
        elastic: bool,
        scaling: bool,
        stage_dir: str | None,
        max_requeues: int,
        told_by: str | None,
        keep_diff: bool,
        dry_run: bool,
        test_only: bool,
        waits: bool,
        target: str,
        image: str | None,
        volumes: tuple[str, ...],
    ) -> None:
        """Train TASK as a Slurm job that looks after itself.

        \b
          hpctrain submit digits --nodes 3
          hpctrain submit my_task.py --data shards --epochs 90 --nodes 8 --gpus-per-node 4 \\
              --time 12:00:00 --partition gpu --account abc
          hpctrain submit digits --nodes 2 --strategy ps --servers 2 --dry-run

        \b
        Options are those of `hpctrain train`, and any of sbatch by its own name. The script, the
        configuration, what of the environment holds no secret, and the commit of git are kept in
        the run folder.

        \b
        Before the time limit the run saves a checkpoint and the job is started again; so it is when
        a node fails. What a cluster needs is described once: see --site, and slurm/sites.
        """
        from hpctrain.slurm.site import load
        from hpctrain.slurm.submit import Request, Warn, command_line
        from hpctrain.slurm.submit import check as check_request
        from hpctrain.slurm.submit import submit as submit_request

        words, sbatch = split(arguments, known)
        if stage_dir is not None:
            words += ["--set", f"data.stage_dir={stage_dir}"]
        asked = options.parse(sbatch)
        if tasks_per_node is not None:
            asked["ntasks-per-node"] = tasks_per_node
        if target == "kubernetes":
            from hpctrain.slurm.kubernetes import manifest

            if image is None:
                raise Error("an MPIJob needs an image.", hint="--image IMAGE: see docs/slurm.md.")
            config = config_of(train.make_context("hpctrain submit", list(words)).params)
            name = _name(config.task)
            click.echo(manifest(
                asked.get("job-name", name), ["hpctrain", "train", *_without(words)], asked,
                str(config.out or Path("runs") / name), image, volumes, restarts=max_requeues,
                made=command_line(),
            ), nl=False)  # fmt: skip
            return
        profile = load(site)
        with _there({**profile.sbatch(), **asked}.get("chdir")):
            config = config_of(train.make_context("hpctrain submit", list(words)).params)
        chosen = [
            name
            for name, is_it in (
                ("elastic", elastic),
                ("scaling", scaling),
                ("stage", stage_dir is not None),
                ("parameter-server", config.strategy == "ps"),
            )
            if is_it
        ]
        name = _name(config.task)
        run = config.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        request = Request(
            name, ["hpctrain", "train", *_without(words)], asked, profile,
            chosen[0] if chosen else "train", run, launcher, max_requeues,
            Warn.parse(told_by) if told_by is not None else None,
            {"batch": f"batch={config.train.batch_size}"} if chosen[:1] == ["scaling"] else {},
        )  # fmt: skip
        if request.warn is not None and request.warn.signal != "USR1":
            request.train += ["--set", f"interrupt.signal={request.warn.signal}"]
        made = command_line()
        if dry_run:
            _unchecked(asked)
            click.echo(request.script(made), nl=False)
            return
        with _hinted(request, known):
            if test_only:
                click.echo(check_request(request, made))
                return
            number = submit_request(request, made, config.to_toml(), keep_diff=keep_diff)
        click.echo(f"job {number}: {request.run}")
        if waits:
            submitted = jobs.Submitted(request.run, number, name)
            _waited(lambda: jobs.wait(submitted, click.echo), _runs_on(submitted))

    return [submit, sweep]


def _unchecked(asked: options.Options) -> None:
    for name in asked:
        if not options.known(name):
            click.echo(f"# --{name} is not known here; sbatch will say.", err=True)


@contextlib.contextmanager
def _hinted(request: Request, known: Iterable[str]) -> Iterator[None]:
    """If Slurm refuses a request, suggest what was meant by options that are not known."""
    try:
        yield
    except commands.Unanswered:
        raise
    except Error as error:
        given = {**request.site.sbatch(), **request.options}
        if hint := options.misspelt(given, known):
            raise Error(error.message, hint=hint) from error
        raise


@contextlib.contextmanager
def _there(folder: str | None) -> Iterator[None]:
    """Look for the task and its data in the folder in which the job runs."""
    before = Path.cwd()
    try:
        os.chdir(folder or before)
    except OSError as error:
        raise Error(f"--chdir {folder}: {error.strerror}.", hint="make it first.") from error
    try:
        yield
    finally:
        os.chdir(before)


def _name(task: str) -> str:
    return re.sub(r"\W+", "-", Path(task.rpartition(":")[2] or task).stem)


def _without(words: list[str]) -> list[str]:
    """Remove the options that the batch script gives itself from a training command."""
    kept: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word.partition("=")[0] in OURS:
            if "=" not in word:
                left.pop(0)
        else:
            kept.append(word)
    return kept


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
@click.option("--run", "folder", required=True, metavar="DIR", help="The run folder.")
@click.option(
    "--max-requeues", default=20, show_default=True, help="How often to be started again."
)
@click.option(
    "--relaunches", default=0, show_default=True, help="How often to go on here on the nodes left."
)
@click.option(
    "--elastic", is_flag=True, help="Let ranks outlive the loss of others in place, if they can."
)
@click.option("--signal", "told_by", default="USR1", show_default=True, metavar="NAME",
              help="Tells that time is up, as do USR1, USR2, HUP and TERM.")  # fmt: skip
def job(
    command: tuple[str, ...],
    folder: str,
    max_requeues: int,
    relaunches: int,
    elastic: bool,
    told_by: str,
) -> None:
    """Look after a run from within its batch script; COMMAND is the launcher with all it starts.

    \b
      hpctrain job --run runs/a -- srun --mpi=pmix hpctrain train digits --out runs/a --resume auto

    \b
    - The signal that time is up is handed on to the run, which saves a checkpoint and ends;
      then the job is put back into the queue (or another one is submitted), at most so many times.
    - Success is proved by the run's result.json.
    - With --elastic, where a node is lost, the ranks on the others go on (srun --mpi=pmix; a
      small launch shows first whether they can).
    - With --relaunches, where they cannot, the run is started again on the nodes that are left.
    - Else the first cause is the last line of the log, and in failure.json, and its exit code is
      that of the job.
    """
    try:
        one = Job(
            list(command),
            Path(folder),
            max_requeues=max_requeues,
            relaunches=relaunches,
            elastic=elastic,
            told_by=told_by,
        )
    except Elsewhere as elsewhere:
        click.echo(f"hpctrain job: {elsewhere}")
        sys.exit(0)
    sys.exit(one.supervise())


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("folder")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
@click.option("--space", default="space.toml", metavar="FILE", help="What to choose from.")
@click.option(
    "--max-requeues", default=20, show_default=True, help="How often to be started again."
)
@click.option("--signal", "told_by", default="USR1", show_default=True, metavar="NAME",
              help="Tells that time is up, as do USR1, USR2, HUP and TERM.")  # fmt: skip
def trial(
    folder: str, command: tuple[str, ...], space: str, max_requeues: int, told_by: str
) -> None:
    """Run a trial of a sweep.

    COMMAND is a launcher and `hpctrain train TASK`; the values are added. In a Slurm job it is
    looked after as by `hpctrain job`: when time is up, or after a requeue, the trial goes on.
    """
    from hpctrain.slurm import sweep as sweeps

    def execute(words: Sequence[str], run: Path, look: Callable[[], None]) -> int:
        try:
            return Job(
                list(words), run, max_requeues=max_requeues, relaunches=0, told_by=told_by,
                watch=look, home=Path(folder),
            ).supervise()  # fmt: skip
        except Elsewhere as elsewhere:
            click.echo(f"hpctrain trial: {elsewhere}")
            return INTERRUPTED_CODE

    looked_after = execute if "SLURM_JOB_ID" in os.environ else None
    sys.exit(sweeps.run_trial(Path(folder), Path(space), command, looked_after))


@click.command()
@click.argument("folder")
def trials(folder: str) -> None:
    """Show a sweep's trials, best first; write trials.csv, trials.png and best.toml."""
    _trials(Path(folder))


def _trials(folder: Path) -> None:
    from hpctrain.slurm import sweep as sweeps

    rows = sweeps.report(folder)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns([names, *([short(row.get(name)) for name in names] for row in rows)])


def short(value: Any) -> str:
    """Return a value in a few letters, for a table."""
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of words, each column as wide as its longest word."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(f"{v:{w}}" for v, w in zip(row, widths, strict=True)).rstrip()
        click.echo(jobs.printable(line))


def _waited(wait: Callable[[], int], runs_on: str) -> NoReturn:
    """Exit with the code that a wait returns; on Ctrl-C say that the job runs on."""
    try:
        sys.exit(wait())
    except KeyboardInterrupt:
        click.echo(f"\n{jobs.printable(runs_on)}", err=True)
        sys.exit(128 + signal.SIGINT)


@click.group(name="jobs", invoke_without_command=True)
@click.option("--runs", "folder", default="runs", show_default=True, metavar="DIR",
              help="Where the run folders are.")  # fmt: skip
@click.pass_context
def group(context: click.Context, folder: str) -> None:
    """List submitted runs with their state and progress.

    Each command takes a job's number or name, or a run folder.
    """
    context.obj = Path(folder)
    if context.invoked_subcommand is None:
        _table(jobs.find(Path(folder), lambda text: click.echo(jobs.printable(text), err=True)))


def _table(runs: list[jobs.Submitted]) -> None:
    if not runs:
        click.echo("no submitted runs here.")
        return
    try:
        states = commands.states(run.job for run in runs)
    except Error as error:
        click.echo(f"{error}", err=True)
        states = {}
    rows = [("JOB", "NAME", "STATE", "STEP", "LOSS", "SAMPLES/S", "LEFT", "RESTARTS", "RUN")]
    for run in runs:
        far = jobs.progress(run.run)
        state = states.get(run.job)
        going = state is not None and not state.over
        rows.append(
            (
                run.job,
                run.name,
                jobs.describe(run, state),
                f"{far.step}/{far.steps}" if far.steps else "-",
                f"{far.loss:.4g}" if far.loss is not None else "-",
                f"{far.samples_per_second:.4g}" if far.samples_per_second is not None else "-",
                _clock(far.seconds_left) if going and far.seconds_left is not None else "-",
                str(far.restarts),
                str(run.run),
            )
        )
    columns(rows)


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"


@group.command()
@click.argument("which")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job is over.")
@click.pass_obj
def logs(folder: Path, which: str, follow: bool) -> None:
    """Show a run's newest log."""
    run = jobs.named(which, folder)
    path = jobs.log(run)
    if path is None and not follow:
        raise Error(f"job {run.job} has no log yet.", hint="`hpctrain jobs` shows why it waits.")
    shown, checked = 0, 0.0
    silence = jobs.Silence(lambda text: click.echo(text, err=True))
    while True:
        path = path or jobs.log(run)
        if path is not None:
            try:
                with open_regular(path) as file:
                    file.seek(shown)
                    text = file.read()
            except OSError as error:
                raise Error(f"{path}: {error.strerror}.", hint="`hpctrain jobs`.") from error
            shown += len(text)
            click.echo(jobs.printable(text.decode(errors="replace")), nl=False)
        if not follow:
            return
        if time.monotonic() - checked > jobs.POLL_SECONDS:
            checked = time.monotonic()
            run = jobs.named(str(run.run), folder)
            if (states := silence.states([run.job])) is not None:
                state = states.get(run.job)
                follow = state is not None and not state.over
        time.sleep(FOLLOW_SECONDS)


@group.command()
@click.argument("which")
@click.pass_obj
def cancel(folder: Path, which: str) -> None:
    """End a job at once; a file `stop` in the run folder would end it with a checkpoint."""
    run = jobs.named(which, folder)
    numbers = ", ".join(jobs.cancel(run))
    click.echo(f"job {numbers}: cancelled; `hpctrain train --out {run.run} --resume auto` goes on")


@group.command()
@click.argument("which")
@click.pass_obj
def wait(folder: Path, which: str) -> None:
    """Return when a run is over; the exit code is that of the training."""
    run = jobs.named(which, folder)
    _waited(lambda: jobs.wait(run, click.echo), _runs_on(run))


def _runs_on(run: jobs.Submitted) -> str:
    return (f"job {run.job} runs on: `hpctrain jobs wait {run.run}` waits again, "
            f"`hpctrain jobs cancel {run.run}` ends it.")  # fmt: skip
