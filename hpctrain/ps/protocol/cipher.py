"""Authenticated encryption of what workers and servers send each other."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hpctrain.errors import Error

Buffer = bytes | bytearray | memoryview

VARIABLE = "HPCTRAIN_PS_KEY"

_KEY, _SALT, _COUNTER, _NONCE, _TAG = 32, 16, 8, 12, 16  # bytes
_HEAD = _SALT + _COUNTER
_PURPOSE = b"hpctrain parameter server: AES-256-GCM of one process"
_RECIPE = "make one with (umask 077; openssl rand -hex 32 > FILE), the same for every rank."


def read_key(path: Path | None, environment: Mapping[str, str]) -> bytes | None:
    """Return the key of a file, or else of ``HPCTRAIN_PS_KEY``; None where neither is given.

    Args:
        path: Holds 64 hexadecimal digits, and nobody but its owner may open it.
        environment: Of the process.

    Raises:
        Error: The file cannot be read, or others could read it, or that is no key.
    """
    if path is not None:
        try:
            with path.open("rb") as file:
                # Of the file that is open, so that nobody can exchange it in between.
                mode = os.fstat(file.fileno()).st_mode
                text = file.read(1024)
        except OSError as error:
            raise Error(
                f"cannot read the key file {path}: {error.strerror}.", hint=_RECIPE
            ) from None
        if mode & 0o077:
            raise Error(
                f"the key file {path} is open to others than its owner (mode {mode & 0o777:03o}).",
                hint=f"chmod 600 {path}; if others may have read it, make another key.",
            )
        return _parse(text, f"the key file {path}")
    if VARIABLE in environment:
        return _parse(os.fsencode(environment[VARIABLE]), VARIABLE)
    return None


def _parse(text: bytes, where: str) -> bytes:
    # What was found is never shown: it may be a key, but for one digit.
    if not re.fullmatch(rb"\s*[0-9a-fA-F]{64}\s*", text):
        raise Error(f"{where} does not hold a key of 64 hexadecimal digits.", hint=_RECIPE)
    return bytes.fromhex(text.decode())


class Cipher:
    """AES-256-GCM (NIST SP 800-38D) by keys that no two processes seal with.

    A nonce may never be used twice with a key, and processes that each count their own messages
    would do it. So each draws a salt, and seals with a key of its own, which follows from the
    common one and the salt by HKDF-SHA256 (RFC 5869). A sealed message is the salt (16 bytes), the
    counter (8), the encrypted data, and the tag (16).

    A copy of a message is as authentic as the message. If it must not be taken twice, or for one
    of another sender or kind, ``associated`` has to tell these apart. Threads may share a cipher.

    Args:
        key: 32 bytes, the same on every rank.
    """

    OVERHEAD = _HEAD + _TAG
    """A sealed message has so many bytes more than its data."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY:
            raise Error(f"a key has {_KEY} bytes, and this one {len(key)}.", hint=_RECIPE)
        self._key = key
        # Bounded, because anyone may send salts that nobody drew.
        self._subkeys = functools.lru_cache(maxsize=4096)(self._derive)
        self._sending = _Sending(self._derive)

    def seal(self, data: Buffer, associated: bytes) -> memoryview:
        """Encrypt data, so that nobody can read it, or change it unnoticed.

        Args:
            data: Contiguous memory of any type.
            associated: What the message is for; not sent, and :meth:`open` has to be given it.
        """
        sending = self._sending
        if sending.process != os.getpid():  # a fork has its parent's salt and counter
            sending = self._sending = _Sending(self._derive)
        with sending.lock:
            counter = next(sending.counter).to_bytes(_COUNTER, "big")
        view = memoryview(data).cast("B")
        # numpy's, because Python would write zeros first.
        message = np.empty(view.nbytes + self.OVERHEAD, dtype=np.uint8).data
        message[:_SALT] = sending.salt
        message[_SALT:_HEAD] = counter
        sending.key.encrypt_into(_nonce(counter), view, associated, message[_HEAD:])
        return message

    def open(self, data: Buffer, associated: bytes, sender: str) -> memoryview:
        """Decrypt what :meth:`seal` made, in new memory, which may be written to.

        Args:
            data: The sealed message, in bytes.
            associated: As it was given to ``seal``.
            sender: Whom to name where the message is refused.

        Raises:
            Error: The message is not what somebody with the same key sealed for this.
        """
        view = memoryview(data).cast("B")
        if view.nbytes >= self.OVERHEAD:
            opened = np.empty(view.nbytes - self.OVERHEAD, dtype=np.uint8).data
            key = self._subkeys(bytes(view[:_SALT]))
            with contextlib.suppress(InvalidTag):
                key.decrypt_into(_nonce(view[_SALT:_HEAD]), view[_HEAD:], associated, opened)
                return opened
        raise Error(
            f"a message from {sender} is not authentic: it was changed on the way, or the keys "
            "differ.",
            hint=f"give every rank the same key, by its key file or {VARIABLE}.",
        )

    def _derive(self, salt: bytes) -> AESGCM:
        derivation = HKDF(algorithm=SHA256(), length=_KEY, salt=salt, info=_PURPOSE)
        return AESGCM(derivation.derive(self._key))


class _Sending:
    """What a process seals with, and no other."""

    def __init__(self, derive: Callable[[bytes], AESGCM]) -> None:
        self.process = os.getpid()
        self.salt = secrets.token_bytes(_SALT)
        self.key = derive(self.salt)
        self.counter = itertools.count()
        self.lock = threading.Lock()


def _nonce(counter: Buffer) -> bytes:
    return bytes(_NONCE - _COUNTER) + counter
