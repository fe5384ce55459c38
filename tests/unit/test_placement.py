"""Placement: even, the same everywhere, and little moves when servers come and go."""

import math
import os
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import Error, PeerLost
from hpctrain.ps.partition.placement import place, without

KIB, MIB = 2**10, 2**20
RESNET50 = 25_557_032 * 4  # bytes
SERVERS = range(2, 17)

SIZES = st.lists(st.integers(1, 3 * MIB), max_size=40)
IDENTITIES = st.lists(st.integers(0, 2**40), min_size=2, max_size=8, unique=True)
METHODS = st.sampled_from(["hash", "greedy"])


def cut(size, total=RESNET50):
    return [size] * (total // size) + [total % size] * (total % size > 0)


def balance(placement, sizes, servers, members=slice(0, 1)):
    """The largest load over the mean."""
    loads = dict.fromkeys(servers, 0)
    for size, group in zip(sizes, placement, strict=True):
        for server in group[members]:
            loads[server] += size
    return max(loads.values()) / statistics.mean(loads.values())


def moved(before, after, sizes):
    """The part of the bytes whose primary is another one."""
    moves = zip(sizes, before, after, strict=True)
    return sum(size for size, old, new in moves if old[0] != new[0]) / sum(sizes)


def churn(sizes, servers, method):
    """The part of the bytes that one server less (or more) moves, on average."""
    before = place(sizes, range(servers), method=method)
    return statistics.mean(
        moved(before, place(sizes, [s for s in range(servers) if s != lost], method=method), sizes)
        for lost in range(servers)
    )


@pytest.mark.parametrize("size", [512 * KIB, 256 * KIB])
def test_primaries_and_replicas_are_even(size):
    sizes = cut(size)
    for servers in SERVERS:
        placement = place(sizes, range(servers), replicas=1)
        assert balance(placement, sizes, range(servers)) <= 1.1
        # Replicas have to be spread over two things at once, and give way by a slice or two.
        slack = 1.1 + size * servers / sum(sizes)
        assert balance(placement, sizes, range(servers), slice(1, 2)) <= slack


def test_large_slices_are_as_even_as_they_can_be():
    """98 slices of 1 MiB on 16 servers: some server has 7, and that is 15% above the mean."""
    sizes = cut(MIB)
    for servers in SERVERS:
        fewest = math.ceil(sum(sizes) // MIB / servers) * MIB * servers / sum(sizes)
        assert balance(place(sizes, range(servers)), sizes, range(servers)) <= max(1.1, fewest)


@pytest.mark.parametrize("size", [512 * KIB, 256 * KIB])
def test_one_server_less_moves_its_part(size):
    sizes = cut(size)
    ratios = [churn(sizes, servers, "hash") * servers for servers in SERVERS]
    assert max(ratios) <= 1.6
    assert 1 <= statistics.mean(ratios) <= 1.3


def test_greedy_is_even_and_moves_most():
    sizes = cut(256 * KIB)
    for servers in SERVERS:
        placement = place(sizes, range(servers), method="greedy")
        assert balance(placement, sizes, range(servers)) <= 1.03
    assert churn(sizes, 8, "greedy") > 0.7


def test_slices_of_many_sizes():
    """As of tensors: a few large ones, and many as small as a bias."""
    sizes = [*cut(MIB), *[300 * KIB] * 40, *[512] * 100, 4]
    for servers in SERVERS:
        assert balance(place(sizes, range(servers)), sizes, range(servers)) <= 1.1


def test_the_same_everywhere():
    program = (
        "from hpctrain.ps.partition.placement import place, without\n"
        "p = place([9, 5, 5, 3] * 20, [70, 3, 2**33, 5, 11], replicas=2)\n"
        "print(p, without(p, [9, 5, 5, 3] * 20, 3, [70, 2**33, 5, 11]))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in "12"
    }
    assert len(seen) == 1
    assert place([4, 3, 2, 1], [7, 0, 9], replicas=1) == ((7, 0), (9, 7), (0, 9), (9, 0))


@given(sizes=SIZES, servers=IDENTITIES, method=METHODS, data=st.data())
def test_groups(sizes, servers, method, data):
    replicas = data.draw(st.integers(0, len(servers) - 1))
    placement = place(sizes, servers, method=method, replicas=replicas)
    assert len(placement) == len(sizes)
    for group in placement:
        assert len(group) == len(set(group)) == 1 + replicas
        assert set(group) <= set(servers)
    shuffled = data.draw(st.permutations(servers))
    assert place(sizes, shuffled, method=method, replicas=replicas) == placement


@given(sizes=SIZES, servers=IDENTITIES, method=METHODS, data=st.data())
def test_losing_servers_one_by_one(sizes, servers, method, data):
    """With a replica each, whoever is lost next, and until one is left."""
    width = data.draw(st.integers(2, len(servers)))
    placement = place(sizes, servers, method=method, replicas=width - 1)
    while len(servers) > 1:
        lost = data.draw(st.sampled_from(servers))
        servers = [server for server in servers if server != lost]
        after = without(placement, sizes, lost, servers)
        for old, new in zip(placement, after, strict=True):
            kept = tuple(server for server in old if server != lost)
            assert new[: len(kept)] == kept  # the first replica is promoted, and nothing moves
            assert len(new) == len(set(new)) == min(width, len(servers))
            assert set(new) <= set(servers)
        placement = after


@pytest.mark.parametrize("method", ["hash", "greedy"])
def test_any_loss_leaves_it_even(method):
    sizes = cut(256 * KIB)
    for servers in range(3, 17):
        placement = place(sizes, range(servers), method=method, replicas=1)
        for lost in range(servers):
            others = [server for server in range(servers) if server != lost]
            after = without(placement, sizes, lost, others)
            assert balance(after, sizes, others) <= 1.12
            assert balance(after, sizes, others, slice(1, 2)) <= 1.15


def test_a_loss_without_replicas():
    placement = place([5, 6, 7], [1, 2])
    lost = placement[1][0]
    with pytest.raises(PeerLost, match=rf"server {lost} .*HINT: ps.replicas=1"):
        without(placement, [5, 6, 7], lost, [3 - lost])


@pytest.mark.parametrize(("servers", "replicas"), [([], 0), ([4], 1), ([4, 5], 2), ([4], -1)])
def test_too_few_servers(servers, replicas):
    with pytest.raises(Error, match="HINT"):
        place([1], servers, replicas=replicas)
