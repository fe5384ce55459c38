"""Through a parameter server one learns what one process learns, or nearly, and safely."""

import json
import os
import shutil

import psutil
import pytest
import torch

from hpctrain.checkpoint.store import CheckpointStore, load_verified
from hpctrain.cli import cli
from hpctrain.process import run
from tests.e2e.conftest import result_of
from tests.e2e.test_bad_input import complaint
from tests.e2e.test_failures import RAISES_ON_RANK_1
from tests.slurm.conftest import TASK, slow_until
from tests.waiting import SECONDS

QUIET = ("--set", "log.tensorboard=false")
EXACT = ("digits", "--steps", 50, "--dtype", "float64", "--seed", 3, *QUIET)
OPTIMIZERS = {
    "adamw": (),
    "sgd, clipped": (
        *("--set", "optimizer.name=sgd", "--lr", 0.05),
        *("--set", "train.clip_norm=0.5"),
    ),
    "lamb": ("--set", "optimizer.name=lamb", "--lr", 0.02),
}


def ps(workers, servers=1, *settings):
    """The arguments of a run by parameter server, and how many ranks it takes."""
    arguments = ["--strategy", "ps", "--servers", servers]
    for setting in settings:
        arguments += ["--set", setting]
    return arguments, workers if "ps.colocate=true" in settings else workers + servers


def alone(folder, *arguments):
    """Train in this very process: what others are compared with."""
    cli.main(["train", *map(str, arguments), "--out", str(folder)], standalone_mode=False)
    return saved(folder)


def saved(folder):
    """The state in the newest checkpoint."""
    store = CheckpointStore(folder / "checkpoints", keep=1)
    return load_verified(store.path(store.steps()[-1]))


def assert_same(ours, theirs):
    """Parameters, and the state of the optimizer as torch has it."""
    assert ours["model"].keys() == theirs["model"].keys()
    for name, expected in theirs["model"].items():
        assert ours["model"][name].dtype == expected.dtype
        assert (ours["model"][name] - expected).norm() <= 1e-12 * expected.norm(), name
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    for number, expected in theirs["optimizer"]["state"].items():
        state = ours["optimizer"]["state"][number]
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert (state[name] - value).norm() <= 1e-12 * value.norm(), (number, name)


def lines(folder, kind):
    """The records of one kind in metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What one process learns; each made when it is asked for first."""
    made = {}

    def reference(optimizer):
        if optimizer not in made:
            folder = tmp_path_factory.mktemp("single") / "run"
            made[optimizer] = alone(folder, *EXACT, *OPTIMIZERS[optimizer])
        return made[optimizer]

    return reference


FAR_AND_ODD = [
    *("ps.shared_memory=false", "ps.placement=greedy", "ps.slice_bytes=1000"),
    "train.accumulate=2",
]


# 64 is not divisible by 3, nor is the epoch by 64.
@pytest.mark.parametrize(
    ("optimizer", "workers", "servers", "settings"),
    [
        pytest.param("adamw", 2, 1, ["ps.shares=[1,3]"], marks=pytest.mark.long),
        ("adamw", 3, 2, FAR_AND_ODD),
        ("sgd, clipped", 2, 2, ["ps.slice_bytes=1000", "ps.shares=speed", "ps.share_steps=7"]),
        ("lamb", 2, 2, ["ps.colocate=true", "ps.slice_bytes=1000"]),
    ],
    ids=["by hand", "far and odd", "by speed", "co-located"],
)
def test_same_as_one_process(hpctrain, reference, optimizer, workers, servers, settings):
    arguments, ranks = ps(workers, servers, *settings)
    hpctrain.train(*EXACT, *OPTIMIZERS[optimizer], "--out", "run", *arguments, ranks=ranks)
    folder = hpctrain.folder / "run"
    assert_same(saved(folder), reference(optimizer))
    result = result_of(folder)
    assert result["strategy"] == "ps"
    assert result["world"] == [{"step": 0, "size": workers, "reason": "start"}]
    assert (result["steps"], result["samples"]) == (50, 2 * 1438 + 4 * 64)
    assert result["metrics"]["final"]["val_accuracy"] > 0.5


