"""Which process of a job this is, by environment variables that may have been set by hand."""

from __future__ import annotations

import socket
import sys

import pytest

from fomoe_ext.config import addresses
from fomoe_ext.config.addresses import Address
from fomoe_ext.launch import world
from fomoe_ext.launch.world import World, find_world, meeting_point

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def variables(*values: object) -> dict[str, str]:
    return {n: str(v) for n, v in zip(NAMES, values, strict=True) if v is not None}


def test_good_variables():
    assert find_world(4, variables(3, 4, 0, 1)) == World(3, 4, 0, 1)
    assert find_world(2, variables(5, 6, 2, 3), 3) == World(1, 2, 2, 3, 2, 3)
    assert find_world(1, {"MASTER_ADDR": "x"}) == World()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((5, 4, 0, 1), "RANK must be less than WORLD_SIZE, got RANK=5, WORLD_SIZE=4"),
        ((4, 4, 0, 1), "RANK must be less than WORLD_SIZE"),
        ((0, 0, 0, 1), "RANK must be less than WORLD_SIZE"),
        ((1, 4, 1, 1), "LOCAL_RANK must be less than LOCAL_WORLD_SIZE"),
        ((1, 4, 0, 5), "LOCAL_WORLD_SIZE must be at most WORLD_SIZE"),
        ((0, 4, 1, 2), "LOCAL_RANK must be at most RANK"),
        *(
            ((v, 4, 0, 1), f"RANK must be a whole number >= 0, got '{v}'")
            for v in ("-1", "x", "", "1.0", "²", "9" * 20)
        ),
        ((0, "-4", 0, 1), "WORLD_SIZE must be a whole number"),
        ((0, 4, "", 1), "LOCAL_RANK must be a whole number"),
        ((0, 4, 0, "one"), "LOCAL_WORLD_SIZE must be a whole number"),
        (
            (None, 4, None, None),
            "got WORLD_SIZE=4 without RANK and LOCAL_RANK and LOCAL_WORLD_SIZE",
        ),
        ((0, None, 0, 1), "without WORLD_SIZE"),
        ((0, 4, None, None), "got RANK=0, WORLD_SIZE=4 without LOCAL_RANK and LOCAL_WORLD_SIZE"),
        ((None, None, 0, None), "got LOCAL_RANK=0 without"),
        ((0, 8, 0, 1), "sites is 4, but there are 8 processes"),
        ((None, None, None, None), "this is one process and sites is 4"),
    ],
)
def test_contradictory_variables_are_refused(values, said):
    with pytest.raises(ValueError) as error:
        find_world(4, variables(*values))
    assert said in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces have other names")
def test_missing_network_interfaces_are_refused():
    here = [name for _, name in socket.if_nameindex()]
    find_world(1, {"GLOO_SOCKET_IFNAME": ",".join([here[0]] * 2)})
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME must name .*, got nothing0"):
        find_world(1, {"GLOO_SOCKET_IFNAME": f"{here[0]},nothing0"})


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [
        (None, None, "MASTER_ADDR and MASTER_PORT must be set"),
        ("host0", None, "MASTER_PORT must be set"),
        ("", "29500", "MASTER_ADDR must be set"),
        ("host0", "0", "MASTER_PORT must be a port, got '0': the port must be a number from 1"),
        ("host0", "70000", "MASTER_PORT must be a port, got '70000'"),
        ("host0", "-1", "MASTER_PORT must be a port, got '-1'"),
        ("host0:29500", "29500", "MASTER_ADDR must be a host name or an IP address"),
        ("[::1]", "29500", "MASTER_ADDR must be a host name or an IP address"),
        ("10.0.0.256", "29500", "MASTER_ADDR must be a host name or an IP address"),
    ],
)
def test_where_processes_meet_is_checked(host, port, said):
    given = {"MASTER_ADDR": host, "MASTER_PORT": port}
    with pytest.raises(ValueError) as error:
        meeting_point({name: value for name, value in given.items() if value is not None})
    assert said in str(error.value)


def test_where_processes_meet_is_read():
    for host in ("::1", "10.0.0.1", "host0.example"):
        given = {"MASTER_ADDR": host, "MASTER_PORT": "29500"}
        assert meeting_point(given) == Address(host, 29500)


def test_a_waiting_process_says_what_it_waits_for(monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(addresses, "_PATIENCE_S", 0.1)
    with pytest.raises(
        ConnectionError, match=r"MASTER_PORT 127\.0\.0\.1:\d+ does not answer .*RANK=0"
    ):
        world._find_others(World(1, 2), 0.5)
    said = caplog.messages[0]
    assert said.startswith("fomoe train, site 1: MASTER_ADDR:MASTER_PORT") and "yet" in said
    world._find_others(World(0, 2), 0.5)  # here the other process connects

    monkeypatch.setattr(world, "_PATIENCE_S", 0.0)
    with world._telling(World(0, 2), 300.0):
        world.threading.Event().wait(0.1)
    assert "waits for the other processes of 2, for up to 300 s" in caplog.messages[-1]
