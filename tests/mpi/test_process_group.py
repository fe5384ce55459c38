"""torch.distributed over MPI: every operation beside its definition, and what builds on it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hpctrain.errors import Error
from tests.waiting import SECONDS

MOVED = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex128,
]
REDUCED = [t for t in MOVED if t not in (torch.bool, torch.float8_e4m3fn)]


@pytest.fixture(scope="module", autouse=True)
def group(strategy):
    """The default group, beside Horovod in one process."""
    from hpctrain import distributed

    distributed.init_process_group(timeout_seconds=SECONDS)
    yield
    dist.destroy_process_group()


@pytest.fixture
def me(world):
    return world.rank


@pytest.fixture
def size(world):
    return world.size


def values(rank, dtype, shape=(3, 4)):
    """Small whole numbers, which every type of 8 bits and more holds, sums of them too."""
    numbers = torch.arange(rank, rank + torch.Size(shape).numel()).reshape(shape) % 4
    return (numbers % 2 == 0) if dtype == torch.bool else numbers.to(dtype)


def strided(tensor):
    """The same values in another order of memory."""
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", REDUCED, ids=str)
@pytest.mark.parametrize("layout", [lambda t: t, strided], ids=["dense", "strided"])
def test_all_reduce(me, size, dtype, layout):
    all_ = torch.stack([values(r, dtype) for r in range(size)])
    operations = {"SUM": all_.sum(0).to(dtype)}
    if not dtype.is_complex:  # torch itself refuses all others of these
        operations |= {"PRODUCT": all_.prod(0).to(dtype), "MAX": all_.amax(0), "MIN": all_.amin(0)}
    for name, expected in operations.items():
        tensor = layout(values(me, dtype))
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, name))
        assert torch.equal(tensor, expected), name
    if dtype.is_floating_point:
        tensor = layout(values(me, dtype))
        dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        expected = all_.to(torch.float64).mean(0).to(dtype)
        torch.testing.assert_close(tensor, expected)


def test_truth_and_bits(me, size):
    flags = torch.tensor([me == 0, True, False])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    assert flags.tolist() == [True, True, False]
    flags = torch.tensor([me == 0, True, False])
    dist.all_reduce(flags, op=dist.ReduceOp.PRODUCT)
    assert flags.tolist() == [size == 1, True, False]
    bits = torch.tensor([1 << me])
    dist.all_reduce(bits, op=dist.ReduceOp.BOR)
    assert bits.item() == (1 << size) - 1
    for op, tensor in (
        (dist.ReduceOp.AVG, torch.ones(1, dtype=torch.int64)),
        (dist.ReduceOp.BAND, torch.ones(1)),
    ):
        with pytest.raises(Error, match="not among the reductions"):
            dist.all_reduce(tensor, op=op)


def test_sums_of_16_bit_floats_are_rounded_once(me, size):
    tensor = torch.full((8,), 256.0 if me == 0 else 0.5, dtype=torch.bfloat16)
    dist.all_reduce(tensor)
    expected = torch.tensor(256.0 + 0.5 * (size - 1)).to(torch.bfloat16)
    assert torch.equal(tensor, expected.expand(8))


@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize("layout", [lambda t: t, strided], ids=["dense", "strided"])
def test_movements(me, size, dtype, layout):
    mine, others = layout(values(me, dtype)), [values(r, dtype) for r in range(size)]
    for root in range(size):
        tensor = layout(values(me, dtype))
        dist.broadcast(tensor, root)
        same([tensor], [others[root]])

    found = [layout(torch.empty_like(mine)) for _ in range(size)]
    dist.all_gather(found, mine)
    same(found, others)
    whole = torch.empty(size * 3, 4, dtype=dtype)
    dist.all_gather_into_tensor(whole, mine)
    same(whole.chunk(size), others)
    for root in range(size):
        found = [torch.empty_like(mine) for _ in range(size)] if me == root else None
        dist.gather(mine, found, root)
        if me == root:
            same(found, others)
        part = layout(torch.empty_like(mine))
        dist.scatter(part, others if me == root else None, root)
        same([part], [others[me]])


def test_reduce_to_a_root(me, size):
    for root in range(size):
        tensor = torch.tensor([me + 1.0])
        dist.reduce(tensor, root)
        assert tensor.item() == (size * (size + 1) / 2 if me == root else me + 1.0)


def test_reduce_scatter(me, size):
    pieces = [torch.full((r + 1,), float(me * 10 + r)) for r in range(size)]  # of uneven sizes
    found = torch.empty(me + 1)
    dist.reduce_scatter(found, pieces)
    assert found.tolist() == [sum(r * 10 + me for r in range(size))] * (me + 1)
    for dtype in (torch.float64, torch.bfloat16):
        whole = torch.arange(size * 2, dtype=dtype) + me
        part = torch.empty(2, dtype=dtype)
        dist.reduce_scatter_tensor(part, whole, op=dist.ReduceOp.AVG)
        expected = torch.arange(size * 2, dtype=torch.float64) + (size - 1) / 2
        assert part.to(torch.float64).tolist() == expected.chunk(size)[me].tolist()


def test_all_to_all(me, size):
    sent = torch.arange(size).repeat_interleave(torch.arange(size) + 1) + 10.0 * me
    received = torch.empty(size * (me + 1))
    dist.all_to_all_single(received, sent, [me + 1] * size, [r + 1 for r in range(size)])
    expected = torch.cat([torch.full((me + 1,), 10.0 * r + me) for r in range(size)])
    assert torch.equal(received, expected)
    equal = torch.empty(size, 2)
    dist.all_to_all_single(equal, torch.full((size, 2), float(me)))
    assert torch.equal(equal, torch.arange(float(size))[:, None].expand(size, 2))
    into = [torch.empty(r + 1, me + 1) for r in range(size)]
    dist.all_to_all(into, [torch.full((me + 1, r + 1), float(me)) for r in range(size)])
    assert [t.mean().item() for t in into] == [float(r) for r in range(size)]


def test_messages(me, size):
    after, before = (me + 1) % size, (me - 1) % size
    for length in (0, 1, 200_000):  # above the eager limit, too
        mine, its = torch.full((length,), float(me)), torch.empty(length)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, its, before)]
        )
        for work in works:
            work.wait()
        assert torch.equal(its, torch.full((length,), float(before)))
    if me == 0:
        seen = set()
        for _ in range(size - 1):
            tensor = torch.empty(1)
            dist.recv(tensor)
            seen.add(int(tensor))
        assert seen == set(range(1, size))
    else:
        dist.send(torch.tensor([float(me)]), 0)


def test_nothing_at_all(me, size):
    tensor = torch.empty(0, 3)
    dist.all_reduce(tensor)
    dist.broadcast(tensor, 0)
    whole = torch.empty(0, 3)
    dist.all_gather_into_tensor(whole, tensor)
    dist.barrier()


def test_groups_and_objects(me, size):
    pairs = [dist.new_group([first, first + 1]) for first in range(size - 1)]
    for first, pair in enumerate(pairs):
        if me in (first, first + 1):
            tensor = torch.tensor([float(me)])
            dist.all_reduce(tensor, group=pair)
            assert tensor.item() == 2 * first + 1
            assert dist.get_process_group_ranks(pair) == [first, first + 1]
    found = [None] * size
    dist.all_gather_object(found, {"rank": me, "text": "x" * me})
    assert [each["rank"] for each in found] == list(range(size))
    told = [{"from": 0}] if me == 0 else [None]
    dist.broadcast_object_list(told, 0)
    assert told == [{"from": 0}]


def test_shapes_that_do_not_fit_are_refused(me, size):
    with pytest.raises(Error, match="do not fit"):
        dist.all_gather_into_tensor(torch.empty(size * 3 + 1), torch.empty(3))
    with pytest.raises(Error, match="do not fit"):
        dist.all_to_all_single(torch.empty(size), torch.empty(size), [1] * size, [2] * size)


def test_exchanges_move_on_while_nobody_waits(me, size):
    """An exchange above the eager limit ends without a call of this rank's."""
    work = dist.all_reduce(torch.ones(1_000_000), async_op=True)
    seen = []
    work.get_future().then(lambda future: seen.append(future.value()[0][0].item()))
    work.wait()
    assert seen == [size]


