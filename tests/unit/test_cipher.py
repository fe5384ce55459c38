"""Encryption: what was changed is refused, no nonce comes twice, and keys stay secret."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import Error
from hpctrain.ps.protocol.cipher import Cipher, read_key
from tests.waiting import SECONDS

KEY = bytes(range(32))
HEAD = 24  # salt and counter


def refused():
    return pytest.raises(Error, match="a message from worker 3 is not authentic: .*HINT")


@given(data=st.binary(max_size=5000), associated=st.binary(max_size=50))
def test_round_trip(data, associated):
    """Between two processes' ciphers."""
    message = Cipher(KEY).seal(data, associated)
    assert len(message) == len(data) + Cipher.OVERHEAD
    assert Cipher(KEY).open(message, associated, "worker 3") == data


def test_any_memory():
    array = np.arange(1000, dtype=np.float32)
    cipher = Cipher(KEY)
    opened = cipher.open(cipher.seal(array, b""), b"", "worker 3")
    assert np.array_equal(np.frombuffer(opened, dtype=np.float32), array)
    assert not opened.readonly
    assert array.tobytes()[:32] not in bytes(cipher.seal(array, b""))


def test_any_flipped_bit_is_refused():
    cipher = Cipher(KEY)
    message = bytearray(cipher.seal(b"12345", b"push"))
    for bit in range(8 * len(message)):
        message[bit // 8] ^= 1 << bit % 8
        with refused():
            cipher.open(message, b"push", "worker 3")
        message[bit // 8] ^= 1 << bit % 8
    assert cipher.open(message, b"push", "worker 3") == b"12345"


def test_any_part_is_refused():
    cipher = Cipher(KEY)
    message = bytes(cipher.seal(b"12345", b"push"))
    for length in range(len(message)):
        with refused():
            cipher.open(message[:length], b"push", "worker 3")
    with refused():
        cipher.open(message + b"0", b"push", "worker 3")


def test_another_key_or_purpose_is_refused():
    cipher = Cipher(KEY)
    message = cipher.seal(b"12345", b"push 1")
    with refused():
        cipher.open(message, b"push 2", "worker 3")
    with refused():
        Cipher(KEY[::-1]).open(message, b"push 1", "worker 3")


def test_no_nonce_comes_twice():
    """Of any thread, any cipher, and any process, even one that was forked."""
    ciphers = [Cipher(KEY), Cipher(KEY)]
    heads = []

    def seal():
        for _ in range(500):
            heads.extend(bytes(cipher.seal(b"", b"")[:HEAD]) for cipher in ciphers)

    threads = [threading.Thread(target=seal) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, ciphers[0].seal(b"from the child", b""))
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    message = os.read(reading, 1000)
    os.close(reading)
    heads.append(message[:HEAD])
    heads.append(bytes(ciphers[0].seal(b"", b"")[:HEAD]))

    assert len(set(heads)) == len(heads) == 4 * 500 * 2 + 2
    assert len({head[:16] for head in heads}) == 3
    assert ciphers[1].open(message, b"", "worker 3") == b"from the child"


def test_salts_that_nobody_drew_do_not_fill_the_memory():
    cipher = Cipher(KEY)
    for number in range(5000):
        with refused():
            cipher.open(number.to_bytes(100, "little"), b"", "worker 3")
    assert cipher._subkeys.cache_info().currsize <= 4096


def test_reading_a_key(tmp_path):
    path = tmp_path / "key"
    path.write_text(KEY.hex().upper() + "\n")
    path.chmod(0o600)
    other = {"HPCTRAIN_PS_KEY": "ab" * 32}
    assert read_key(path, other) == KEY
    assert read_key(None, other) == b"\xab" * 32
    assert read_key(None, {}) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_can_open(tmp_path, mode):
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    path.chmod(mode)
    with pytest.raises(Error, match="HINT: chmod 600"):
        read_key(path, {})


@pytest.mark.parametrize(
    "text", ["", KEY.hex()[:-1], KEY.hex() + "00", KEY.hex()[:-1] + "g", "é" * 64, "0 " * 32]
)
def test_a_malformed_key_is_not_shown(tmp_path, text):
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    for given_path, environment in ((path, {}), (None, {"HPCTRAIN_PS_KEY": text})):
        with pytest.raises(Error, match="HINT") as caught:
            read_key(given_path, environment)
        assert not text or text[:8] not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_key_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(Error, match="cannot read the key file .*HINT"):
            read_key(path, {"HPCTRAIN_PS_KEY": KEY.hex()})


def test_a_key_of_another_length():
    with pytest.raises(Error, match="HINT"):
        Cipher(b"short")
