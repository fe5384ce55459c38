"""The driver of ranks over Gloo: worlds, losses, keys, seats; without Horovod."""

import asyncio
import contextlib
import errno
import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.elastic.connections import connections, shut_down
from hpctrain.elastic.driver_protocol import challenge, new_key, pack, proof, proves, unpack
from hpctrain.elastic.membership import Member
from hpctrain.errors import Error
from hpctrain.launch.driver import MOST_VAIN, Driver, Rank, by_host, listen, places
from hpctrain.launch.launch import way_for
from hpctrain.launch.listener import Strangers
from hpctrain.launch.starters import Here, RankProcess, Ssh
from hpctrain.launch.worker_slots import MOST_FAILURES, WorkerSlots, place_variables
from tests.processes import ended
from tests.waiting import SECONDS, wait_until_async

KEY = new_key()
HOSTS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)


def test_proofs():
    mine, theirs = challenge(), challenge()
    given = proof(KEY, "rank", mine, theirs)
    assert proves(KEY, given, "rank", mine, theirs)
    assert not proves(KEY, given, "driver", mine, theirs)
    assert not proves(KEY, given, "rank", theirs, mine)
    assert not proves(new_key(), given, "rank", mine, theirs)
    assert not proves(KEY, None, "rank", mine, theirs)
    assert unpack(pack("beat", step=1)) == {"kind": "beat", "step": 1}
    with pytest.raises(ValueError, match="not a message"):
        unpack(b"[]\n")


@given(HOSTS)
def test_places(hosts):
    """As horovodrun has them: local ranks count a host's, cross ranks the hosts of a local rank."""
    ranks = [Rank(n, Member(n, host), [], None, 0.0, 2.0) for n, host in enumerate(hosts)]
    ordered = by_host(ranks)
    names = [rank.member.host for rank in ordered]
    assert names == [host for first in dict.fromkeys(hosts) for host in hosts if host == first]
    found = places(names)
    assert ordered[0] is ranks[0]
    for rank, place in enumerate(found):
        same = [n for n, host in enumerate(names) if host == names[rank]]
        assert place[:4] == (rank, len(names), same.index(rank), len(same))
        cross = [n for n, other in enumerate(found) if other.local_rank == place.local_rank]
        assert place[4:] == (cross.index(rank), len(cross))