def network(seed=3):
    torch.manual_seed(seed)
    parts = [nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)]
    return nn.Sequential(*parts).double()


def batches(steps=8, rows=24):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randn(rows, 3, generator=generator, dtype=torch.float64)


def trained(model, mine=lambda x: x, clip=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(mine(x)), mine(y)).backward()
        if clip:
            clip(model)
        optimizer.step()
    return model


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


@pytest.fixture(scope="module")
def truth():
    return {name: p.detach() for name, p in trained(network(), clip=clip).named_parameters()}


def assert_same(found, truth):
    for name, parameter in truth.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-12, atol=1e-12)


def test_distributed_data_parallel(me, size, truth):
    model = nn.parallel.DistributedDataParallel(network(), bucket_cap_mb=0.001)
    trained(model, lambda t: t.chunk(size)[me], clip)
    assert_same(dict(model.module.named_parameters()), truth)


def test_fully_sharded(me, size, truth):
    from torch.distributed.device_mesh import init_device_mesh

    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    mesh = init_device_mesh("cpu", (size,))
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    trained(model, lambda t: t.chunk(size)[me], clip)
    assert_same({n: p.full_tensor().detach() for n, p in model.named_parameters()}, truth)


def test_tensor_parallel(me, size, truth):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (size,))
    model = parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    def clip_both(model):
        """Some parameters are in pieces and others whole, which torch refuses to clip together."""
        gradients = [p.grad for p in model.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in whole]))
        for gradient in gradients:
            gradient.mul_((0.5 / (norm + 1e-6)).clamp(max=1.0))

    trained(model, clip=clip_both)
    found = {
        n: p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach()
        for n, p in model.named_parameters()
    }
    assert_same(found, truth)


def test_pipeline(me, size):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    plain = network()
    layers = list(network())
    cuts = [len(layers) * r // size for r in range(size + 1)]
    stage = nn.Sequential(*layers[cuts[me] : cuts[me + 1]])
    schedule = Schedule1F1B(
        PipelineStage(stage, me, size, torch.device("cpu")), 4, loss_fn=nn.functional.mse_loss
    )
    mine = torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9)
    its = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        mine.zero_grad()
        its.zero_grad()
        if me == 0:
            schedule.step(x) if size > 1 else schedule.step(x, target=y)
        elif me == size - 1:
            schedule.step(target=y)
        else:
            schedule.step()
        nn.functional.mse_loss(plain(x), y).backward()
        mine.step()
        its.step()
    expected = nn.Sequential(*list(plain)[cuts[me] : cuts[me + 1]])
    for found, parameter in zip(stage.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, parameter, rtol=1e-12, atol=1e-12)
