"""A rank of plain Horovod whose cycles are longer than anybody waits; for `test_horovod.py`.

Whatever does not wake Horovod's background thread makes it hang. Arguments: how often it starts
Horovod, and on how many ranks.
"""

import os
import random
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch


def switches():
    """How often each thread but the main one has left its core."""
    found = {}
    for status in Path("/proc/self/task").glob("*/status"):
        if status.parent.name != str(os.getpid()):
            lines = status.read_text().splitlines()
            found[status] = [line for line in lines if "ctxt_switches" in line]
    return found


def exchange(turn):
    """Tensors in flight together, in an order and at times of the rank's own."""
    order = random.Random(100 * turn + hvd.rank())
    handles = {}
    for number in order.sample(range(20), 20):
        if order.random() < 0.3:
            time.sleep(order.random() / 100)
        tensor = torch.full((1 + 50 * number,), float(hvd.rank() + number))
        handles[number] = hvd.allreduce_async(tensor, op=hvd.Sum, name=f"tensor.{number}")
    for number, handle in handles.items():
        assert hvd.synchronize(handle).eq(sum(r + number for r in range(hvd.size()))).all()


def once(world_sets):
    """Each kind of collective."""
    rank, size = hvd.rank(), hvd.size()
    for turn in range(4):  # what the first one negotiates, later ones have in a cache
        exchange(turn)
        rows = hvd.allgather(torch.full((rank + turn, 2), rank), name="rows")
        assert rows[:, 0].tolist() == [r for r in range(size) for _ in range(r + turn)]
        assert hvd.broadcast(torch.tensor(rank), size - 1, name="root").item() == size - 1
        assert hvd.alltoall(torch.full((size,), rank), name="all").tolist() == list(range(size))
        scattered = hvd.reducescatter(torch.full((size,), rank), op=hvd.Sum, name="scattered")
        assert scattered.tolist() == [sum(range(size))]
        group = [torch.ones(3), torch.ones(4)]
        assert hvd.grouped_allreduce(group, op=hvd.Sum, name="group")[1].eq(size).all()
        hvd.barrier()
    own = world_sets[rank]
    for _ in range(3):
        assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="own", process_set=own).item() == 1
    hvd.barrier()
    for _ in range(rank):  # ranks that have joined take part in what others still exchange
        hvd.allreduce(torch.ones(5), op=hvd.Sum, name="uneven")
    hvd.join()


times, ranks = map(int, sys.argv[1:])
if times > 1:  # else it is Horovod that starts MPI, and ends it
    from mpi4py import MPI  # noqa: F401
for _ in range(times):
    world_sets = [hvd.ProcessSet([r]) for r in range(ranks)]
    hvd.init(process_sets=world_sets)
    once(world_sets)
    before = None
    # The thread sleeps: nothing is enqueued. (A thread of Gloo never sleeps for long.)
    while not hvd.gloo_enabled() and before != (now := switches()):
        before = now
        time.sleep(0.1)
    hvd.barrier()
    hvd.shutdown()
print("all is done", flush=True)
