"""What `hpctrain init` writes: a task, a configuration and a job, which train as they are."""

from __future__ import annotations

import re
from pathlib import Path

from hpctrain.errors import Error

TASK = '''\
"""A task for hpctrain: what to train. Replace what is marked with REPLACE.

    hpctrain train --config {config} --dry-run     # does all of it work?
    hpctrain train --config {config}               # here, in one process
    mpirun -np 2 hpctrain train --config {config}  # on two ranks, over Horovod
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import hpctrain


@dataclass
class {name}(hpctrain.Task):
    """Two spirals in the plane."""

    # Knobs of your own: --set options.width=128, or [options] in {config}.
    width: int = 64

    # The validation metric that picks the best checkpoint, and whether more of it is better.
    monitor, mode = "accuracy", "max"

    def data(self, config):
        # REPLACE: arrays or tensors by field, a row a sample. Or leave this method out, and give
        # --data DIR: a shard set that `hpctrain data import` made of your files.
        draw = np.random.default_rng(0)
        turns = draw.uniform(0.5, 3.0, size=2000)
        label = draw.integers(2, size=2000)
        angle = np.pi * (turns + label)
        x = turns[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        x += draw.normal(scale=0.05, size=x.shape)
        # {config} divides it into training and validation.
        return {{"train": {{"x": x, "label": label}}}}

    def transform(self, batch, training):
        # REPLACE: decoding, scaling and, where `training`, augmentation. It runs in the background.
        return batch.replace(x=batch["x"].float())

    def model(self):
        # REPLACE: any torch.nn.Module, on the CPU; it is moved where it has to be.
        return nn.Sequential(
            nn.Linear(2, self.width),
            nn.Tanh(),
            nn.Linear(self.width, self.width),
            nn.Tanh(),
            nn.Linear(self.width, 2),
        )

    def loss(self, model, batch):
        # REPLACE: the mean over the batch's samples, and other means by name.
        scores = model(batch["x"])
        accuracy = (scores.argmax(1) == batch["label"]).float().mean()
        return F.cross_entropy(scores, batch["label"]), {{"accuracy": accuracy}}

    def predictions(self, model, batch):
        # What `hpctrain predict` writes, and metrics() of a whole set are made of.
        return {{"score": torch.softmax(model(batch["x"]), dim=1)[:, 1]}}
'''

CONFIG = """\
# `hpctrain config {task}` lists every key, with its meaning.
task = "{task}"

[data]
# Delete this line where data() gives "validation" itself.
split = {{train = 0.8, validation = 0.2, by = "stratified", column = "label"}}

[train]
epochs = 20
batch_size = 64  # over all ranks together
# clip_norm = 1.0
# patience = 5  # validations without a better one, after which to stop

[optimizer]
name = "adamw"  # or any of torch.optim, such as "RMSprop"
lr = 0.01
weight_decay = 0.01

[schedule]
name = "cosine"  # or any of torch.optim.lr_scheduler
warmup_epochs = 1.0

[log]
every_steps = 25
"""

JOB = """\
#!/bin/bash
# A job for Slurm: sbatch {job}
# `hpctrain submit --config {config} --nodes 2` submits one that also has itself started again.
#SBATCH --job-name={stem}
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
# With GPUs, as many on each node as ranks:
##SBATCH --gpus-per-node=1

# What it takes here to find hpctrain and MPI, such as:
# module load openmpi
# source "$HOME/venv/bin/activate"

# Submitted again after a time limit, it goes on where it was.
srun --mpi=pmix hpctrain train --config {config} --out "runs/{stem}" --resume auto
"""


def write_starter(path: Path) -> list[Path]:
    """Write a task, and beside it a configuration and a job.

    Args:
        path: Of the task, such as ``my_task.py``.

    Returns:
        The files.

    Raises:
        Error: The name is none of a Python file, or a file is there already.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in write_starter(Path(folder, "spirals.py"))]
        ['spirals.py', 'run.toml', 'job.sbatch']
    """
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise Error(
            f"{path.name} is no name of a Python file that can be imported.",
            hint="letters, digits and underscores, such as my_task.py.",
        )
    config, job = path.with_name("run.toml"), path.with_name("job.sbatch")
    name = "".join(word.capitalize() for word in re.split(r"_+", path.stem))
    words = {
        "name": name if name.isidentifier() else f"Task{name}",
        "stem": path.stem,
        "task": path.name,
        "config": config.name,
        "job": job.name,
    }
    texts = {path: TASK, config: CONFIG, job: JOB}
    for file in texts:
        if file.exists():
            raise Error(f"{file} is there already.", hint="name a task in another folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            with file.open("x", encoding="utf-8") as opened:
                opened.write(text.format(**words))
    except OSError as error:
        raise Error(
            f"cannot write in {path.parent}: {error.strerror}.", hint="name another folder."
        ) from error
    return list(texts)