@pytest.mark.parametrize("consistency", [pytest.param("async", marks=pytest.mark.long), "ssp:2"])
def test_learning_without_waiting(hpctrain, consistency):
    arguments, ranks = ps(4, 1, "ps.colocate=true")
    hpctrain.train(
        *("digits", "--out", "run", "--consistency", consistency, *arguments, *QUIET), ranks=ranks
    )
    folder = hpctrain.folder / "run"
    result = result_of(folder)
    assert result["metrics"]["final"]["val_accuracy"] >= 0.95
    assert (result["steps"], result["epochs"], result["samples"]) == (460, 20, 20 * 1438)
    assert result["world"] == [{"step": 0, "size": 4, "reason": "start"}]
    assert not result["stopped_early"]
    # The checkpoint of the end holds what the result is about.
    state = saved(folder)
    assert state["counters"]["step"] == 460 and len(state["optimizer"]["state"]) == 6
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    # Rank 0 validates every epoch, and the others go on; so their pushes miss some updates.
    validations = [line["step"] for line in lines(folder, "validation")]
    assert validations[:20] == [23 * epoch for epoch in range(1, 21)]
    delays, leads = {}, {}
    for line in lines(folder, "exchange"):
        for kind, seen in (("delay", delays), ("staleness", leads)):
            for value, count in line.get(f"{kind}_histogram", {}).items():
                seen[int(value)] = seen.get(int(value), 0) + count
    assert sum(delays.values()) > 1000 and max(delays) > 0
    assert sum(leads.values()) > 400 and max(leads) > 0
    assert consistency == "async" or max(leads) <= 2


@pytest.mark.parametrize("consistency", ["async", pytest.param("ssp:2", marks=pytest.mark.long)])
def test_early_stopping_stops_every_worker(hpctrain, consistency):
    """A rate of nearly nothing learns nothing. Nobody waits for the pushes of one that stopped."""
    arguments, ranks = ps(2)
    hpctrain.train(
        *("digits", "--lr", "1e-12", "--epochs", 10000, "--set", "train.patience=3"),
        *("--out", "run", "--consistency", consistency, *arguments, *QUIET),
        ranks=ranks,
    )
    result = result_of(hpctrain.folder / "run")
    assert result["stopped_early"] and result["epochs"] == 4


def kill_everything(process):
    """SIGKILL to the launcher and to every process it started, at once."""
    launcher = psutil.Process(process.pid)
    everybody = [*launcher.children(recursive=True), launcher]
    for one in everybody:
        one.suspend()
    for one in everybody:
        one.kill()
    psutil.wait_procs(everybody, timeout=SECONDS)


def test_killed_and_resumed_by_others(hpctrain):
    """Whatever strategy goes on, and in whatever world: it ends where one process ends."""
    fixed = (
        *("--epochs", 4, "--dtype", "float64", "--seed", 5, *QUIET),
        *("--set", "checkpoint.every_steps=10"),
    )
    arguments, ranks = ps(3, 2)
    held = (TASK, *slow_until("never", at=30))  # for the killer
    with hpctrain.training(*held, *fixed, *arguments, ranks=ranks) as process:
        kill_everything(process)
    fixed = ("digits", *fixed)
    assert not (hpctrain.folder / "run" / "result.json").exists()
    whole = alone(hpctrain.folder / "whole", *fixed)
    others = {"ps": ps(2, 1), "horovod": (["--strategy", "horovod"], 2), "single": ([], 0)}
    for name, (arguments, ranks) in others.items():
        folder = hpctrain.folder / name
        shutil.copytree(hpctrain.folder / "run", folder, symlinks=True)
        resumed = hpctrain.train(*fixed, *arguments, "--out", name, "--resume", "auto", ranks=ranks)
        assert "reason resumed at step" in resumed.stdout
        assert_same(saved(folder), whole)
        assert result_of(folder)["samples"] == whole["counters"]["samples"]


