"""HOST:PORT addresses in options and environment variables: parsing, listening, connecting.

Each error names the option or variable with the address. Needs no torch.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?")
_LAST_PORT = (1 << 16) - 1
_PAUSE_S = 0.2
_PATIENCE_S = 5.0


class Address(NamedTuple):
    """A host (a name or an IP address, IPv6 without brackets) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"


def bracketed(host: str) -> str:
    """A host as written before a port: IPv6 addresses get brackets."""
    return f"[{host}]" if ":" in host else host


def parse_address(text: str, name: str, *, any_port: bool = False) -> Address:
    """Parses HOST:PORT, with IPv6 addresses in brackets. `name`: of the option or variable.

    `any_port`: allow port 0, which stands for any free port. Raises ValueError for anything else.
    """
    host, colon, port = text.rpartition(":")
    wrong = ""
    if "://" in text:
        wrong = "it is a URL"
    elif not colon or text.endswith("]"):
        wrong = "it has no port"
    elif not host:
        wrong = "it has no host"
    else:
        wrong = why_no_host(host, in_brackets=True) or why_no_port(port, any_port)
    if wrong:
        raise ValueError(
            f"{name} must be HOST:PORT, such as 10.0.0.1:29600, host0:29600 or [fd00::1]:29600, "
            f"got {text!r}: {wrong}"
        )
    return Address(host.strip("[]"), int(port))


def why_no_port(text: str, any_port: bool = False) -> str:
    """What is wrong with a port, or an empty string. `any_port`: allow 0."""
    least = 0 if any_port else 1
    if text.isascii() and text.isdecimal() and len(text) < 9 and least <= int(text) <= _LAST_PORT:
        return ""
    return f"the port must be a number from {least} to {_LAST_PORT}, not {text!r}"


def why_no_host(text: str, in_brackets: bool = False) -> str:
    """What is wrong with a host, or an empty string. `in_brackets`: IPv6 needs brackets."""
    bare = text
    if in_brackets and (text.startswith("[") or text.endswith("]")):
        bare = text.removeprefix("[").removesuffix("]")
        if text != f"[{bare}]" or ":" not in bare:
            return f"brackets are for an IPv6 address, not for {text!r}"
    elif in_brackets and ":" in text:
        return "an IPv6 address must be in brackets, before the port"
    if "%" in bare:
        return "an IPv6 address must have no zone (%): other machines cannot use it"
    if ":" in bare or re.fullmatch(r"[0-9.]+", bare):
        try:
            ipaddress.ip_address(bare)
        except ValueError as error:
            return str(error)
    elif len(bare) > 253 or not _NAME.fullmatch(bare):
        return f"{bare!r} is not a host name"
    return ""


def resolve(address: Address, name: str) -> Address:
    """The numeric address, IPv4 if the host has both kinds. Raises OSError for an unknown host."""
    return _resolve_all(address, name)[0]


def _resolve_all(address: Address, name: str) -> list[Address]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"{name} {address}: the host is not known here ({reason})") from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return [Address(str(entry[4][0]), address.port) for entry in found]


def listen(address: Address, name: str) -> socket.socket:
    """A listening socket; port 0 takes a free port. Raises OSError if that is not possible."""
    numbers = resolve(address, name)
    family = socket.AF_INET6 if ":" in numbers.host else socket.AF_INET
    both = numbers.host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(numbers, family=family, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OSError(f"{name} {address} cannot be listened on: {reason}") from None


def require_listener(
    address: Address,
    name: str,
    within_s: float,
    hint: str,
    say: Callable[[str], object] | None = None,
) -> None:
    """Raises ConnectionError if no connection is accepted within `within_s` seconds.

    `hint`: the end of the message, what to check. `say`: called with a message if it takes long.
    """
    start, told = time.monotonic(), False
    while True:
        reason = _why_silent(address, name, within_s)
        passed = time.monotonic() - start
        if not reason:
            return
        if passed + _PAUSE_S > within_s:
            raise ConnectionError(
                f"{name} {address} does not answer ({reason}; tried for {within_s:g} s): {hint}"
            )
        if say is not None and not told and passed > _PATIENCE_S:
            told = True
            say(f"{name} {address} does not answer yet ({reason}): {hint}")
        time.sleep(_PAUSE_S)


def _why_silent(address: Address, name: str, timeout_s: float) -> str:
    """Why no connection can be made, or an empty string."""
    try:
        found = _resolve_all(address, name)
    except OSError as error:
        return str(error).partition(": ")[2]
    reason = ""
    for numbers in found:
        try:
            socket.create_connection(numbers, timeout=min(timeout_s, _PATIENCE_S)).close()
            return ""
        except OSError as error:
            reason = error.strerror or str(error)
    return reason
