"""Damaged and hostile inputs: a parser takes them or raises an error that it documents."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from . import mutate, run
from .limits import within
from .parsers import Parser, parsers

NAMES = list(parsers())
few = settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def inputs(parser: Parser) -> st.SearchStrategy[bytes]:
    """Any bytes, and damaged valid ones."""
    damaged = st.integers(0, 2**32).map(lambda n: parser.damaged(random.Random(n)))
    return st.one_of(damaged, damaged, st.binary(max_size=300))


@pytest.mark.parametrize("name", NAMES)
def test_valid_inputs_are_taken(name):
    parser = parsers()[name]
    sized = [raw for raw in parser.corpus if not name.startswith("payload") or raw[1] & 6]
    # The second status tells of a NaN: it is well formed, and a meeting refuses it.
    taken = [parser.accepts(raw) for raw in sized]
    assert taken and taken == [name != "statuses" or index == 0 for index in range(len(taken))]


@pytest.mark.parametrize("name", NAMES)
def test_only_documented_errors(name):
    parser = parsers()[name]

    @few
    @given(inputs(parser))
    @example(b"")
    @example(b"[" * 100_000)
    @example(b"\xff" * 64)
    def check(raw: bytes) -> None:
        with within(run.SECONDS):
            parser.accepts(raw)

    check()


@pytest.mark.parametrize("how", [mutate.of_bytes, mutate.of_json])
def test_mutations_are_diverse_and_reproducible(how):
    corpus = [json.dumps({"a": [1, 2, {"b": None}], "c": "text", "d": 1.5}).encode()]
    made = [how(random.Random(n), corpus) for n in range(400)]
    assert made == [how(random.Random(n), corpus) for n in range(400)]
    assert len(set(made)) > 300


def endless(raw: bytes) -> object:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "text"),
    [(lambda raw: {}[raw], "KeyError"), (lambda raw: raw.hang(), "AttributeError")],
)
def test_a_run_reports_other_errors(read, text):
    parser = Parser("bad", read, (ValueError,), [b"abc"], mutate.of_bytes)
    outcome = run.at_random(parser, 3, range(5, 8))
    assert (outcome.inputs, outcome.errors, outcome.good) == (3, 3, False)
    assert repr(run.numbered(parser, 3, 5)) in outcome.texts[0] and text in outcome.texts[0]


def test_a_run_reports_what_hangs(monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 0.05)
    outcome = run.at_random(Parser("bad", endless, (Exception,), [b"a"], mutate.of_bytes), 0, [0])
    assert outcome.errors == 1 and "more than 0.05 s for one input" in outcome.texts[0]


def test_a_run_reports_what_keeps_memory(monkeypatch):
    kept: list[bytes] = []
    monkeypatch.setattr(run, "_WARM_UP", 2)
    keeps = Parser("bad", lambda raw: kept.append(b"x" * (4 << 20)), (), [b"a"], mutate.of_bytes)
    assert not run.at_random(keeps, 0, range(40)).good
    kept.clear()
    assert run.at_random(keeps, 0, range(4)).good


def test_inputs_are_shared_out():
    found = list(parsers().values())
    counts = run.shares(found, 10_000)
    assert 10_000 <= sum(counts) <= 10_000 + len(found) and min(counts) > 0
