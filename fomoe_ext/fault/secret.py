"""A run's shared secret: who does not know it cannot find the run's keys or join it.

It is read from FOMOE_SECRET and never sent: keys of the store are named by a keyed hash of it, and
what a site says of itself carries one (HMAC-SHA-256, RFC 2104). It encrypts nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os

VARIABLE = "FOMOE_SECRET"
_SHORTEST = 16


def own_secret() -> bytes:
    """The secret, empty where there is none. Raises ValueError for one that is too short."""
    secret = os.environ.get(VARIABLE, "").encode()
    if secret and len(secret) < _SHORTEST:
        raise ValueError(f"{VARIABLE} must have at least {_SHORTEST} characters, got {len(secret)}")
    return secret


def keyed(*words: object) -> str:
    """A keyed hash of some words, 32 hexadecimal digits."""
    return hmac.new(own_secret(), repr(words).encode(), hashlib.sha256).hexdigest()[:32]


def matches(text: str, *words: object) -> bool:
    """Whether `text` is the keyed hash of the words; takes as long for a wrong one."""
    return hmac.compare_digest(text.encode(), keyed(*words).encode())
