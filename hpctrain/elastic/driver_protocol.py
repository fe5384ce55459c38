"""The protocol of the driver and the ranks: a handshake, then lines of JSON over TCP.

First each side proves that it knows the key of the run, without saying it (RFC 2104).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from typing import Any

from hpctrain.files import parse_json

ADDRESS, KEY = "HPCTRAIN_DRIVER", "HPCTRAIN_DRIVER_KEY"
"""The environment variables by which ranks know the driver: ``HOST:PORT``, and the key in hex."""

LINE_BYTES = 2**22
"""Longest line: a world has some hundred bytes for each rank."""


def new_key() -> str:
    """Return a new random key for a run, in hexadecimal."""
    return secrets.token_hex(32)


def challenge() -> str:
    """Return a random challenge, which nobody has asked before."""
    return secrets.token_hex(16)


def proof(key: str, side: str, *challenges: str) -> str:
    """Return the proof that a side knows the key, of no use at another time or for the other side.

    Args:
        key: The run's.
        side: Whose proof it is: ``rank`` or ``driver``.
        challenges: Of both sides, in the handshake's order.
    """
    text = ":".join([side, *challenges]).encode()
    return hmac.new(bytes.fromhex(key), text, hashlib.sha256).hexdigest()


def proves(key: str, given: object, side: str, *challenges: str) -> bool:
    """Tell whether something is the other side's proof, in constant time.

    Args:
        key: The run's.
        given: What came, which may be anything.
        side: Whose proof it would be.
        challenges: Of both sides, in the handshake's order.
    """
    return isinstance(given, str) and hmac.compare_digest(given, proof(key, side, *challenges))


def pack(kind: str, **values: Any) -> bytes:
    """Return a message as a line of JSON.

    Args:
        kind: Of the message.
        values: What it says, which JSON can hold.
    """
    return json.dumps({"kind": kind, **values}).encode() + b"\n"


def unpack(line: bytes) -> dict[str, Any]:
    """Return a message's values, its kind among them.

    Raises:
        ValueError: It is none.
    """
    values = parse_json(line)
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise ValueError("not a message")
    return values
