"""Hyperparameter search: trials of a training command, chosen by Optuna, on one machine or many.

A sweep's folder holds everything that its trials share, so that they can run at any time on any
machine that sees it::

    space.toml     the search space and the metric
    journal.log    Optuna's record of all trials (https://optuna.org, journal storage)
    trial-0000/    a run folder each
    trials.csv, trials.png, best.toml    the results
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from hpctrain.config import Section, read_toml
from hpctrain.errors import Error
from hpctrain.files import write_text
from hpctrain.process import search_path
from hpctrain.run_folder import INTERRUPTED_CODE, RESULT, STOP
from hpctrain.slurm.requeue import CONTINUES

SPACE, JOURNAL = "space.toml", "journal.log"
JOB = "job"
"""The attribute of a trial that names its task of a job array."""

LOOK_SECONDS = 0.5
STOP_SECONDS = 60.0
"""How long a pruned trial may take to save a checkpoint and end."""

GOING_ON = (INTERRUPTED_CODE, 128 + signal.SIGTERM)
"""Exit codes of an interrupted trial, which continues when its job is restarted."""

HINT = "see `hpctrain sweep --help`."
Execute = Callable[[Sequence[str], Path, Callable[[], None]], int]
"""Runs a trial's command, given its run folder and a function to call now and then."""


class Choice(Section):
    """The values that a key may take: a list, or a range."""

    choices: list[str | int | float | bool] | None = Field(None, description="One of these.")
    low: int | float | None = Field(None, description="Least value.")
    high: int | float | None = Field(None, description="Largest value.")
    step: int | float | None = Field(None, description="Only these apart from `low`.")
    log: bool = Field(False, description="By its logarithm.")

    def suggest(self, trial: Any, key: str) -> Any:
        """Choose a key's value for a trial.

        Args:
            trial: The Optuna trial.
            key: The key, such as ``optimizer.lr``.

        Raises:
            Error: The space gives neither a list nor a range for the key.
        """
        if self.choices is not None:
            return trial.suggest_categorical(key, self.choices)
        if self.low is None or self.high is None:
            raise Error(f"{key}: neither choices nor low and high.", hint=HINT)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, step=int(self.step or 1),
                                     log=self.log)  # fmt: skip
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)


