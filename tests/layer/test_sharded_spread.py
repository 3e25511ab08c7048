"""Experts divided over ranks by load ("cuts"), and layers with any such division."""

from __future__ import annotations

import io
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_layer import HIDDEN, Options, assert_as_alone, mesh_of, message, on_a_rank, parts
from sites import pool
from small_layer import make, tokens

from fomoe_ext.layer.dispatch import DIRECTIONS
from fomoe_ext.placement.spread import chunk_sizes, imbalance, spread_experts
from fomoe_ext.report.measured import measured_load
from fomoe_ext.report.metrics import MetricsFile

pytestmark = pytest.mark.usefixtures("one_thread")

Groups = tuple[tuple[int, ...], ...]


# ---- the cut -------------------------------------------------------------------------------------


def largest(groups: Sequence[Sequence[int]], load: Sequence[float]) -> float:
    return max(math.fsum(load[expert] for expert in group) for group in groups)


def a_load(draw: random.Random, experts: int) -> list[float]:
    """A random load of one kind: even, a few hot experts, many equal ones, or all zero."""
    kinds: tuple[Callable[[], float], ...] = (
        draw.random,
        lambda: draw.paretovariate(1.0),
        lambda: draw.randint(0, 2),
        lambda: float(draw.random() < 0.2),
        lambda: 0,
    )
    kind = draw.choice(kinds)
    return [kind() for _ in range(experts)]


def optimum(ids: Sequence[int], ranks: int, load: Sequence[float]) -> float:
    """The smallest possible largest load, by trying all cuts into groups of nearly equal size."""
    small, larger = divmod(len(ids), ranks)
    best = math.inf

    def place(left: Sequence[int], groups: list[list[int]]) -> None:
        nonlocal best
        if not left:
            best = min(best, largest(groups, load))
            return
        for group in groups:
            others_full = sum(len(each) > small for each in groups) >= larger
            if len(group) < small or (len(group) == small and not others_full):
                group.append(left[0])
                place(left[1:], groups)
                group.pop()

    place(ids, [[] for _ in range(ranks)])
    return best


@pytest.mark.parametrize("seed", range(25))
def test_sharded_spread_is_even_in_number_and_no_worse_than_chunks(seed: int) -> None:
    draw = random.Random(seed)
    experts = draw.randint(1, 40)
    ids = draw.sample(range(experts), draw.randint(0, experts))
    ranks, load = draw.randint(1, 9), a_load(draw, experts)
    groups = spread_experts(ids, ranks, load)
    assert sorted(expert for group in groups for expert in group) == sorted(ids)
    assert all(list(group) == sorted(group) for group in groups)
    sizes = sorted((len(group) for group in groups), reverse=True)
    assert sizes == chunk_sizes(len(ids), ranks)
    assert largest(groups, load) <= largest(spread_experts(ids, ranks), load) * (1 + 1e-12)
    # Neither the order of ids, nor the unit of the load, nor another call changes it.
    assert spread_experts(sorted(ids), ranks, [4 * value for value in load]) == groups


@pytest.mark.parametrize("seed", range(25))
def test_sharded_spread_leaves_no_swap_that_helps(seed: int) -> None:
    draw = random.Random(seed)
    load = [draw.randint(0, 100) for _ in range(draw.randint(2, 30))]
    groups = spread_experts(range(len(load)), draw.randint(2, 6), load)
    totals = [largest([group], load) for group in groups]
    top = max(totals)
    hot = totals.index(top)
    for other, group in enumerate(groups):
        moves = [(load[out], load[into]) for out in groups[hot] for into in group]
        if len(groups[hot]) > len(group):
            moves += [(load[out], 0) for out in groups[hot]]
        for out, into in moves:
            if other != hot:
                assert max(top - out + into, totals[other] + out - into) >= top


def test_sharded_spread_is_near_the_optimum() -> None:
    """In small cases, against all cuts: at most one in fifty misses the optimum, none by 25 %."""
    missed = 0
    for seed in range(200):
        draw = random.Random(seed)
        experts, ranks = draw.randint(1, 8), draw.randint(1, 4)
        load = [
            draw.choice((draw.randint(0, 20), int(draw.paretovariate(1) * 10)))
            for _ in range(experts)
        ]
        groups = spread_experts(range(experts), ranks, load)
        best = optimum(range(experts), ranks, load)
        assert best <= largest(groups, load) <= 1.25 * best
        missed += largest(groups, load) > best
    assert missed <= 4


