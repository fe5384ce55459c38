"""Compressed averages of gradients, on ranks that are threads, against what they are to be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.compression.codec import make_codec
from hpctrain.compression.compressor import Flat, Options, Piece
from hpctrain.compression.registry import make_compressor
from hpctrain.compression.states import gather_states, load_states
from hpctrain.errors import Error
from tests.unit.threads import ThreadCollectives, on_ranks

SHAPES = [("w", (12, 9)), ("b", (12,)), ("v", (7, 5)), ("c", (3,))]
"""Of the parameters in a flat."""

ANY_RATE = Options(min_rate=0.0)
LOSSY = ["int8", "topk:0.05", "topk:0.3", "powersgd:1", "powersgd:3"]
COURSE = ["step", "again", "given up", "no number"]
ALL = ["none", "fp16", "bf16", *LOSSY]


def pieces_of(shapes=SHAPES):
    pieces, start = [], 0
    for name, shape in shapes:
        stop = start + math.prod(shape)
        pieces.append(Piece(name, start, stop, shape[0] if len(shape) > 1 else 1))
        start = stop
    return pieces


def gradient(rank, step, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    size = sum(math.prod(shape) for _, shape in shapes)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def mean_gradient(size, step):
    return sum(gradient(rank, step) for rank in range(size)) / size


def averaged(compressor, world, values, shapes=SHAPES, name="flat"):
    """The values' mean, as the compressor makes it."""
    flat = Flat(name, values, pieces_of(shapes))
    exchange = compressor.average(flat, world)
    handle = next(exchange, None)
    while handle is not None:
        try:
            handle = exchange.send(world.wait(handle))
        except StopIteration:
            break
    return flat.values


def made(spec):
    return make_compressor(spec, ANY_RATE if spec.startswith("powersgd") else None)


def ranks(size, action):
    """Each rank's result; the first error of any is raised."""
    results = on_ranks(size, lambda comm: action(comm, ThreadCollectives(comm)))
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def residual_of(compressor):
    state = compressor.state_dict()["kept"]["residual"]
    return torch.cat([state[name] for name, _ in SHAPES])


def close(a, b, tolerance=1e-12):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("spec", LOSSY)
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(["step", "again", "given up", "no number"]), min_size=1, max_size=8)
)
def test_what_is_sent_and_what_is_left_is_all_there_was(spec, course):
    """Also where a step averages twice, is given up, or has no numbers on one rank."""
    size = 3

    def train(comm, world):
        compressor, sent, wanted = made(spec), 0, 0
        compressor.begin(world)
        for step, what in enumerate(course):
            mine, mean = gradient(comm.rank, step), mean_gradient(size, step)
            if what == "no number":
                mine[17] = (math.nan, 1.0, math.inf)[comm.rank]
            before = residual_of(compressor) if step else 0
            found = averaged(compressor, world, mine)
            if what == "again":
                mean = mean + mean_gradient(size, 100 + step)
                found = averaged(compressor, world, found + gradient(comm.rank, 100 + step))
            if what == "given up":
                compressor.rollback()
            else:
                compressor.commit()
            if what == "no number":
                assert not found.isfinite().all()
            if what in ("given up", "no number"):
                assert step == 0 or torch.equal(residual_of(compressor), before)
            else:
                sent, wanted = sent + found, wanted + mean
        return sent, wanted, residual_of(compressor)

    results = ranks(size, train)
    sent, wanted, _ = results[0]
    if isinstance(wanted, int):
        return
    left = sum(result[2] for result in results) / size
    assert close(sent + left, wanted)
    assert all(torch.equal(sent, other) for other, _, _ in results)
    if spec != "powersgd:3":
        assert left.norm() > 0.01  # it did leave something out


@pytest.mark.parametrize("rank", [9, 40])
def test_powersgd_of_the_matrices_own_rank_is_dense(rank):
    def train(comm, world):
        compressor = make_compressor(f"powersgd:{rank}", ANY_RATE)
        for step in range(5):
            found = averaged(compressor, world, gradient(comm.rank, step))
            compressor.commit()
            assert close(found, mean_gradient(3, step))
        return residual_of(compressor)

    assert sum(ranks(3, train)).norm() < 1e-12  # each rank's own lies outside of the mean's columns