class Space(Section):
    """The search space, and the metric to optimize."""

    metric: str = Field("val_loss", description="A metric of validation: val_NAME.")
    direction: Literal["minimize", "maximize"] = Field("minimize", description="What is better.")
    seed: int | None = Field(None, description="Of the sampler.")
    startup_trials: int = Field(
        4, ge=0, description="Trials that are not ended early, whatever they show."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps in which none is.")
    space: dict[str, Choice] = Field(description="By key, as of `hpctrain train --set`.")


def read_space(path: Path) -> Space:
    """Read a search space from a TOML file.

    Raises:
        Error: The file cannot be read, or is invalid.
    """
    try:
        return Space.model_validate(read_toml(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise Error(f"{path}: {key}: {first['msg']}.", hint=HINT) from error


def study(folder: Path, space: Space) -> Any:
    """Open a sweep's Optuna study, which holds its trials so far and suggests the next.

    Args:
        folder: The sweep's folder.
        space: The search space.

    Raises:
        Error: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise Error("sweeps need Optuna.", hint="`pip install 'hpctrain[sweep]'`.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        study_name="sweep",
        load_if_exists=True,
        direction=space.direction,
        sampler=_sampler(space.seed),
        pruner=optuna.pruners.MedianPruner(space.startup_trials, space.warmup_steps),
    )


def _sampler(seed: int | None) -> Any:
    import optuna

    # Trials that run at the same time should not all choose the same.
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def prepare(folder: Path, space_file: Path) -> Space:
    """Make a sweep's folder, with a copy of the search space, unless it exists.

    Args:
        folder: The sweep's folder.
        space_file: The search space to copy.

    Returns:
        The search space.

    Raises:
        Error: The folder cannot be made, or belongs to a sweep over another space.
    """
    own = folder / SPACE
    try:
        if not own.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(own, space_file.read_text())
        elif space_file.exists() and space_file.read_text() != own.read_text():
            raise Error(f"{folder} is a sweep over another space than {space_file}.",
                        hint="choose another folder, or drop --space.")  # fmt: skip
    except OSError as error:
        raise Error(
            f"cannot copy {space_file} to {folder}: {error.strerror}.", hint=HINT
        ) from error
    return read_space(own)


def run_trial(
    folder: Path, space_file: Path, command: Sequence[str], execute: Execute | None = None
) -> int:
    """Run a new trial, or continue the one that this task of a job array had begun.

    Args:
        folder: The sweep's folder.
        space_file: The search space, if the folder has no copy yet.
        command: A launcher, and ``hpctrain train TASK ...``.
        execute: Runs the command to its end; None: as a process of this machine.

    Returns:
        The exit code; 75 for an interrupted trial, which continues when it is started again.

    Raises:
        Error: The space is invalid, or Optuna is not installed.
    """
    import optuna

    space = prepare(folder, space_file)
    sweep = study(folder, space)
    states = optuna.trial.TrialState
    if (frozen := _mine(sweep)) is None:
        trial = _begin(sweep)
    elif frozen.state.is_finished():
        # Its job was started again after the trial had ended, and before Slurm knew that.
        print(f"trial {frozen.number}: {frozen.state.name.lower()} already", flush=True)
        return 0
    else:
        trial = optuna.trial.Trial(sweep, frozen._trial_id)
        if (job := _job()) is not None:
            trial.set_user_attr(JOB, job)
    if space.seed is not None:  # other trials are chosen by processes of their own
        sweep.sampler = _sampler(space.seed + trial.number)
    chosen = {key: choice.suggest(trial, key) for key, choice in space.space.items()}
    run = folder / f"trial-{trial.number:04}"
    run.mkdir(exist_ok=True)
    settings = [
        word for key, value in chosen.items() for word in ("--set", f"{key}={_toml(value)}")
    ]
    words = [*command, *settings, "--out", str(run), "--resume", "auto"]
    print(f"trial {trial.number}: {json.dumps(chosen)}", flush=True)
    watcher = _Watcher(trial, space, run)
    code = (execute or _here)(words, run, watcher.look)
    result = run / RESULT
    if watcher.given_up and not result.exists():
        sweep.tell(trial, state=states.PRUNED)
        print(f"trial {trial.number}: ended early: worse than the median", flush=True)
        return 0
    if not result.exists() and code in GOING_ON:
        print(f"trial {trial.number}: interrupted", flush=True)
        return code
    if not result.exists():
        sweep.tell(trial, state=states.FAIL)
        print(f"trial {trial.number}: failed (exit code {code})", flush=True)
        return code or 1
    final = json.loads(result.read_text())["metrics"]["final"]
    if space.metric not in final:
        sweep.tell(trial, state=states.FAIL)
        raise Error(f"{space.metric} is no metric of this task.", hint=", ".join(final) + " are.")
    sweep.tell(trial, final[space.metric])
    print(f"trial {trial.number}: {space.metric} {final[space.metric]:.6g}", flush=True)
    return 0


def _job() -> str | None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else None


def _mine(sweep: Any) -> Any:
    """Return the trial that this task of a job array had before it was restarted, if any.

    A failed one does not count: the task may have been requeued to try other values.
    """
    from optuna.trial import TrialState

    jobs = {_job(), os.environ.get(CONTINUES)} - {None}
    states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    for frozen in sweep.get_trials(deepcopy=False, states=states):
        if frozen.user_attrs.get(JOB) in jobs:
            return frozen
    return None


def _begin(sweep: Any) -> Any:
    """Begin a trial that names its job from the start, as the job may end at any instant."""
    import optuna

    if (job := _job()) is None:
        return sweep.ask()
    named = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING, user_attrs={JOB: job}
    )  # fmt: skip
    number = sweep._storage.create_new_trial(sweep._study_id, template_trial=named)
    return optuna.trial.Trial(sweep, number)


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)


class _Watcher:
    """Reports a trial's validations to Optuna, and stops the run if it is to be pruned.

    Attributes:
        given_up: Whether the trial is pruned.
    """

    def __init__(self, trial: Any, space: Space, run: Path) -> None:
        self.given_up = False
        self._trial = trial
        self._metric = space.metric
        self._run = run
        # What it has told before it was started again.
        self._told = max(trial.storage.get_trial(trial._trial_id).intermediate_values, default=-1)

    def look(self) -> None:
        """Report new validations of the run, and stop it if Optuna prunes the trial."""
        for step, value in _values(self._run, self._metric):
            if step > self._told:
                self._trial.report(value, step)
                self._told = step
        if not self.given_up and self._trial.should_prune():
            self.given_up = True
        if self.given_up:
            with contextlib.suppress(OSError):
                (self._run / STOP).touch()


def _here(words: Sequence[str], run: Path, look: Callable[[], None]) -> int:
    """Run a trial's command on this machine.

    Args:
        words: The command.
        run: The trial's run folder.
        look: Called now and then while it runs.

    Returns:
        The command's exit code.
    """
    environment = {**os.environ, "PATH": search_path()}
    (run / STOP).unlink(missing_ok=True)
    try:
        process = subprocess.Popen(list(words), env=environment, start_new_session=True)
    except OSError as error:
        raise Error(f"cannot start {words[0]}: {error.strerror}.", hint=HINT) from error
    before = signal.signal(signal.SIGTERM, lambda number, frame: (run / STOP).touch())
    asked: float | None = None
    try:
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            look()
            if asked is None and (run / STOP).exists():
                asked = time.monotonic()
            if asked is not None and time.monotonic() - asked > STOP_SECONDS:
                os.killpg(process.pid, signal.SIGKILL)
    finally:
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


def _values(run: Path, metric: str) -> list[tuple[int, float]]:
    found = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                value = record.get(metric.removeprefix("val_"))
                if record.get("kind") == "validation" and value is not None:
                    found.append((int(record["step"]), float(value)))
    return found


def run_here(folder: Path, space_file: Path, command: Sequence[str], trials: int, jobs: int) -> int:
    """Run trials on this machine.

    Args:
        folder: The sweep's folder.
        space_file: The search space.
        command: The training command.
        trials: How many trials to run.
        jobs: How many to run at a time.

    Returns:
        How many trials failed.
    """
    from hpctrain.process import which

    program = which("hpctrain")
    assert program is not None
    words = [str(program), "trial", str(folder), "--space", str(space_file), "--", *command]
    left, failed = trials, 0
    running: list[subprocess.Popen[bytes]] = []
    try:
        while left or running:
            while left and len(running) < jobs:
                running.append(subprocess.Popen(words))
                left -= 1
            time.sleep(LOOK_SECONDS)
            failed += sum(each.poll() not in (None, 0) for each in running)
            running = [each for each in running if each.poll() is None]
    finally:
        for each in running:
            each.terminate()
    return failed


def report(folder: Path) -> list[dict[str, Any]]:
    """Return a sweep's trials, best first; write trials.csv, trials.png and best.toml.

    Raises:
        Error: The folder holds no sweep.
    """
    if not (folder / SPACE).exists():
        raise Error(f"{folder} is no sweep.", hint=HINT)
    space = read_space(folder / SPACE)
    sign = 1 if space.direction == "minimize" else -1
    rows = []
    for trial in study(folder, space).get_trials(deepcopy=False):
        value = trial.value if trial.value is not None else trial.intermediate_values.get(
            trial.last_step)  # fmt: skip
        rows.append({"trial": trial.number, "state": trial.state.name.lower(),
                     space.metric: value, "step": trial.last_step, **trial.params})  # fmt: skip
    done = {"complete": 0, "pruned": 1}
    rows.sort(key=lambda row: (done.get(row["state"], 2), sign * (row[space.metric] or 0)))
    with (folder / "trials.csv").open("w", newline="") as file:
        names = ["trial", "state", space.metric, "step", *space.space]
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    if rows and rows[0]["state"] == "complete":
        best = folder / f"trial-{rows[0]['trial']:04}" / "config.toml"
        with contextlib.suppress(Error):
            config = read_toml(best)
            for name in ("out", "resume", "world_size"):
                config.pop(name, None)
            write_text(folder / "best.toml", tomli_w.dumps(config))
    _plot(folder / "trials.png", space, rows)
    return rows


def _plot(path: Path, space: Space, rows: list[dict[str, Any]]) -> None:
    """Plot the metric against the trials' numbers and against each key."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    shown = [row for row in rows if row[space.metric] is not None]
    keys = ["trial", *space.space]
    figure, axes = pyplot.subplots(
        1, len(keys), figsize=(3.2 * len(keys), 3.2), sharey=True, squeeze=False
    )
    for axis, key in zip(axes[0], keys, strict=True):
        text = key in space.space and space.space[key].choices is not None
        for state, colour in (("complete", "tab:blue"), ("pruned", "tab:gray")):
            points = [row for row in shown if row["state"] == state and key in row]
            values = [str(row[key]) if text else row[key] for row in points]
            if points:
                axis.scatter(values, [row[space.metric] for row in points], c=colour, label=state)
        if shown and key in space.space and space.space[key].log:
            axis.set_xscale("log")
        axis.set_xlabel(key)
    axes[0][0].set_ylabel(space.metric)
    if shown:
        axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
