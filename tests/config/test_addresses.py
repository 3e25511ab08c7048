"""HOST:PORT in options and variables: IPv6, names, ports, and who does not answer."""

from __future__ import annotations

import socket
import time

import pytest

from fomoe_ext.config.addresses import Address, listen, parse_address, require_listener, resolve
from fomoe_ext.config.fault import FaultConfig


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on the loopback interface")
LOOPBACKS = ["127.0.0.1:0", "localhost:0", pytest.param("[::1]:0", marks=needs_ipv6)]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:29600", "10.0.0.1", 29600),
        ("[::1]:1", "::1", 1),
        ("[fd00::2]:65535", "fd00::2", 65535),
        ("[::ffff:10.0.0.1]:80", "::ffff:10.0.0.1", 80),
        ("host0:29600", "host0", 29600),
        ("site_1.train.example.:080", "site_1.train.example.", 80),
    ],
)
def test_addresses_are_read(text, host, port):
    address = parse_address(text, "--bind")
    assert address == Address(host, port)
    assert parse_address(str(address), "--bind") == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, "no port") for text in ("", "host", "[::1]", "10.0.0.1")),
        (":80", "no host"),
        *(
            (f"host:{port}", "from 1 to 65535")
            for port in ("", "x", "0", "-1", "65536", "8_0", "٣")
        ),
        *((f"{host}:1", "must be in brackets") for host in ("::1", "fd00::2", "::")),
        *((f"{host}:1", "brackets are for") for host in ("[::1", "::1]", "[host]", "[10.0.0.1]")),
        *((f"{host}:1", "does not appear") for host in ("10.0.0.256", "1.2.3", "[::1::2]", "[:x]")),
        ("[fe80::1%eth0]:1", "zone"),
        ("http://host:80", "URL"),
        *(
            (f"{host}:1", "not a host name")
            for host in ("-a", "a b", "a..b", "a/b", "hö", "x" * 64)
        ),
    ],
)
def test_what_is_no_address_is_refused_by_name(text, reason):
    with pytest.raises(ValueError, match=r"fault\.lighthouse must be HOST:PORT") as error:
        FaultConfig("torchft", lighthouse=text)
    assert reason in str(error.value) and repr(text) in str(error.value)


def test_port_0_is_for_listeners():
    assert parse_address("host:0", "--bind", any_port=True).port == 0


@pytest.mark.parametrize(
    "text", [*LOOPBACKS, "0.0.0.0:0", pytest.param("[::]:0", marks=needs_ipv6)]
)
def test_who_listens_is_found(text):
    wanted = parse_address(text, "--bind", any_port=True)
    with listen(wanted, "--bind") as listener:
        port = listener.getsockname()[1]
        hosts = {"0.0.0.0": ["127.0.0.1"], "::": ["::1", "127.0.0.1"]}
        for host in hosts.get(wanted.host, [wanted.host]):
            require_listener(Address(host, port), "--lighthouse", 1.0, "")


def test_who_does_not_listen_is_named_soon():
    with listen(Address("127.0.0.1", 0), "--bind") as listener:
        free = Address(*listener.getsockname())
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=f"--lighthouse {free} does not answer .*: look there"
    ):
        require_listener(free, "--lighthouse", 0.3, "look there")
    assert time.monotonic() - start < 2


def test_names_and_interfaces_that_are_not_here():
    with pytest.raises(OSError, match=r"--bind nowhere.invalid:1: the host is not known here"):
        resolve(Address("nowhere.invalid", 1), "--bind")
    with pytest.raises(OSError, match=r"--bind 192\.0\.2\.1:0 cannot be listened on: [A-Za-z ]+$"):
        listen(Address("192.0.2.1", 0), "--bind")


@pytest.mark.parametrize("text", LOOPBACKS)
def test_sites_meet_at_a_lighthouse(text, monkeypatch):
    pytest.importorskip("torchft")
    monkeypatch.delenv("FOMOE_SECRET", raising=False)
    from fomoe_ext.fault.lighthouse import Lighthouse
    from fomoe_ext.fault.membership import TorchftMembership

    lighthouse = Lighthouse(parse_address(text, "--bind", any_port=True), 1, 3.0)
    try:
        options = {"quorum": 1, "silent_s": 3.0}
        member = TorchftMembership(lighthouse.address, 0, 1, **options)
        assert member._ask(0, 1).members == (0,)  # `begin` would go on beating
        # One that knows another secret finds a store, and nothing of its job in it.
        monkeypatch.setenv("FOMOE_SECRET", "quite another run's secret")
        monkeypatch.setattr("fomoe_ext.fault.membership._KEY_S", 0.2)
        with pytest.raises(ConnectionError, match=r"is no lighthouse of this job.*FOMOE_SECRET"):
            TorchftMembership(lighthouse.address, 0, 1, **options, name="--lighthouse")
        monkeypatch.delenv("FOMOE_SECRET")
    finally:
        lighthouse.shutdown()
