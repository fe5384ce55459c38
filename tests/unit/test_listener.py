"""Strangers at the ports of `hpctrain launch`: bounded, turned away, and in nobody's way."""

import asyncio
import contextlib
import http.client
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hpctrain.launch.listener import DESCRIPTORS_PART, Strangers, admit, listening, read_until
from hpctrain.launch.rendezvous import Store
from hpctrain.slurm import orphan
from tests.waiting import wait_until

SECRET = b"the secret\n"


@pytest.fixture
def few_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(list(Path("/proc/self/fd").iterdir()))
    limit = here + 400
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def strangers_at(port, count):
    """A process with so many connections, of which some send; it has descriptors of its own."""
    script = f"""
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held = []
for number in range({count}):
    try:
        s = socket.create_connection(("127.0.0.1", {port}), timeout=5)
        s.setblocking(False)
        if number % 3 == 1:
            s.send(bytes(range(256)) * 100)
        if number % 3 == 2:
            s.send(b"PUT /a/b/c HTTP/1.1\\r\\nContent-Length: 999999999\\r\\n\\r\\n" + b"x" * 2000)
        held.append(s)
    except OSError:
        pass
print("there", flush=True)
while True:
    for s in held:
        try:
            s.send(b"y")
        except OSError:
            pass
    time.sleep(0.2)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    return process


async def greet(connection):
    if bytes(await read_until(connection, b"\n")) != SECRET:
        return False
    await asyncio.get_running_loop().sock_sendall(connection, b"welcome\n")
    connection.close()
    return True


async def known(port):
    """Somebody with the secret is let in, at the first attempt or soon after it."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(SECRET)
            line = await asyncio.wait_for(reader.readline(), 20)
            writer.close()
            if line == b"welcome\n":
                return True
        await asyncio.sleep(0.1)
    return False


def test_idle_connections_are_in_nobodys_way(few_descriptors):
    """Three times as many as there are descriptors, idle, sending nonsense, or byte by byte."""
    said = []

    async def play():
        server = listening("127.0.0.1")
        admitting = asyncio.ensure_future(admit(server, greet, Strangers(said.append)))
        port = server.getsockname()[1]
        before = psutil.Process().memory_info().rss
        crowd = await asyncio.to_thread(strangers_at, port, 3 * few_descriptors)
        try:
            most = 0
            for _ in range(10):
                assert await known(port)
                most = max(most, len(list(Path("/proc/self/fd").iterdir())))
            assert most <= few_descriptors - 400 + few_descriptors // DESCRIPTORS_PART + 30
            assert psutil.Process().memory_info().rss - before < 50 * 2**20
            assert len(said) <= 2
        finally:
            crowd.kill()
            crowd.communicate()
            admitting.cancel()
            await asyncio.gather(admitting, return_exceptions=True)
            server.close()

    asyncio.run(play())


def test_without_descriptors_it_goes_on():
    """The last one is gone: no traceback, no spinning, and it works again when there are some."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def play():
        server = listening("127.0.0.1")
        said = []
        admitting = asyncio.ensure_future(admit(server, greet, Strangers(said.append)))
        waiting = [socket.create_connection(server.getsockname()) for _ in range(3)]
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        began = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - began < 0.9 and not admitting.done()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert await known(server.getsockname()[1])
        admitting.cancel()
        await asyncio.gather(admitting, return_exceptions=True)
        for each in (*waiting, server):
            each.close()

    try:
        asyncio.run(play())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def ask(where, method, path, body=None):
    host, _, rest = where.partition(":")
    port, _, secret = rest.partition("/")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request(method, f"/{secret}:0/{path}", body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_store():
    said = []

    async def play():
        store = Store("127.0.0.1", Strangers(said.append))
        value = os.urandom(100_000)

        def use():
            assert ask(store.where, "GET", "global/1")[0] == 404
            assert ask(store.where, "PUT", "global/1", value) == (200, b"")
            assert ask(store.where, "GET", "global/1") == (200, value)
            assert ask(store.where, "DELETE", "global/1") == (200, b"")
            assert ask(store.where, "GET", "global/1")[0] == 404
            assert said == []
            guessed = store.where.rpartition("/")[0] + "/" + "0" * 32
            for method in ("GET", "PUT"):
                with pytest.raises((http.client.HTTPException, OSError)):
                    ask(guessed, method, "global/1", b"x" * 1000)
            for text in (
                b"PUT / HTTP/1.1\r\n\r\n",
                b"\0" * 10_000,
                b"GET\r\n\r\n",
                b"\xff\r\n\r\n",
            ):
                host, port = guessed.partition("/")[0].split(":")
                with socket.create_connection((host, int(port)), timeout=10) as stranger:
                    stranger.sendall(text)
                    with contextlib.suppress(ConnectionResetError):
                        assert stranger.recv(1) == b""
            assert len(said) == 1 and "turned away" in said[0]

        await asyncio.to_thread(use)
        assert store._values == {}
        store.close()
        await asyncio.sleep(0.05)
        host, port = store.where.partition("/")[0].split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=5)

    asyncio.run(play())


def test_a_watcher_of_the_scripts_host(monkeypatch):
    """Nothing can connect where it asks; it ends when told to, and acts when nothing answers."""
    monkeypatch.setattr(orphan, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(orphan, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(orphan, "END_SECONDS", 0.1)
    requeued = []
    monkeypatch.setattr(orphan, "_requeue", lambda: requeued.append(True))
    here, there = os.pipe()
    monkeypatch.setattr(orphan.sys, "stdin", os.fdopen(here))
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{refusing.getsockname()[1]}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(refusing.getsockname(), timeout=5)
        watching = threading.Thread(target=orphan.watch, args=(address,), daemon=True)
        watching.start()
        time.sleep(0.3)
        assert watching.is_alive()
        os.write(there, orphan.OVER)
        watching.join(10)
        assert not watching.is_alive() and not requeued
    heard = iter([True, True, *[False] * 1000])
    monkeypatch.setattr(orphan, "answers", lambda *asked: next(heard))
    os.close(there)  # as when srun is gone with its host
    orphan.watch(address)
    assert requeued == [True]
    monkeypatch.setattr(orphan, "answers", lambda *asked: False)
    orphan.watch(address)  # never answered: a firewall
    assert requeued == [True]


SRUN = """#!/bin/sh
echo "$*" >> {calls}
test $(wc -l < {calls}) -lt 3 && exit 1
exec cat > {ended}
"""


def test_a_watcher_that_cannot_be_started_is_followed_by_another(tmp_path, monkeypatch):
    """Such as by an srun that a busy node keeps waiting until its credentials have expired."""
    calls, ended = tmp_path / "calls", tmp_path / "ended"
    (tmp_path / "srun").write_text(SRUN.format(calls=calls, ended=ended))
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(orphan, "LOOK_SECONDS", 0.05)
    with orphan.watched(["n3", "n2"]):
        wait_until(ended.exists, "the third watcher")
    tried = [line.split("--nodelist=")[1].split()[0] for line in calls.read_text().splitlines()]
    assert tried == ["n3", "n2", "n3"]
    assert ended.read_bytes() == orphan.OVER  # it was told of the end, in good order