def test_powersgd_finds_a_matrix_of_its_rank():
    def train(comm, world):
        compressor = make_compressor("powersgd:2", ANY_RATE)
        generator = torch.Generator().manual_seed(1)
        left, right = (torch.randn(12, 2, generator=generator).double() for _ in range(2))
        for step in range(3):
            whole = (left * (comm.rank + 1)) @ right.T * (step + 1)
            found = averaged(compressor, world, whole.flatten(), [("w", (12, 12))])
            compressor.commit()
            mean = left @ right.T * (step + 1) * 1.5
            assert step == 0 or close(found, mean.flatten())

    ranks(2, train)


def test_powersgd_is_its_paper_written_out():
    """Three steps with warm start, on two ranks, of one matrix."""
    shapes, rank, q = [("w", (12, 9))], 2, None
    residuals = [torch.zeros(12, 9).double() for _ in range(2)]
    expected = []
    for step in range(3):
        wanted = [gradient(r, step, shapes=shapes).view(12, 9) + residuals[r] for r in range(2)]
        if q is None:
            q = make_compressor("powersgd:2")._factor(Piece("w", 0, 108, 12), wanted[0], 2).T
        p = torch.linalg.qr(sum(m @ q for m in wanted) / 2)[0]
        own = [m.T @ p for m in wanted]
        q = sum(own) / 2
        residuals = [m - p @ each.T for m, each in zip(wanted, own, strict=True)]
        expected.append((p @ q.T).flatten())

    def train(comm, world):
        compressor = make_compressor(f"powersgd:{rank}", ANY_RATE)
        for step in range(3):
            found = averaged(compressor, world, gradient(comm.rank, step, shapes=shapes), shapes)
            compressor.commit()
            assert close(found, expected[step])

    ranks(2, train)


def test_powersgd_sends_as_it_is_what_would_not_be_smaller():
    def sent_with(options):
        def train(comm, world):
            compressor = make_compressor("powersgd:1", options)
            averaged(compressor, world, gradient(comm.rank, 0))
            return compressor.sent_bytes / 8 / 2  # values of 8 bytes, two legs, one other rank

        return ranks(2, train)[0]

    assert sent_with(Options(min_rate=0.0)) == (12 + 9) + (7 + 5) + 12 + 3
    assert sent_with(Options(min_rate=4.0)) == (12 + 9) + 35 + 12 + 3
    assert sent_with(Options(min_rate=6.0)) == 158
    assert sent_with(Options(min_rate=0.0, warmup_steps=1)) == 158


