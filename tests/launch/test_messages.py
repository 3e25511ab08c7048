"""Messages between processes are JSON: they arrive as they were sent, and bad ones are refused."""

from __future__ import annotations

import ast
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sites import pool

import fomoe_ext
from fomoe_ext.files.json_values import MOST_NESTED, from_json, loads, to_json
from fomoe_ext.launch import messages
from fomoe_ext.launch.messages import MESSAGE_BYTES, MessageError, decode, encode

VALUES = [
    None,
    True,
    -(2**63),
    2**64 - 1,
    0.1,
    -0.0,
    1e-320,
    "",
    "\ud800 ü $",
    [],
    (),
    {},
    [1, (2, [3.5, None])],
    {(0, 1): {"a": 1}, 3: "b", None: (), "$float": 1},
    {"$tuple": []},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_as_they_were(value):
    back = decode(encode(value), "process 0")
    assert repr(back) == repr(value)  # types and signs of zeros too


def test_floats_that_json_has_not():
    back = decode(encode([math.inf, -math.inf, math.nan]), "process 0")
    assert back[:2] == [math.inf, -math.inf] and math.isnan(back[2])


@pytest.mark.parametrize("wrong", [torch.ones(2), {1, 2}, Path("a"), b"a", object], ids=repr)
def test_values_that_cannot_be_sent_are_named(wrong):
    with pytest.raises(TypeError, match=r"message\['a'\]\[1\] must be of numbers"):
        encode({"a": [0, wrong]})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x05N.",
        b"\xff",
        b"{",
        b"NaN",
        b"[" * 100_000,
        b"[" * 700 + b"]" * 700,
        b"1" * 5000,
        b'{"$float": "00"}',
        b'{"$float": 3}',
        b'{"$float": "0000000000000000", "a": 1}',
        b'{"$tuple": 3}',
        b'{"$items": [[1]]}',
        b'{"$items": [[[1], 2]]}',
        b'{"$items": [1]}',
        b'{"$code": "print(1)"}',
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_bytes_that_are_no_message(raw):
    with pytest.raises(MessageError, match=r"^site 3( sent a malformed message|: the length)"):
        decode(raw, "site 3")


def test_json_of_states_is_read_strictly():
    with pytest.raises(ValueError, match="nested too deeply"):
        from_json(loads("[" * 700 + "]" * 700))
    with pytest.raises(ValueError, match="JSON has no Infinity"):
        loads('{"a": Infinity}')
    assert from_json(loads('{"a": {"$tuple": [1]}}')) == {"a": (1,)}
    with pytest.raises(ValueError, match=re.escape("$float must stand alone")):
        from_json({**to_json(math.inf), "b": 1})


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: {1: v}], ids=["list", "tuple", "dict"]
)
def test_nested_too_deeply(wrap):
    """Whatever can be sent can be read, whatever Python's recursion limit is."""
    deepest: object = 1
    for _ in range(MOST_NESTED):
        deepest = wrap(deepest)
    assert decode(encode(deepest), "site 1") == deepest
    for limit in (sys.getrecursionlimit(), 20000):
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(limit)
        try:
            for more in (1, 4000):
                nest = deepest
                for _ in range(more):
                    nest = wrap(nest)
                with pytest.raises(MessageError, match="nested too deeply, more than 100 times"):
                    encode(nest)
            with pytest.raises(ValueError, match="nested too deeply"):
                from_json(loads("[" * 700 + "]" * 700))
        finally:
            sys.setrecursionlimit(before)


@pytest.mark.parametrize("length", [0, -2, MESSAGE_BYTES + 1, 2**62])
def test_lengths(length):
    with pytest.raises(
        MessageError, match=rf"site 1: the length of a message must be .* got {length}"
    ):
        messages.check_length(length, "site 1")


def test_alone_nothing_is_sent():
    box = object()
    assert messages.gather_objects(box, 1) == [box]


def gathered(site, num_sites):
    value = {"site": site, "long": "x" * (1000 * site), (site,): float(site)}
    return messages.gather_objects(value, num_sites)


def broadcast(site, num_sites):
    return messages.broadcast((site, "said"), leads=site == 0)