@pytest.mark.parametrize(
    "load",
    [
        pytest.param([38, 10, 20, 44, 19, 40, 12], id="moves as well as swaps"),
        pytest.param([55, 40, 17, 13, 8, 7, 5], id="from the heaviest first"),
        pytest.param([10, 4, 20, 18, 15, 2, 11], id="from chunks"),
    ],
)
def test_sharded_spread_needs_each_part_of_its_search(load: list[int]) -> None:
    """Each load needs another part of the search to reach the optimum."""
    assert largest(spread_experts(range(7), 2, load), load) == optimum(range(7), 2, load)


def test_sharded_spread_by_hand() -> None:
    assert spread_experts((0, 2, 4, 5, 7), 2) == ((0, 2, 4), (5, 7))
    assert spread_experts((7, 1), 3) == ((1,), (7,), ())
    # Hot neighbours are separated; ties are broken by id.
    load = [8.0, 8.0, 1.0, 1.0, 1.0, 1.0]
    assert spread_experts(range(6), 2, load) == ((1, 2, 3), (0, 4, 5))
    # Groups of 3 and 2, either first. Taking the heaviest first alone would give 7 + 4 + 3 = 14.
    load = [7, 6, 5, 4, 3]
    assert largest(spread_experts(range(5), 2, load), load) == optimum(range(5), 2, load) == 13
    # Only resident experts count, and sums are exact: float64 does not have 2**53 + 1.
    assert spread_experts((1, 3), 2, [math.ldexp(1, 1000), 1, 0, 5e-324]) == ((1,), (3,))
    assert spread_experts(range(4), 2, [2.0**53, 1.0, 1.0, 2.0**53]) == ((0, 1), (2, 3))