def test_all_of_topk_is_dense_bit_for_bit():
    def train(comm, world):
        compressor = make_compressor("topk:1")
        for step in range(4):
            mean = (gradient(0, step) + gradient(1, step) + gradient(2, step)) / 3
            assert torch.equal(averaged(compressor, world, gradient(comm.rank, step)), mean)
            compressor.commit()

    ranks(3, train)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("spec", "half"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_are_summed_in_float32_and_rounded_once_more(spec, half, size):
    rounded = [gradient(rank, 0, torch.float32).to(half).float() for rank in range(size)]
    total = torch.zeros_like(rounded[0])
    for each in rounded:
        total += each
    expected = (total / size).to(half).float()

    def train(comm, world):
        compressor = make_compressor(spec)
        found = averaged(compressor, world, gradient(comm.rank, 0, torch.float32))
        part = -(-len(found) // size)
        assert compressor.sent_bytes == size * world.sent == 2 * (size - 1) * 2 * part * size
        return found

    assert all(torch.equal(found, expected) for found in ranks(size, train))


def test_fp16_shows_what_it_cannot_hold():
    def train(comm, world):
        values = gradient(comm.rank, 0, torch.float32)
        values[3] = 70000.0 * (comm.rank == 1)
        return averaged(make_compressor("fp16"), world, values)

    for found in ranks(2, train):
        assert found[3] == math.inf and found.isinf().sum() == 1


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replicas_have_the_same_bits(spec, dtype):
    def train(comm, world):
        compressor = made(spec)
        found = []
        for step in range(3):
            found.append(averaged(compressor, world, gradient(comm.rank, step, dtype)))
            compressor.commit()
        return torch.cat(found)

    first, *others = ranks(3, train)
    assert first.dtype == dtype and first.isfinite().all() and first.norm() > 0
    assert all(torch.equal(first, other) for other in others)


def test_bytes_are_counted_as_they_are_sent():
    def train(comm, world):
        for spec in ALL:
            compressor, before = made(spec), world.sent
            values = averaged(compressor, world, gradient(comm.rank, 0))
            assert compressor.dense_bytes == 2 * values.nbytes * (world.size - 1)
            assert compressor.sent_bytes == (world.sent - before) * world.size, spec

    ranks(2, train)


def test_momentum_correction_is_its_paper_written_out():
    """The largest of v are sent; there u and v begin anew."""
    codec, size, momentum = make_codec("topk:0.1"), 2, 0.7
    u, v = ([torch.zeros(158).double() for _ in range(size)] for _ in range(2))
    expected = []
    for step in range(5):
        total = torch.zeros(158).double()
        for rank in range(size):
            u[rank] = momentum * u[rank] + gradient(rank, step)
            v[rank] = v[rank] + u[rank]
            largest = v[rank].abs().topk(codec._count(158)).indices
            total[largest] += v[rank][largest]
            u[rank][largest] = v[rank][largest] = 0
        expected.append(total / size)

    def train(comm, world):
        compressor = make_compressor("topk:0.1", Options(momentum=momentum))
        for step in range(5):
            found = averaged(compressor, world, gradient(comm.rank, step))
            assert close(found, expected[step])
            if step == 0:
                with pytest.raises(Error, match="averaged twice"):
                    averaged(compressor, world, gradient(comm.rank, step))
            compressor.commit()

    ranks(size, train)


def test_topk_warms_up():
    compressor = make_compressor("topk:0.01", Options(warmup_steps=2))
    counts = []
    for _ in range(4):
        counts.append(compressor._codec()._count(10000))
        compressor.commit()
    assert counts == [2500, 500, 100, 100]


@pytest.mark.parametrize("spec", ["int8", "topk:0.1", "powersgd:2"])
def test_a_part_that_is_not_used_keeps_its_residual(spec):
    def train(comm, world):
        compressor = made(spec)
        averaged(compressor, world, gradient(comm.rank, 0))
        compressor.commit()
        before = compressor.state_dict()["kept"]["residual"]
        values = averaged(compressor, world, gradient(comm.rank, 1))
        compressor.left_out(Flat("flat", values, pieces_of()), pieces_of()[0])
        compressor.commit()
        after = compressor.state_dict()["kept"]["residual"]
        assert torch.equal(after["w"], before["w"]) and not torch.equal(after["v"], before["v"])

    ranks(2, train)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("int8", Options()),
        ("topk:0.1", Options(momentum=0.5, warmup_steps=6)),
        ("powersgd:2", Options(min_rate=0.0)),
        ("powersgd:2", Options(min_rate=0.0, warm_start=False)),
    ],
)
def test_it_goes_on_from_its_state_in_other_flats(spec, options):
    """Bit for bit, as far as the flats do not decide what is sent."""
    flats = [SHAPES] if spec.startswith(("topk", "int8")) else [SHAPES[:1], SHAPES[1:]]

    def train(comm, world):
        def step(compressor, number, shapes):
            values, found, start = gradient(comm.rank, number), [], 0
            for n, part in enumerate(shapes):
                size = sum(math.prod(shape) for _, shape in part)
                piece = values[start : start + size].clone()
                found.append(averaged(compressor, world, piece, part, f"flat {n}"))
                start += size
            compressor.commit()
            return torch.cat(found)

        whole = make_compressor(spec, options)
        for number in range(3):
            step(whole, number, [SHAPES])
        states = gather_states(comm, whole)
        assert len(states) == (comm.size if comm.rank == 0 else 0)
        states = comm._exchange(states)[0]
        other = make_compressor(spec, options)
        load_states(comm, other, states)
        again = gather_states(comm, other)
        for a, b in zip(again, states if comm.rank == 0 else [], strict=True):
            for name, tensor in b["kept"]["residual"].items():
                assert torch.equal(a["kept"]["residual"][name], tensor)
        for number in range(3, 6):
            assert torch.equal(step(other, number, flats), step(whole, number, [SHAPES]))

    ranks(2, train)


