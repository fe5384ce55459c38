"""Callbacks are told of events once, on their ranks; failures name them; states are resumed."""

import json
from dataclasses import dataclass, field

import pytest
import torch

from hpctrain import Callback
from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import resolve
from hpctrain.errors import Error
from hpctrain.strategies.single import Single
from hpctrain.tasks.callbacks.base import EVENTS, callbacks_of
from hpctrain.tasks.callbacks.statistics import norms
from hpctrain.train.callbacks import Callbacks
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import Silent
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.test_trainer import Line, Recorded
from tests.unit.threads import train_on_ranks


class Diary(Callback):
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def state_dict(self):
        return {"told": self.told}

    def load_state_dict(self, state):
        self.told = list(state["told"])


for event in EVENTS:

    def note(self, run, event=event):
        self.told.append([event, run.step])

    setattr(Diary, event, note)


class Everywhere(Diary):
    ranks = "all"


class WithCallbacks(Line):
    def __init__(self, *callbacks):
        self.given = callbacks

    def callbacks(self):
        return self.given

    def predictions(self, model, batch):
        return {"image": batch["x"][:, None].expand(-1, 5, -1), "guess": model(batch["x"])}


def trainer_of(tmp_path, task, strategy=None, **sections):
    config = resolve([("test", {"train": {"batch_size": 8, "epochs": 1}}), ("t", sections)])
    store = CheckpointStore(tmp_path / "run" / "checkpoints", config.checkpoint.keep)
    store.folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, task, strategy or Single(World(ALONE)), store)


def trained(tmp_path, *callbacks, recorder=None, **sections):
    trainer = trainer_of(tmp_path, WithCallbacks(*callbacks), **sections)
    trainer.restore(None)
    trainer.run(recorder or Silent())
    return trainer


def test_events_in_their_order(tmp_path):
    diary = Diary()
    trained(tmp_path, diary, log={"every_steps": 2}, train={"batch_size": 8, "epochs": 1})
    assert diary.told == [
        ["on_start", 0],
        ["on_step", 1],
        ["on_step", 2],
        ["on_log", 2],
        ["on_step", 3],
        ["on_log", 3],
        ["on_validation", 3],
        ["on_checkpoint", 3],
        ["on_end", 3],
    ]


def test_states_are_in_checkpoints_and_resume(tmp_path):
    first = Diary()
    trainer = trained(tmp_path, first)
    second = Diary()
    longer = trainer_of(tmp_path, WithCallbacks(second), train={"batch_size": 8, "epochs": 2})
    longer.restore(trainer.store.newest(print))
    assert second.told == first.told[: first.told.index(["on_checkpoint", 3])]
    longer.run(Silent())
    assert [s for e, s in second.told if e == "on_step"] == [1, 2, 3, 4, 5, 6]
    assert ["on_start", 3] in second.told


def test_ranks_and_a_stop_on_all_of_them(tmp_path):
    class Stops(Callback):
        ranks = "all"

        def on_step(self, run):
            if run.step == 2 and run.world.rank == 1:
                run.stop("enough")

    zero, everywhere = [Diary(), Diary()], [Everywhere(), Everywhere()]

    def make(strategy, rank):
        task = WithCallbacks(zero[rank], everywhere[rank], Stops())
        return trainer_of(tmp_path / str(rank), task, strategy, train={"steps": 5000})

    trainers = train_on_ranks(2, make)
    steps = {trainer.state.counters.step for trainer in trainers}
    assert len(steps) == 1 and 2 <= steps.pop() < 5000
    assert all(trainer.state.counters.stopped_early for trainer in trainers)
    assert zero[1].told == [] and everywhere[0].told == everywhere[1].told == zero[0].told


@pytest.mark.parametrize("event", ["on_start", "on_step", "on_validation", "on_end"])
def test_a_failure_names_callback_event_step_and_rank(tmp_path, capfd, event):
    def fails(self, run):
        raise KeyError("gone")

    kind = type("Fails", (Callback,), {event: fails})
    with pytest.raises(Error) as caught:
        trained(tmp_path, kind())
    step = {"on_start": 0, "on_step": 1}.get(event, 3)
    where = f"'Fails' failed in {event}() at step {step} on rank 0: KeyError: 'gone'"
    assert where in str(caught.value)
    shown = capfd.readouterr().err
    assert "in fails" in shown and "_guarded" not in shown