@pytest.mark.parametrize("num_sites", [2, 3])
def test_sites_hear_each_other(num_sites):
    wanted = [{"site": s, "long": "x" * (1000 * s), (s,): float(s)} for s in range(num_sites)]
    assert pool().run(num_sites, gathered) == [wanted] * num_sites
    assert pool().run(num_sites, broadcast) == [(0, "said")] * num_sites


def error_of(action):
    """The error of a call; returns when all sites have got theirs."""
    try:
        action()
    except Exception as error:
        dist.barrier()
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def unsendable(site, num_sites):
    value = torch.ones(1) if site == 1 else "fine"
    by_gather = error_of(lambda: messages.gather_objects(value, num_sites))
    told = torch.ones(1)
    return by_gather, error_of(lambda: messages.broadcast(told, leads=site == 0))


def test_a_process_that_cannot_send_its_value_is_named():
    first, second = pool().run(2, unsendable)
    assert first[0] == (
        "MessageError: process 1 could not send its value, and reports the reason itself"
    )
    assert second[0].startswith("TypeError: message must be of numbers")
    assert first[1].startswith("TypeError: message must be of numbers")
    assert second[1].startswith("MessageError: process 0 could not send")


def hostile(site, num_sites, length, body):
    """Site 1 sends the bytes of the protocol itself, malformed."""
    if site == 0:
        return error_of(lambda: messages.gather_objects("fine", num_sites, who="site"))
    rows = [torch.zeros(1, dtype=torch.int64) for _ in range(num_sites)]
    dist.all_gather(rows, torch.tensor([length]))
    if body:
        longest = max(len(body), int(rows[0]))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(body)] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        dist.all_gather([torch.empty_like(padded) for _ in range(num_sites)], padded)
    dist.barrier()
    return ""


@pytest.mark.parametrize(
    ("length", "body", "words"),
    [
        (2**62, b"", f"site 1: the length of a message must be in [1, {1 << 28}], got {2**62}"),
        (-5, b"", f"site 1: the length of a message must be in [1, {1 << 28}], got -5"),
        (9, b"cos\nsystem", "site 1 sent a malformed message"),
    ],
)
def test_a_hostile_process_is_refused_and_named(length, body, words):
    found = pool().run(2, hostile, length, body[:length] if length > 0 else b"")[0]
    assert found.startswith(f"MessageError: {words}")


# ------------------------------------------------------------------------------ no pickle, anywhere


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"}
FORBIDDEN_MODULES |= {"joblib", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
OBJECT_COLLECTIVES = {
    f"{name}_object{ending}"
    for name in ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
    for ending in ("", "_list")
}


def unsafe_lines(source: str) -> list[str]:
    """Places in a module's source that could read a pickle or execute text, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module).split(".")[0]]
            found += [
                f"{node.lineno}: {a.name}" for a in node.names if a.name in OBJECT_COLLECTIVES
            ]
        found += [f"{node.lineno}: import {name}" for name in names if name in FORBIDDEN_MODULES]
        if isinstance(node, ast.Attribute) and node.attr in OBJECT_COLLECTIVES:
            found.append(f"{node.lineno}: {node.attr}")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {called}")
        if called == "torch.load":
            found.append(f"{node.lineno}: torch.load")
        if given.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: {called} with allow_pickle")
    return found


def test_no_module_reads_a_pickle():
    package = Path(fomoe_ext.__file__).parent
    files = sorted(package.rglob("*.py"))
    assert len(files) > 50
    found = [
        (str(file.relative_to(package)), line.partition(": ")[2])
        for file in files
        for line in unsafe_lines(file.read_text(encoding="utf-8"))
    ]
    assert found == [("ops/schemas.py", "exec")]  # of argument names, from our own schemas


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, marshal as m",
        "from shelve import open",
        "torch.load(path, weights_only=True)",
        "dist.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_what_reads_a_pickle_is_found(line):
    assert unsafe_lines(f"def f():\n    {line}\n")[0].startswith("2: ")


def test_what_reads_none_is_not_found():
    assert unsafe_lines("model.eval()\ntorch.save(a, p)\nre.compile(a)") == []
