"""Fault injection: run a training while things go wrong on purpose, and judge what became of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.errors import Error
from hpctrain.launch.faults import Fault
from hpctrain.process import run, search_path
from hpctrain.run_folder import RESULT
from hpctrain.train import sample_trace

LOOK_SECONDS = 2e-3
SLOW_SECONDS = 0.03  # of a slowed process's turn: it runs for a part of it
END_SECONDS = 10.0


@dataclass
class Outcome:
    """What became of a run under faults.

    Attributes:
        verdict: ``good``, or what is wrong with it.
        returncode: Of the launcher.
        seconds: How long it took.
        faults: Those that came, in order.
        recovery_ms: Of each loss, from the end of the last step before it to the end of the next.
        usual_ms: Of a step otherwise.
        wrong: What the trace of samples says is wrong.
        metrics: The final ones.
    """

    verdict: str
    returncode: int
    seconds: float
    faults: list[str] = field(default_factory=list)
    recovery_ms: list[float] = field(default_factory=list)
    usual_ms: float = 0.0
    wrong: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class Chaos:
    """A run under a plan of faults.

    Args:
        command: The launcher with all it starts; must train with ``--trace-samples`` into ``out``.
        out: The run folder.
        faults: What goes wrong.
        kill_node: The command by which a node is lost; its name is added.
        limit_seconds: A run that takes longer hangs.
    """

    def __init__(
        self,
        command: Sequence[str],
        out: Path,
        faults: Sequence[Fault],
        *,
        kill_node: Sequence[str] = (),
        limit_seconds: float = 600.0,
    ) -> None:
        if kill_node == () and any(fault.kind == "node" for fault in faults):
            raise Error("the plan loses a node, but nothing says how.", hint="--kill-node COMMAND.")
        self._command = list(command)
        self._out = out
        self._left = list(faults)
        self._kill_node = list(kill_node)
        self._limit = limit_seconds
        self._come: list[str] = []
        self._reached: dict[int, float] = {}  # when each step was seen to have ended
        self._processes: dict[str, tuple[str, int]] = {}  # host and PID by number
        self._tails: dict[Path, int] = {}
        self._slowed: list[threading.Event] = []
        self._since = sample_trace.launches(out)

    def run(self, log: Path | None = None) -> Outcome:
        """Run it to its end, and look at what it left.

        Args:
            log: Where what it prints goes; None: to this process's own output.
        """
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("w")) if log is not None else None
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                env={**os.environ, "PATH": search_path()},
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.monotonic() - began < self._limit:
                    self._look()
                    time.sleep(LOOK_SECONDS)
                hangs = process.poll() is None
            finally:
                self._end(process)
        return self._judge(hangs, process.returncode, time.monotonic() - began)

    def _look(self) -> None:
        """Read what the ranks wrote since the last time, and let come what is due."""
        for path in (self._out / sample_trace.FOLDER).glob("*-*.jsonl"):
            launch, _, number = path.stem.partition("-")
            if int(launch) < self._since:
                continue
            with path.open("rb") as file:
                file.seek(self._tails.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._tails[path] = self._tails.get(path, 0) + len(whole)
            for line in map(json.loads, whole.splitlines()):
                if "process" in line:
                    self._processes[number] = line["host"], line["process"]
                    self._reached.setdefault(0, time.monotonic())
                if "ended" in line:
                    self._reached.setdefault(line["ended"], time.monotonic())
        farthest = max(self._reached, default=-1)
        for fault in list(self._left):
            since = min((at for step, at in self._reached.items() if step >= fault.step), default=0)
            due = farthest >= fault.step and time.monotonic() >= since + fault.seconds
            if due and (fault.kind == "node" or fault.target in self._processes):
                self._left.remove(fault)
                self._come.append(f"{fault} at step {farthest}")
                self._let_come(fault)

    def _let_come(self, fault: Fault) -> None:
        if fault.kind == "node":
            run([*self._kill_node, fault.target], timeout_seconds=60)
        elif fault.kind == "slow":
            over = threading.Event()
            self._slowed.append(over)
            threading.Thread(target=self._slow, args=(fault, over), daemon=True).start()
        else:
            self._signal(fault.target, "KILL" if fault.kind == "kill" else "STOP")

    def _signal(self, number: str, name: str) -> None:
        host, pid = self._processes[number]
        if host == os.uname().nodename:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals["SIG" + name])
        else:
            command = ["ssh", "-o", "BatchMode=yes", host, "kill", f"-{name}", str(pid)]
            run(command, timeout_seconds=60)

    def _slow(self, fault: Fault, over: threading.Event) -> None:
        while not over.is_set():
            self._signal(fault.target, "STOP")
            over.wait(SLOW_SECONDS * (1 - 1 / fault.factor))
            self._signal(fault.target, "CONT")
            over.wait(SLOW_SECONDS / fault.factor)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        for over in self._slowed:
            over.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for host, pid in self._processes.values():
            if host == os.uname().nodename and _trains(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _judge(self, hangs: bool, returncode: int, seconds: float) -> Outcome:
        outcome = Outcome("good", returncode, round(seconds, 1), self._come)
        lines = _read_lines(self._out / "metrics.jsonl")
        outcome.recovery_ms = [line["step_ms"] for line in lines if "lost" in line]
        times = list(self._reached.values())
        steps = [1e3 * (b - a) for a, b in itertools.pairwise(times)]
        outcome.usual_ms = round(statistics.median(steps), 3) if steps else 0.0
        result = self._out / RESULT
        if hangs:
            outcome.verdict = f"hangs: not over after {self._limit:.0f} s"
        elif not result.exists():
            outcome.verdict = f"no {RESULT}; the launcher ended with {returncode}"
        else:
            outcome.metrics = json.loads(result.read_text())["metrics"]["final"]
            outcome.wrong = sample_trace.check(self._out).wrong
            if outcome.wrong:
                outcome.verdict = "samples were left out or taken twice"
        return outcome


def judge_metrics(
    outcome: Outcome, faultless: Sequence[dict[str, float]], say: Callable[[str], None]
) -> None:
    """Compare the final metrics with those of runs without faults; changes the verdict.

    They may differ from the nearest of these by as much as these differ among themselves, and by a
    hundredth at least: a world of another size rounds differently.

    Args:
        outcome: Of the run with faults.
        faultless: Final metrics by name, of each run without.
        say: Told of each comparison.
    """
    for name, value in outcome.metrics.items():
        others = [metrics[name] for metrics in faultless if name in metrics]
        if not others or not name.startswith("val_"):
            continue
        near = min(abs(value - other) for other in others)
        say(f"{name} {value:.4f}, without faults {' '.join(f'{other:.4f}' for other in others)}")
        if near > max(max(others) - min(others), 0.01) and outcome.verdict == "good":
            outcome.verdict = f"{name} is {value:.4f}, {near:.4f} from any run without faults"


def save(outcome: Outcome, path: Path) -> None:
    """Write an outcome as JSON.

    Args:
        outcome: What became of a run.
        path: Of the file.
    """
    path.write_text(json.dumps(asdict(outcome), indent=2) + "\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _trains(pid: int) -> bool:
    """Whether that process is (still) a rank of hpctrain."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"train" in words