def test_what_is_done_again_is_told_once():
    class View:
        step, model = 4, None
        world = type("W", (), {"rank": 1})()
        reason = ""

    diary, everywhere, view = Diary(), Everywhere(), View()
    callbacks = Callbacks({"a": diary, "b": everywhere}, view)
    callbacks.start()
    for _ in range(2):
        callbacks.tell("on_step")
        callbacks.tell("on_log")
    assert diary.told == []
    assert everywhere.told == [["on_start", 4], ["on_step", 4], ["on_log", 4]]
    joined = Everywhere()
    newcomer = Callbacks({"a": Diary(), "b": joined}, view)
    newcomer.take_over(json.loads(json.dumps(callbacks.share())))
    newcomer.tell("on_step")
    assert [told for told in joined.told if told[0] == "on_step"] == [["on_step", 4]]
    view.step, view.world.rank = 5, 0  # the first rank is lost
    callbacks.tell("on_step")
    assert diary.told == [["on_start", 5], ["on_step", 5]]


@dataclass
class Odd(Callback):
    by: float
    hidden: int = field(default=3, init=False)

    def on_epoch(self, run):
        """No event."""


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("statistic", "did you mean 'statistics'?"),
        ("summary,depth=2", "has no option 'depth'. HINT: it has none."),
        ("profiler,step=2", "has no option 'step'. HINT: did you mean 'steps'?"),
        ("profiler,steps=some", "steps = 'some'"),
        ("profiler,steps", "'steps' is not option=value"),
        ("time-budget", "minutes: Field required"),
        (f"{__name__}:Odd,by=1", "defines on_epoch(), which nothing calls. HINT: did you mean"),
        (f"{__name__}:Odd,hidden=1,by=1", "has no option 'hidden'"),
        ("fractions:Fraction", "derive its class from hpctrain.Callback"),
    ],
)
def test_what_is_no_callback(spec, said):
    config = resolve([("test", {"train": {"callbacks": [spec]}})])
    with pytest.raises(Error) as caught:
        callbacks_of(Line(), config)
    assert said in str(caught.value)


def test_statistics(tmp_path):
    recorder = Recorded()
    trainer = trained(
        tmp_path, recorder=recorder, train={"callbacks": ["statistics,every_steps=3"]}
    )
    lines = [(step, values) for kind, step, values in recorder.lines if kind == "statistics"]
    assert [step for step, _ in lines] == [3]
    assert lines[0][1] == norms(trainer.state.model)
    for name, parameter in trainer.state.model.named_parameters():
        assert lines[0][1][f"weight_norm/{name}"] == pytest.approx(parameter.norm().item())
        assert lines[0][1][f"grad_norm/{name}"] == pytest.approx(parameter.grad.norm().item())


def test_summary_samples_and_profile(tmp_path):
    trained(
        tmp_path,
        train={"callbacks": ["summary", "samples,count=3", "profiler,after=0,steps=2"]},
        log={"profile": True},
    )
    out = tmp_path / "run"
    assert "1: LayerNorm  6 parameters" in (out / "model.txt").read_text()
    assert len((out / "samples" / "step-000003.txt").read_text().splitlines()) == 3
    assert (out / "samples" / "step-000003-image.png").read_bytes().startswith(b"\x89PNG")
    traces = [path.name for path in (out / "profile").iterdir()]
    assert traces == ["rank-0-step-2.json"]  # the second profiler's turn never came
    assert json.loads((out / "profile" / traces[0]).read_text())["traceEvents"]


def test_a_time_budget_counts_over_launches(tmp_path):
    recorder = Recorded()
    recorder.said = []
    recorder.say = recorder.said.append
    trainer = trainer_of(tmp_path, Line(), train={"callbacks": ["time-budget,minutes=10"]})
    trainer.restore(None)
    view = trainer._parts.callbacks
    view.load_state_dict({"time-budget": {"seconds": 601.0}})
    trainer.run(recorder)
    assert trainer.state.counters.step == 1 and trainer.state.counters.stopped_early
    assert any("stopped early at step 1: the time budget of 10" in line for line in recorder.said)
    assert trainer.store.newest(print)["callbacks"]["time-budget"]["seconds"] > 601


def test_nothing_is_changed_by_those_that_look(tmp_path):
    plain = trained(tmp_path / "a")
    watched = trained(tmp_path / "b", train={"callbacks": ["statistics,every_steps=1", "samples"]})
    pairs = zip(plain.state.model.parameters(), watched.state.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
