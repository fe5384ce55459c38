"""A worker of stock elastic Horovod, as its documentation has it; elastic_hosts.py starts them.

    python -m benchmarks.elastic_stock '{"task": "digits", "rank_batch_size": 8, ...}'

https://horovod.readthedocs.io/en/stable/elastic_include.html. The model, loss, data and global
batch are those of hpctrain's run beside it, and the samples and the times of its steps are written
down in the same way.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import horovod.torch as hvd
import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.elastic_tasks import Times
from hpctrain.config import DataConfig
from hpctrain.data.batch import Batch
from hpctrain.data.order import EpochOrder
from hpctrain.tasks.task import load_task
from hpctrain.train.sample_trace import SampleTrace

LR = 0.01
COMMIT_STEPS = 5


class Job(NamedTuple):
    """What the workers train.

    Attributes:
        task: A ready one.
        data: Its shards, or None.
        rank_batch_size: Samples of a rank's step.
        steps: Of the run.
        out: The run folder.
    """

    task: str
    data: str | None
    rank_batch_size: int
    steps: int
    out: str


def main() -> None:
    """Train what the command line says, as JSON."""
    options = Job(**json.loads(sys.argv[1]))
    out = Path(options.out)
    hvd.init()
    torch.manual_seed(0)
    task = load_task(options.task)()
    source = task.data(DataConfig(path=options.data and Path(options.data)))["train"]
    # Horovod's broadcast refuses the channels-last layout that the task likes best.
    model = task.model().to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR * hvd.size(), momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(source)
    loader = DataLoader(
        range(len(source)),  # type: ignore[arg-type]
        options.rank_batch_size,
        sampler=sampler,
        collate_fn=np.array,
    )
    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, step=0)

    def on_reset() -> None:
        for group in optimizer.param_groups:
            group["lr"] = LR * hvd.size()

    state.register_reset_callbacks([on_reset])
    number = int(os.uname().nodename.lstrip("n"))  # one worker a host
    times, ledger = Times(out, hvd.rank()), SampleTrace(out, number, 0)
    formed = 0  # how often a world was

    @hvd.elastic.run
    def train(state: Any) -> None:
        nonlocal formed
        cards = hvd.allgather_object((number, formed))
        members, generation = [card[0] for card in cards], max(card[1] for card in cards)
        formed = generation + 1
        while True:
            order = EpochOrder(len(source), 0, sampler.epoch, "none")
            for numbers in loader:
                fields = {name: torch.from_numpy(x) for name, x in source.take(numbers).items()}
                start = sampler.processed_num
                batch = Batch(
                    fields,
                    order=order,
                    start=start,
                    stop=min(start + len(numbers) * hvd.size(), len(source)),
                    positions=numbers.astype(np.uint64),
                    world_size=hvd.size(),
                )
                ledger.begin(state.step + 1, generation, sampler.epoch, batch)
                optimizer.zero_grad()
                loss = task.loss(model, task.transform(batch, True))
                (loss[0] if isinstance(loss, tuple) else loss).backward()
                optimizer.step()
                times.step()
                state.step += 1
                sampler.record_batch(0, len(numbers))
                ledger.end(state.step, generation, members)
                if state.step % COMMIT_STEPS == 0:
                    state.commit()
                if state.step >= options.steps:
                    return
            sampler.set_epoch(sampler.epoch + 1)
            state.commit()

    train(state)
    if hvd.rank() == 0:
        result = {"steps": state.step, "size": hvd.size()}
        (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