def test_momentum_is_taken_over(hpctrain):
    """SGD's state has no count of steps in it, unlike Adam's."""
    fixed = (
        *("digits", "--dtype", "float64", "--set", "schedule.name=constant", *QUIET),
        *("--set", "optimizer.name=sgd", "--lr", 0.05),
    )
    alone(hpctrain.folder / "run", *fixed, "--steps", 10)
    arguments, ranks = ps(2)
    hpctrain.train(
        *(*fixed, "--steps", 30, "--out", "run", "--resume", "auto", *arguments), ranks=ranks
    )
    assert_same(
        saved(hpctrain.folder / "run"), alone(hpctrain.folder / "whole", *fixed, "--steps", 30)
    )


KEY = "c0ffee" + 58 * "0"


@pytest.mark.parametrize(
    ("compression", "consistency", "settings", "least"),
    [
        pytest.param("fp16", "async", ["ps.pull_every=2"], 1.3, marks=pytest.mark.long),
        pytest.param("bf16", "backup:1", [], 1.3, marks=pytest.mark.long),
        ("int8", "sync", ["ps.pull_every=[1,2]"], 1.5),
        pytest.param("topk:0.1", "ssp:1", [], 1.5, marks=pytest.mark.long),
    ],
)
def test_learning_from_fewer_bytes(hpctrain, compression, consistency, settings, least):
    """Compressed, encrypted, and with weights pulled now and then."""
    arguments, ranks = ps(
        2, 1, *settings, "ps.shared_memory=false", f"ps.compression={compression}"
    )
    hpctrain.train(
        *("digits", "--out", "run", "--consistency", consistency, *arguments, *QUIET),
        ranks=ranks,
        env={"HPCTRAIN_PS_KEY": KEY},
    )
    folder = hpctrain.folder / "run"
    assert result_of(folder)["metrics"]["final"]["val_accuracy"] >= 0.9
    assert all(line["compression"] > least for line in lines(folder, "exchange"))


WORDS = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import hpctrain
from hpctrain.data.source import ArraySource

WORDS = 20_000

class Words(hpctrain.Task):
    defaults = {"train.batch_size": 32, "train.steps": 40, "log.every_steps": 20}

    def model(self):
        table = nn.Embedding(WORDS, 16, sparse=True)
        return nn.Sequential(table, nn.Flatten(), nn.Linear(4 * 16, 3))

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["words"]), batch["label"])

    def data(self, config):
        random = np.random.default_rng(0)
        words = random.integers(0, WORDS, (640, 4))
        words[:, 0] %= 7  # some words are in many samples, and in the parts of both workers
        return {"train": ArraySource({"words": words, "label": words[:, 0] % 3})}

    def optimizer(self, model, config):
        return torch.optim.SGD(model.parameters(), lr=config.lr)