def test_sharded_spread_makes_a_skewed_load_even() -> None:
    """A typical skewed load: hot experts side by side, the hottest 30 times the coldest."""
    load = [30.0 / (1 + expert) for expert in range(32)]
    chunks, groups = spread_experts(range(32), 4), spread_experts(range(32), 4, load)
    assert imbalance(chunks, load) > 2.6
    # Seven more experts must join the hottest: the seven coldest.
    assert (0, *range(25, 32)) in groups
    assert largest(groups, load) == math.fsum([load[0], *load[25:]])
    assert imbalance(groups, load) == pytest.approx(4 * largest(groups, load) / sum(load))
    assert imbalance([(0, 1), ()], [1.0, 2.0]) == 2.0
    assert imbalance([(0,), (1,)], [0.0, 0.0]) == 1.0


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: spread_experts([1, 1], 2), ValueError, "experts must be distinct"),
        (lambda: spread_experts([-1, 0], 2), ValueError, "experts must be distinct and not neg"),
        (lambda: spread_experts([0.5], 2), TypeError, r"experts must be ints, got \[0.5\]"),
        (lambda: spread_experts([0], 0), ValueError, "ranks must be at least 1, got 0"),
        (lambda: spread_experts([0], 1.0), TypeError, "ranks must be ints"),
        (lambda: spread_experts([0], 1, [-1.0]), ValueError, r"load\[0\] must be a finite .* -1.0"),
        (lambda: spread_experts([0], 1, [1, math.nan]), ValueError, r"load\[1\] .* got nan"),
        (lambda: spread_experts([0], 1, [math.inf]), ValueError, r"load\[0\] .* got inf"),
        (lambda: spread_experts([0], 1, ["1"]), ValueError, r"load\[0\] .* got '1'"),
        (lambda: spread_experts([0, 3], 1, [1.0]), ValueError, "load must have .* 3, got 1 num"),
        (lambda: imbalance([], [1.0]), ValueError, "groups must have at least one"),
        (lambda: imbalance([(0, 1)], [1.0]), ValueError, "load must have a number"),
    ],
)
def test_sharded_spread_names_what_is_wrong(
    call: Callable[[], Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_sharded_spread_needs_no_torch(tmp_path: Path) -> None:
    table = tmp_path / "load.json"
    table.write_text("[[1, 0]]")
    code = (
        "import sys; from pathlib import Path; from fomoe_ext.placement import spread; "
        "from fomoe_ext.report.measured import measured_load; "
        "load = measured_load(Path(sys.argv[1])); spread.spread_experts([0], 1, load[0]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(table)], check=True)


# ---- the measured load ---------------------------------------------------------------------------


def test_sharded_measured_load_is_that_of_the_last_validation(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"must be a run with a validation, got .*none yet"):
        measured_load(tmp_path)
    for record in (
        {"kind": "validation", "round": 1, "load": [[1, 2], [3, 4]]},
        {"kind": "validation", "round": 2, "load": [[5, 6], [7, 8]]},
        {"kind": "validation", "round": 3},
        {"kind": "round", "load": [[0, 0]]},
    ):
        file.write(record)
    file.close()
    assert measured_load(tmp_path) == [[5.0, 6.0], [7.0, 8.0]]
    table = tmp_path / "load.json"
    table.write_text("[[0.25, 0.75]]")
    assert measured_load(table) == [[0.25, 0.75]]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "path must be a JSON file, got .*load.json: "),
        ("{}", r"path .*load.json must hold a table \[layer\]\[expert\] .*, got {}"),
        ("[]", "must hold a table"),
        ("[[]]", "must hold a table"),
        ("[1, 2]", "must hold a table"),
        ("[[1, 2], [3]]", "rows of one length"),
        ("[[1, 2], [3, -4]]", "layer 1, expert 1 must be a finite number of at least 0, got -4"),
        ("[[1, NaN]]", "must be a JSON file, got .*: JSON has no NaN"),
        ("[[true]]", "layer 0, expert 0 .* got True"),
    ],
)
def test_sharded_measured_load_names_what_is_wrong(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "load.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=text):
        measured_load(path)


def test_sharded_measured_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must be a run folder .*no-run, which"):
        measured_load(tmp_path / "no-run")
    with pytest.raises(FileNotFoundError, match=r"path must be a run folder with metrics\.jsonl"):
        measured_load(tmp_path)


# ---- layers whose ranks hold any share -----------------------------------------------------------

HALF = (0, 2, 3, 7)
TWO, FOUR = (3, 17), (5, 1, 0, 14)
CASES: dict[str, tuple[tuple[int, ...], Groups, Options]] = {
    "mixed": (TWO, ((1, 2, 5, 6), (0, 3, 4, 7)), {}),
    "reversed": (TWO, ((4, 5, 6, 7), (0, 1, 2, 3)), {"expert_bias": True}),
    "half": (
        TWO,
        ((3, 7), (0, 2)),
        {"resident_experts": HALF, "shared_expert_intermediate_size": 20},
    ),
    "uneven": (TWO, ((2,), (0, 3, 7)), {"resident_experts": HALF}),
    "empty-first": (TWO, ((), HALF), {"resident_experts": HALF}),
    "empty-last": (TWO, (HALF, ()), {"resident_experts": HALF}),
    "all-on-one": (TWO, ((), tuple(range(8))), {"expert_bias": True}),
    "idle-rank": ((0, 9), ((0, 6), (1, 2, 3, 4, 5, 7)), {"top_k": 2}),
    "no-tokens": ((0, 0), ((0, 2, 4, 6), (1, 3, 5, 7)), {}),
    "bf16": (TWO, ((0, 3, 4, 7), (1, 2, 5, 6)), {"dtype": torch.bfloat16}),
    "four": (FOUR, ((0, 7), (1, 6), (2, 5), (3, 4)), {"shared_expert_intermediate_size": 20}),
    "four-uneven": (FOUR, ((6,), (0, 1, 4, 5), (), (2, 3, 7)), {"expert_bias": True}),
    "four-pairs": (FOUR, ((0, 5), (2, 7), (3,), (1, 4, 6)), {}),
    "four-empty": (FOUR, ((), (3, 7), (), (0, 2)), {"resident_experts": HALF}),
    "four-bf16": ((5, 1, 8, 14), ((5,), (), (0, 2, 4, 6), (1, 3, 7)), {"dtype": torch.bfloat16}),
}


def case_of(case: str, scope: str = "global") -> tuple[tuple[int, ...], Groups, Options]:
    sizes, groups, changes = CASES[case]
    options = {"num_experts": 8, "top_k": 4, "router_scope": scope} | changes
    return sizes, groups, options


def run(sizes: tuple[int, ...], groups: Groups | None, options: Options) -> list[dict[str, Any]]:
    ranks = len(sizes)
    return pool().run(ranks, on_a_rank, sizes, options | {"rank_experts": groups}, (ranks,))


@pytest.mark.parametrize("scope", ["global", "resident"])
@pytest.mark.parametrize("case", CASES)
def test_sharded_layer_of_any_cut_is_that_of_one_process(case: str, scope: str) -> None:
    sizes, groups, options = case_of(case, scope)
    answers = run(sizes, groups, options)
    assert tuple(answer["experts"] for answer in answers) == groups
    assert_as_alone(answers, sizes, options)


@pytest.mark.parametrize("case", ["mixed", "four-uneven"])
def test_sharded_layer_of_any_cut_sends_what_it_must(case: str) -> None:
    """Expected rows follow from the router's choices, by rank of token and of expert."""
    sizes, groups, options = case_of(case)
    answers = run(sizes, groups, options)
    layer = make(**options)
    holder = {expert: rank for rank, group in enumerate(groups) for expert in group}
    pairs: Counter[tuple[int, int]] = Counter()
    for rank, x in enumerate(parts(sizes)):
        chosen = layer.router.choose(layer.router.logits(x))[1]
        pairs.update((rank, holder[expert]) for expert in chosen.flatten().tolist())
    for rank, answer in enumerate(answers):
        away = 4 * HIDDEN * sum(n for (a, b), n in pairs.items() if a == rank != b)
        back = 4 * HIDDEN * sum(n for (a, b), n in pairs.items() if b == rank != a)
        sent = [answer["bytes_sent"][name] for name in DIRECTIONS]
        assert sent == [away, back, away, back]
        computed = sum(n for (_, b), n in pairs.items() if b == rank)
        assert answer["stats"].rows.item() == computed


def test_sharded_replicas_of_any_cut_average_their_gradients() -> None:
    options = {"num_experts": 7, "top_k": 3, "expert_bias": True}
    groups = ((1, 6), (0, 2, 3, 4, 5))
    with_cut = options | {"rank_experts": groups}
    answers = pool().run(4, on_a_rank, FOUR, with_cut, (2, 2))
    assert tuple(answer["experts"] for answer in answers) == groups * 2
    assert_as_alone(answers, FOUR, options)


def test_sharded_chunks_given_are_the_default_to_the_bit() -> None:
    sizes, _, options = case_of("half")
    given, default = run(sizes, ((0, 2), (3, 7)), options), run(sizes, None, options)
    for one, other in zip(given, default, strict=True):
        assert torch.equal(one["y"], other["y"]) and torch.equal(one["x.grad"], other["x.grad"])
        for name, grad in one["gradients"].items():
            assert torch.equal(grad, other["gradients"][name]), name


def facts(rank: int, ranks: int) -> dict[str, Any]:
    """What a layer with a cut reports, built directly and in other ways."""
    groups = [[6, 1], [5, 0, 3]]  # in any order
    options = {"resident_experts": (0, 1, 3, 5, 6), "num_experts": 7, "router_scope": "resident"}
    cut = {"rank_experts": groups, "mesh": mesh_of(ranks)}
    layer = make(**options, **cut)
    plain = make(**options)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    again = make(device="meta", **options, **cut)
    again.to_empty(device="cpu")
    again.reset_parameters()
    again.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    x = tokens(5, HIDDEN, seed=rank)
    layer.balance = plain.balance = "switch"
    for each in (layer, plain):
        each(x)
    return {
        "rank_experts": layer.dispatch.rank_experts,
        "default": make(**options, mesh=mesh_of(ranks)).dispatch.rank_experts,
        "own": layer.experts.resident_experts,
        "site": (layer.site_experts, layer.dispatch.resident_ids.tolist()),
        "places": layer.dispatch.resident_index.tolist(),
        "allowed": torch.equal(layer.allowed, plain.allowed),
        "aux": torch.equal(layer.aux_loss, plain.aux_loss) and plain.aux_loss.item() > 0,
        "again": torch.equal(layer(x), again(x)),
        "keys": layer.state_dict().keys() == plain.state_dict().keys(),
    }


def test_sharded_layer_reports_its_cut() -> None:
    for rank, found in enumerate(pool().run(2, facts)):
        assert found["rank_experts"] == ((1, 6), (0, 3, 5))
        assert found["default"] == ((0, 1, 3), (5, 6))
        assert found["own"] == found["rank_experts"][rank]
        assert found["site"] == ((0, 1, 3, 5, 6), [0, 1, 3, 5, 6])
        assert found["places"] == [2, 0, -1, 3, -1, 4, 1]
        assert found["allowed"] and found["aux"] and found["again"] and found["keys"]


# ---- errors --------------------------------------------------------------------------------------


def bad_cuts(rank: int, ranks: int) -> dict[str, str]:
    mesh = mesh_of(ranks)
    x = tokens(4, HIDDEN)
    cuts: dict[str, Any] = {
        "too few": [range(6)],
        "too many": [range(6), (), ()],
        "twice": [(0, 1, 2), (2, 3, 4, 5)],
        "twice here": [(0, 0, 1, 2), (3, 4, 5)],
        "missing": [(0, 1, 2), (3, 4)],
        "stranger": [(0, 1, 2), (3, 4, 5, 6)],
        "not ints": [(0, 1.5), (2, 3, 4, 5)],
        "no list": 3,
    }
    found = {
        name: message(lambda cut=cut: make(mesh=mesh, rank_experts=cut))
        for name, cut in cuts.items()
    }
    even, odd = ((0, 1, 2), (3, 4, 5)), ((0, 1, 2, 3, 4), (5,))
    for name, other in (("differs", ((0, 1, 3), (2, 4, 5))), ("sizes differ", odd)):
        cut = (even, other)[rank]
        found[name] = message(lambda cut=cut: make(mesh=mesh, rank_experts=cut)(x))
    cut = (None, odd)[rank]
    found["default differs"] = message(lambda: make(mesh=mesh, rank_experts=cut)(x))
    one = mesh_of(ranks, 1)
    found["one rank, wrong"] = message(lambda: make(mesh=one, rank_experts=[range(5)]))
    layer = make(mesh=one, rank_experts=[range(6)])
    found["one rank"] = str((layer.dispatch, layer.experts.resident_experts))
    found["still works"] = message(lambda: make(mesh=mesh, rank_experts=odd)(x).sum().backward())
    return found


def test_sharded_cuts_that_are_wrong_are_named() -> None:
    once = "ValueError: rank_experts must hold each of the site's experts [0, 1, 2, 3, 4, 5] once"
    entries = (
        "ValueError: rank_experts must have an entry for each rank of the mesh's axis 'expert'"
    )
    differ = "in layer 1 they differ in rank_experts, by rank: ["
    for found in pool().run(2, bad_cuts):
        assert found["too few"] == f"{entries}, 2, got 1"
        assert found["too many"] == f"{entries}, 2, got 3"
        assert found["twice"] == f"{once}, got [[0, 1, 2], [2, 3, 4, 5]]"
        assert found["twice here"].startswith(once)
        assert found["missing"].startswith(once)
        assert found["stranger"].startswith(once)
        assert found["not ints"].startswith("TypeError: rank_experts must hold ints by rank")
        assert found["no list"] == "TypeError: rank_experts must hold ints by rank, got 3"
        for name in ("differs", "sizes differ", "default differs"):
            assert found[name].startswith("RuntimeError: ") and differ in found[name], found[name]
        assert found["one rank, wrong"].startswith(once)
        assert found["one rank"] == "(None, (0, 1, 2, 3, 4, 5))"
        assert found["still works"] == "no error"


def test_sharded_cut_needs_a_mesh() -> None:
    with pytest.raises(ValueError, match=r"rank_experts must be None without a mesh, got "):
        make(rank_experts=[range(6)])
