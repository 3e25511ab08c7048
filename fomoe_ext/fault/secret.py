"""The shared secret of a run: without it nobody can find the run's keys or join the run.

It is read from FOMOE_SECRET and never sent. Instead, names of keys in the store and statements of
sites contain a keyed hash (HMAC-SHA-256, RFC 2104). Nothing is encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import os

VARIABLE = "FOMOE_SECRET"
_SHORTEST = 16


def own_secret() -> bytes:
    """The secret; empty without one. Raises ValueError if it is too short."""
    secret = os.environ.get(VARIABLE, "").encode()
    if secret and len(secret) < _SHORTEST:
        raise ValueError(f"{VARIABLE} must have at least {_SHORTEST} characters, got {len(secret)}")
    return secret


def keyed(*words: object) -> str:
    """A keyed hash of some words, 32 hexadecimal digits."""
    return hmac.new(own_secret(), repr(words).encode(), hashlib.sha256).hexdigest()[:32]


def matches(text: str, *words: object) -> bool:
    """Whether `text` is the keyed hash of the words, compared in constant time."""
    return hmac.compare_digest(text.encode(), keyed(*words).encode())