@pytest.mark.parametrize("spec", ["int8", "topk:0.1", "powersgd:1"])
@pytest.mark.parametrize("size", [1, 3])
def test_another_world_still_has_to_send_the_same(spec, size):
    def before(comm, world):
        compressor = made(spec)
        for step in range(3):
            averaged(compressor, world, gradient(comm.rank, step))
            compressor.commit()
        return gather_states(comm, compressor)

    states = ranks(2, before)[0]
    left = sum(torch.cat([s["kept"]["residual"][n] for n, _ in SHAPES]) for s in states) / 2

    def after(comm, world):
        compressor = made(spec)
        load_states(comm, compressor, states)
        compressor.begin(world)
        assert compressor.steps == 3 and compressor.lost == 0
        sent = averaged(compressor, world, torch.zeros(158).double())
        compressor.commit()
        return sent, residual_of(compressor)

    results = ranks(size, after)
    assert close(results[0][0] + sum(result[1] for result in results) / size, left)


def test_residuals_go_over_to_another_compressor_or_are_counted_as_lost():
    def train(comm, world):
        compressor = make_compressor("topk:0.1")
        averaged(compressor, world, gradient(comm.rank, 0))
        compressor.commit()
        states = [compressor.state_dict()]
        other = made("powersgd:1")
        load_states(comm, other, states)
        assert torch.equal(residual_of(other), residual_of(compressor)) or not other.memories
        assert other.lost == 0
        load_states(comm, plain := make_compressor("fp16"), states)
        assert plain.lost == 1

    ranks(1, train)


def test_a_new_world_agrees_on_where_it_stands():
    """Rank 0 has made three steps, rank 1 is behind by one, rank 2 is new; a fourth was lost."""

    def train(comm, world):
        compressor = made("powersgd:1")
        alone = ThreadCollectives(comm)
        alone.size = 1
        alone.start_average = lambda tensor, name: tensor
        for step in range((3, 2, 0)[comm.rank]):
            averaged(compressor, alone, gradient(comm.rank, step))
            compressor.commit()
        compressor._met = 3 if comm.rank < 2 else 0
        before = compressor.state_dict()["kept"]["residual"]
        compressor.begin(world)
        state = compressor.state_dict()
        assert compressor.steps == 3 and not state["shared"]
        if comm.rank == 0:
            assert torch.equal(state["kept"]["residual"]["w"], before["w"])
        if comm.rank == 1:
            assert before["w"].any() and not state["kept"]["residual"]["w"].any()
        found = averaged(compressor, world, gradient(comm.rank, 4))
        return compressor.lost, found

    results = ranks(3, train)
    assert [lost for lost, _ in results] == [2, 2, 1]
    assert all(torch.equal(found, results[0][1]) for _, found in results)


def test_a_residual_of_another_size_is_refused():
    compressor = made("int8")
    compressor.load_state_dict(
        {"name": "int8", "steps": 1, "kept": {"residual": {"w": torch.zeros(5)}}, "shared": {}}
    )

    def train(comm, world):
        with pytest.raises(Error, match="the residual of 'w' has 5 values, its gradient 108"):
            averaged(compressor, world, gradient(0, 0))

    ranks(1, train)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("fp17", {}, "there is no compression 'fp17'"),
        ("topk", {}, "which fraction"),
        ("topk:2", {}, "which fraction"),
        ("powersgd", {}, "which rank"),
        ("powersgd:0", {}, "which rank"),
        ("powersgd:x", {}, "which rank"),
        ("fp16:3", {}, "nothing follows 'fp16'"),
        ("int8:3", {}, "nothing follows 'int8'"),
        ("none:3", {}, "nothing follows 'none'"),
        ("fp16", {"warmup_steps": 3}, "compression_warmup_steps = 3 means nothing"),
        ("powersgd:1", {"momentum": 0.9}, "compression_momentum = 0.9 means nothing"),
        ("topk:0.1", {"momentum": 0.9, "feedback": False}, "needs compression_feedback"),
        ("hpctrain.errors:Error", {}, "is no Compressor"),
    ],
)
def test_what_makes_no_sense_is_refused(spec, options, message):
    with pytest.raises(Error, match=message):
        make_compressor(spec, Options(**options))


def test_one_of_ones_own():
    assert make_compressor("hpctrain.compression.powersgd:PowerSgd:3").rank == 3