"""


def test_sparse_gradients_move_as_rows(hpctrain):
    task = hpctrain.folder / "words.py"
    task.write_text(WORDS)
    fixed = (task, "--dtype", "float64", "--lr", 0.5, *QUIET)
    single = alone(hpctrain.folder / "single", *fixed)
    # Only rows that occur are pushed, and pulled but for the first time.
    for shared_memory, least in (("true", 100), ("false", 20)):
        arguments, ranks = ps(2, 1, f"ps.shared_memory={shared_memory}")
        hpctrain.train(*fixed, "--out", shared_memory, *arguments, ranks=ranks)
        folder = hpctrain.folder / shared_memory
        assert_same(saved(folder), single)
        assert lines(folder, "exchange")[-1]["compression"] > least


WITH_A_KEY_ON_RANK_1 = """\
#!/bin/sh
if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then export HPCTRAIN_PS_KEY={key}; fi
exec "$@"
"""


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({"HPCTRAIN_PS_KEY": "ab" * 32}, "is not authentic"),
        ({}, "rank 1 sent what is no message"),
    ],
    ids=["two keys", "one key"],
)
def test_another_key_on_one_rank(hpctrain, common, message):
    wrapper = hpctrain.folder / "wrapper"
    wrapper.write_text(WITH_A_KEY_ON_RANK_1.format(key=KEY))
    wrapper.chmod(0o755)
    arguments, ranks = ps(2)
    result = run(
        [*hpctrain.prefix(ranks), str(wrapper), "hpctrain", "train", "digits"]
        + [str(argument) for argument in arguments],
        timeout_seconds=SECONDS,
        cwd=hpctrain.folder,
        env={**os.environ, **common},
    )
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stdout
    # Both ends of a link notice; the launcher may end one before it has said so.
    lines = [line for line in result.stdout.splitlines() if line.startswith("hpctrain: error:")]
    assert lines and all("give every rank the same key" in line for line in lines), result.stdout
    assert any(message in line for line in lines), result.stdout


OTHER_OPTIMIZER = """
import torch
from hpctrain.tasks.digits import Digits

class Mine(Digits):
    def optimizer(self, model, config):
        return torch.optim.RMSprop(model.parameters())
"""


@pytest.mark.parametrize(
    ("task", "workers", "servers", "settings", "message"),
    [
        ("digits", 0, 2, [], "too few ranks: 2, with 2 to serve and at least one to work"),
        ("digits", 1, 1, ["ps.shares=[1,2]"], "[1, 2] does not divide batches among 1"),
        ("mine.py:Mine", 1, 1, [], "no rule for the optimizer RMSprop"),
    ],
)
def test_said_once_by_several_ranks(hpctrain, task, workers, servers, settings, message):
    (hpctrain.folder / "mine.py").write_text(OTHER_OPTIMIZER)
    arguments, ranks = ps(workers, servers, *settings)
    assert message in complaint(hpctrain("train", task, *arguments, ranks=ranks))


MISTAKES = [
    ([], "too few ranks: 1"),
    (["ps.consistency=spp:3"], "there is no consistency 'spp:3'"),
    (["ps.consistency=backup:1"], "1 workers cannot go on without 1 of them"),
    (["ps.replicas=1"], "1 replicas need more than 1 servers"),
    (["ps.compression=topk:2"], "codec 'topk:2' does not say which fraction"),
    (["ps.key_file=key"], "the key file key is open to others than its owner (mode 640)"),
]


def test_one_line(hpctrain):
    """One process is enough where it both serves and works."""
    (hpctrain.folder / "key").write_text(KEY)
    (hpctrain.folder / "key").chmod(0o640)
    every = hpctrain.each(
        ["train", "digits", *ps(1, 1, *settings, *(["ps.colocate=true"] if settings else []))[0]]
        for settings, _ in MISTAKES
    )
    for result, (_, message) in zip(every, MISTAKES, strict=True):
        assert message in complaint(result), result.args


def test_mpi_that_sees_other_ranks(hpctrain):
    """horovodrun --gloo starts processes that do not meet by MPI."""
    arguments, ranks = ps(1)
    result = hpctrain("train", "digits", *arguments, ranks=ranks, launcher="horovodrun --gloo")
    assert result.returncode == 2, result.stdout
    assert "hpctrain: error: 2 ranks were started, but MPI sees 1" in result.stdout
    assert "Traceback" not in result.stdout


def test_an_exception_on_one_worker_ends_the_run(hpctrain):
    (hpctrain.folder / "mine.py").write_text(RAISES_ON_RANK_1)
    arguments, ranks = ps(2, 1, "ps.consistency=async")
    result = hpctrain("train", "mine.py:Mine", "--out", "run", *arguments, ranks=ranks)
    assert result.returncode == 1, result.stdout
    assert "RuntimeError: boom on rank 1" in result.stdout
    assert not (hpctrain.folder / "run" / "result.json").exists()