class Worker:
    """A rank's side of the connection, by hand."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def join(cls, port, seat, key=KEY, hang_seconds=SECONDS):
        self = cls(*await asyncio.open_connection("127.0.0.1", port))
        theirs, mine = (await self.read("who"))["challenge"], challenge()
        self.send("hello", challenge=mine, proof=proof(key, "rank", theirs, mine), seat=seat,
                  host="a", identity=[seat, 0, 0, 0], hang_seconds=hang_seconds)  # fmt: skip
        assert proves(key, (await self.read("known"))["proof"], "driver", theirs, mine)
        return self

    def send(self, kind, **values):
        self.writer.write(pack(kind, **values))

    async def read(self, kind):
        """The next message of a kind."""
        while True:
            line = await asyncio.wait_for(self.reader.readline(), SECONDS)
            assert line, f"the driver went away before {kind!r}"
            if (message := unpack(line))["kind"] == kind:
                return message


@contextlib.asynccontextmanager
async def driven(wanted, said=None):
    stores = iter(range(1000, 2000))
    say = said.append if said is not None else lambda text: None
    driver = Driver(KEY, wanted, wanted, lambda: (str(next(stores)), lambda: None), say)
    serving = asyncio.ensure_future(driver.serve())
    async with listen(driver, "127.0.0.1", Strangers(say)) as port:
        yield driver, port
        serving.cancel()


def numbers(world):
    return [number for number, _ in world["members"]]


def test_a_loss_and_a_newcomer(tmp_path):
    async def play():
        async with driven(3) as (driver, port):
            ranks = [await Worker.join(port, seat) for seat in range(3)]
            worlds = [await rank.read("world") for rank in ranks]
            assert [world["rank"] for world in worlds] == [0, 1, 2]
            assert numbers(worlds[0]) == [0, 1, 2] and worlds[0]["generation"] == 0
            for rank in ranks:
                rank.send("begun", out=str(tmp_path))
            ranks[0].writer.close()  # as when its process dies
            for rank, step in ((ranks[1], 7), (ranks[2], 6)):
                assert (await rank.read("regroup"))["generation"] == 0
                rank.send("meet", progress=[2, step, step], generation=0)
            world = await ranks[2].read("world")
            assert numbers(world) == [1, 2] and world["rank"] == 1
            assert world["progress"] == [[2, 7, 7], [2, 6, 6]] and world["generation"] == 1
            await ranks[1].read("world")
            newcomer = await Worker.join(port, 0)
            welcome = await newcomer.read("welcome")
            assert welcome["number"] == 3 and welcome["out"] == str(tmp_path)
            newcomer.send("meet", progress=[2, -1, -1], generation=0)
            for rank in ranks[1:]:
                await rank.read("waiting")  # and no call: they come by themselves
                rank.send("meet", progress=[2, 9, 9], generation=1)
            for rank, place in ((ranks[1], 0), (ranks[2], 1), (newcomer, 2)):
                world = await rank.read("world")
                assert numbers(world) == [1, 2, 3] and world["rank"] == place
            (tmp_path / "result.json").touch()
            for rank in (*ranks[1:], newcomer):
                rank.send("done")
            await newcomer.read("over")
            assert driver.code == 0

    asyncio.run(play())


def test_silence_and_a_failure():
    async def play():
        async with driven(2) as (driver, port):
            cleared = []
            driver.lost = cleared.append
            silent = await Worker.join(port, 1, hang_seconds=0.2)
            await silent.read("beat")  # it is asked before it is given up
            await silent.read("cut")
            assert cleared == [1]
            one, again = await Worker.join(port, 0), await Worker.join(port, 1)
            assert numbers(await again.read("world")) == [0, 1]
            one.send("abort", code=3)
            await again.read("over")
            assert driver.code == 3

    asyncio.run(play())


def test_worlds_without_a_step_end():
    """Ranks that cannot reach each other would meet for ever."""

    async def play():
        said = []
        async with driven(1, said) as (driver, port):
            rank = await Worker.join(port, 0)
            for _ in range(MOST_VAIN + 1):
                await rank.read("world")
                rank.send("meet", progress=[0, -1, -1], generation=0)
            await rank.read("over")
            assert driver.code == 1
            assert "can the hosts reach each other?" in said[-1]

    asyncio.run(play())


def test_somebody_without_the_key():
    async def play():
        said = []
        async with driven(1, said) as (_, port):
            with pytest.raises(AssertionError, match="went away before 'known'"):
                await Worker.join(port, 0, key=new_key())
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await reader.readline()
            writer.write(b"GET / HTTP/1.1\n\n")
            assert await asyncio.wait_for(reader.read(), SECONDS) == b""
            assert "turned away" in said[0] and len(said) == 1  # once a minute

    asyncio.run(play())


def test_the_drivers_own_errors_are_no_ranks():
    """Without a descriptor there is no store for a while, and no rank is blamed for that."""

    async def play():
        said = []
        async with driven(2, said) as (driver, port):
            attempts = []

            def no_store():
                attempts.append(True)
                if len(attempts) < 4:
                    raise OSError(errno.EMFILE, "Too many open files")
                return "somewhere", lambda: None

            driver.rendezvous = no_store
            ranks = [await Worker.join(port, seat) for seat in range(2)]
            for rank in ranks:
                assert (await rank.read("world"))["rendezvous"] == "somewhere"
            assert len(attempts) == 4
            assert said == ["no port for the ranks' addresses yet: Too many open files"]

    asyncio.run(play())


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b"{}", b'{"kind": "meet"}', b'{"kind": "abort", "code": "x"}']
)
def test_what_no_rank_says(line):
    """Whoever says it is lost, and the others go on."""

    async def play():
        said = []
        async with driven(2, said) as (driver, port):
            ranks = [await Worker.join(port, seat) for seat in range(2)]
            for rank in ranks:
                await rank.read("world")
            ranks[0].writer.write(line + b"\n")
            await ranks[1].read("regroup")
            assert (
                driver.code is None and "rank 0 on a is lost: its connection ended: V" in said[-1]
            )

    asyncio.run(play())


class Fails:
    """A way to start ranks that come to nothing."""

    def __init__(self, code):
        self.hosts = ["a", "b"]
        self.code = code
        self.starts = 0

    async def run(self, seat, task):
        self.starts += 1
        return self.code

    async def usable(self, seat):
        return True


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (1, MOST_FAILURES)])
def test_ranks_that_do_not_start(monkeypatch, code, starts):
    """What the user can put right ends the run at once; else it is tried again."""
    monkeypatch.setattr("hpctrain.launch.worker_slots.PAUSE_SECONDS", (0.01, 0.05))

    async def play():
        async with driven(2) as (driver, _):
            way = Fails(code)
            seats = WorkerSlots(
                driver, way, lambda seat: RankProcess(["x"], {}, "."), lambda text: None
            )
            keeping = asyncio.ensure_future(seats.keep())
            await wait_until_async(lambda: driver.code is not None, "the driver to give up")
            keeping.cancel()
            assert driver.code == code
            assert starts <= way.starts <= 2 * starts

    asyncio.run(play())


def test_ways(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(way_for(2, None, None, (), tmp_path), Here)
    assert way_for(None, "a:2,b", None, (), tmp_path).hosts == ["a", "a", "b"]
    for arguments in ((None, None, None), (2, "a", None), (None, "a:x", None), (None, ",", None)):
        with pytest.raises(Error):
            way_for(*arguments, (), tmp_path)
    variables = place_variables(["a", "b", "a"], 2)
    assert variables == {"HPCTRAIN_RANK": "2", "HPCTRAIN_SIZE": "3", "HPCTRAIN_LOCAL_RANK": "1",
                         "HPCTRAIN_LOCAL_SIZE": "2"}  # fmt: skip


def test_by_ssh(tmp_path, monkeypatch):
    """What runs is not said in arguments; and when the connection ends, so does the rank."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nfor last; do :; done\nexec $last\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("hpctrain.launch.starters.SSH", [str(ssh), "-T"])
    secret, pid = tmp_path / "secret", tmp_path / "pid"
    script = f"echo $THE_KEY > {secret}; echo $$ > {pid}; exec sleep 1000"

    async def play():
        task = RankProcess(["sh", "-c", script], {"THE_KEY": "hidden"}, str(tmp_path))
        running = asyncio.ensure_future(Ssh(["far"]).run(0, task))
        await wait_until_async(lambda: pid.exists() and pid.read_text(), "the rank to start")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(play())
    assert secret.read_text() == "hidden\n"
    assert "hidden" not in (tmp_path / "arguments").read_text()
    assert ended(int(pid.read_text()))


def test_connections_are_cut():
    """A thread that waits at one goes on, and nothing else is touched."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = socket.create_connection(server.getsockname())
        kept_there, _ = server.accept()
        before = connections()
        waiting = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        pair = socket.socketpair()
        heard = []
        thread = threading.Thread(target=lambda: heard.append(waiting.recv(1)), daemon=True)
        thread.start()
        shut_down(connections() - before)
        thread.join(SECONDS)
        assert heard == [b""]
        for one, other in ((kept, kept_there), pair):
            one.sendall(b"x")
            assert other.recv(1) == b"x"
        for each in (kept, kept_there, waiting, there, *pair):
            each.close()
