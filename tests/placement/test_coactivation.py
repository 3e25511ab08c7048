"""Placements by which experts the same tokens choose: counted, searched, read from a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from balanced_load import check_load
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import finished_run

from fomoe_ext.config.io import parse_args
from fomoe_ext.config.sites import SitesConfig
from fomoe_ext.model.evaluate import pair_counts
from fomoe_ext.placement import Placement, coactivation
from fomoe_ext.placement.coactivation import is_small, pairs_together
from fomoe_ext.plan.traffic import full_replica, job_placement
from fomoe_ext.report.measured import measured_coactivation
from fomoe_ext.report.metrics import read_metrics


def random_counts(layers: int, experts: int, seed: int, most: int = 100) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, most, (layers, experts, experts))
    return np.triu(rows) + np.triu(rows, 1).swapaxes(1, 2)


def by_definition(counts: Any, placement: Placement, layer: int) -> int:
    return sum(
        int(counts[layer][a][b])
        for site in range(placement.num_sites)
        for a, b in combinations(placement.resident(layer, site), 2)
    )


# ---- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (37, 1), (50, 3), (40_000, 2)])
def test_pairs_are_counted(tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(tokens, 7, generator=generator).argsort(1)[:, :top_k].int()
    wanted: Counter[tuple[int, int]] = Counter()
    for experts in chosen.tolist():
        wanted.update((a, b) for a in experts for b in experts)
    got = pair_counts(chosen, 7)
    assert got.dtype == torch.int64
    assert got.tolist() == [[wanted[a, b] for b in range(7)] for a in range(7)]


# ---- the search ----------------------------------------------------------------------------------


def planted(layers: int, experts: int, size: int, seed: int) -> tuple[np.ndarray, list[list[set]]]:
    """Counts by which clusters of so many experts are chosen together, and these by layer."""
    counts = random_counts(layers, experts, seed, most=20)
    generator = np.random.default_rng(seed + 1)
    clusters: list[list[set]] = []
    for layer in range(layers):
        order = generator.permutation(experts)
        clusters.append([set(order[i : i + size].tolist()) for i in range(0, experts, size)])
        for cluster in clusters[-1]:
            for a, b in combinations(cluster, 2):
                counts[layer, [a, b], [b, a]] += 60
    return counts, clusters


@pytest.mark.parametrize(
    ("sites", "experts", "replication"),
    [(4, 16, 1), (4, 16, 2), (3, 12, 1), (8, 64, 1), (6, 24, 3)],
)
def test_planted_clusters_are_recovered(sites: int, experts: int, replication: int) -> None:
    size = experts * replication // sites
    counts, clusters = planted(5, experts, size, seed=sites)
    placement = Placement.from_coactivation(counts, num_sites=sites, replication=replication)
    check_load(placement)
    for layer, wanted in enumerate(clusters):
        held = Counter(frozenset(placement.resident(layer, site)) for site in range(sites))
        assert held == {frozenset(cluster): replication for cluster in wanted}


@pytest.mark.parametrize(("sites", "experts"), [(4, 16), (3, 12), (8, 64)])
def test_planted_clusters_are_torn_apart(sites: int, experts: int) -> None:
    """Clusters of as many experts as there are sites: no site needs two of one."""
    counts, clusters = planted(5, experts, sites, seed=sites)
    placement = Placement.from_coactivation(counts, num_sites=sites, replication=1, together=False)
    check_load(placement)
    for layer, wanted in enumerate(clusters):
        for site in range(sites):
            residents = set(placement.resident(layer, site))
            assert all(len(residents & cluster) == 1 for cluster in wanted)


def test_tokens_find_all_or_none_of_their_experts() -> None:
    """The same mean share either way; together it is 0 or 1, apart it is neither."""
    generator = np.random.default_rng(3)
    clusters = np.arange(16).reshape(4, 4)
    tokens = [generator.choice(clusters[i % 4], 2, replace=False) for i in range(400)]
    chosen = torch.tensor(np.array(tokens), dtype=torch.int32)
    counts = pair_counts(chosen, 16)[None]
    found = {}
    for together in (True, False):
        placement = Placement.from_coactivation(
            counts, num_sites=4, replication=1, together=together
        )
        sites = [torch.tensor(placement.resident(0, site)) for site in range(4)]
        found[together] = torch.stack([torch.isin(chosen, held).sum(1) for held in sites]).float()
    assert found[True].mean() == found[False].mean() == 0.5
    assert found[True].unique().tolist() == [0.0, 2.0]
    assert found[False].unique().tolist() == [0.0, 1.0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    sites = draw(st.integers(1, 6))
    replication = draw(st.integers(1, sites))
    experts, layers = draw(st.integers(1, 4)) * sites, draw(st.integers(1, 3))
    seed, most = draw(st.integers(0, 2**30)), draw(st.sampled_from([1, 2, 1000]))
    return random_counts(layers, experts, seed, most), sites, replication


@settings(max_examples=60)
@given(problems(), st.booleans())
def test_every_placement_is_balanced_and_no_worse_than_cyclic(
    problem: tuple[np.ndarray, int, int], together: bool
) -> None:
    counts, sites, replication = problem
    layers, experts = counts.shape[:2]
    placement = Placement.from_coactivation(
        counts, num_sites=sites, replication=replication, together=together
    )
    check_load(placement)
    assert (placement.num_sites, placement.replication) == (sites, replication)
    assert placement == Placement.from_coactivation(
        counts.tolist(), num_sites=sites, replication=replication, together=together
    )
    cyclic = Placement.cyclic(
        num_sites=sites, num_experts=experts, num_layers=layers, replication=replication
    )
    found = pairs_together(counts, placement.table)
    assert found == [by_definition(counts, placement, layer) for layer in range(layers)]
    for ours, theirs in zip(found, pairs_together(counts, cyclic.table), strict=True):
        assert ours >= theirs if together else ours <= theirs


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("replication", [1, 2, 3])
def test_no_swap_of_two_experts_would_be_better(together: bool, replication: int) -> None:
    counts = random_counts(2, 12, seed=replication)
    placement = Placement.from_coactivation(
        counts, num_sites=4, replication=replication, together=together
    )
    found = pairs_together(counts, placement.table)
    tried = 0
    for layer, experts in enumerate(placement.table):
        for a, b in combinations(range(12), 2):
            for s in set(experts[a]) - set(experts[b]):
                for t in set(experts[b]) - set(experts[a]):
                    owners = [set(held) for held in experts]
                    owners[a] ^= {s, t}
                    owners[b] ^= {s, t}
                    table = list(placement.table)
                    table[layer] = tuple(tuple(sorted(held)) for held in owners)
                    other = pairs_together(counts, Placement.from_table(table, 4).table)[layer]
                    assert other <= found[layer] if together else other >= found[layer]
                    tried += 1
    assert tried > 100


@pytest.mark.parametrize("sign", [1, -1])
def test_a_swap_is_the_best_one_between_two_sites(sign: int) -> None:
    swapped = 0
    for seed in range(8):
        counts = sign * coactivation._pairs(random_counts(3, 9, seed, most=10) ** 3)
        start = Placement.random(
            num_sites=3, num_experts=9, num_layers=3, replication=1 + seed % 2, seed=seed
        )
        swaps = coactivation._Swaps(counts, coactivation._incidence(start.table, start.num_sites))
        before = swaps.held.copy()
        swaps._swap(np.arange(3), 0, 1)
        assert np.array_equal(swaps.common, np.matmul(swaps.held.astype(float), counts))
        found = coactivation._objective(counts, swaps.held)
        for layer, held in enumerate(before):
            options = [held]
            for a in np.flatnonzero(held[0] & ~held[1]):
                for b in np.flatnonzero(held[1] & ~held[0]):
                    other = held.copy()
                    other[[0, 1], [a, b]] = False
                    other[[0, 1], [b, a]] = True
                    options.append(other)
            best = coactivation._objective(
                np.repeat(counts[layer][None], len(options), axis=0), np.stack(options)
            )
            assert found[layer] == best.max()
            swapped += not np.array_equal(held, swaps.held[layer])
            assert {frozenset(row) for row in swaps.members[layer].tolist()} == {
                frozenset(np.flatnonzero(row).tolist()) for row in swaps.held[layer]
            }
    assert swapped > 10


def test_a_start_that_ends_worse_gives_way_to_the_cyclic_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted as in the cyclic placement, from a start that no swap can improve."""
    cyclic = Placement.cyclic(num_sites=2, num_experts=8, num_layers=1, replication=1)
    counts = np.zeros((1, 8, 8), dtype=int)
    for site in range(2):
        for a, b in combinations(cyclic.resident(0, site), 2):
            counts[0, [a, b], [b, a]] = 5
    first, second = (list(cyclic.resident(0, site)) for site in range(2))
    mixed = np.zeros((1, 2, 8), dtype=bool)
    mixed[0, 0, first[:2] + second[:2]] = mixed[0, 1, first[2:] + second[2:]] = True
    monkeypatch.setattr(coactivation, "_greedy", lambda *_: mixed.copy())
    monkeypatch.setattr(coactivation, "_swapped", lambda _, held: held)
    assert Placement.from_coactivation(counts, num_sites=2, replication=1) == cyclic
    assert Placement.from_coactivation(counts, num_sites=2, replication=1, together=False) != cyclic


BAD: list[tuple[Any, str]] = [
    ([], "got one of shape"),
    ([[[]]], "got one of shape"),
    ([[1, 2], [2, 1]], r"got one of shape \[2, 2\]"),
    ([[[0, 1, 2], [1, 0, 3]]], r"got one of shape \[1, 2, 3\]"),
    ([[[0, 1], [1]]], "rows of different lengths"),
    ([[[0, 1], [1, 0.5]]], "counts must be ints, got float64"),
    ([[[True, False], [False, True]]], "ints, got bool"),
    ([[["a", "b"], ["b", "a"]]], "counts must be ints"),
    ([[[0, -3], [-3, 0]]], r"counts\[0\]\[0\]\[1\] must be at least 0, got -3"),
    ([[[0, 3], [4, 0]]], r"counts\[0\]\[0\]\[1\] must be counts\[0\]\[1\]\[0\], got 3 and 4"),
    ([[[0, 2**49], [2**49, 0]]], "must add up to less than"),
    ([[[0, 2**70], [2**70, 0]]], "counts must be ints, got object"),
]


@pytest.mark.parametrize(("counts", "message"), BAD)
def test_bad_counts_are_refused(counts: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Placement.from_coactivation(counts, num_sites=1, replication=1)


def test_other_bad_arguments_are_refused() -> None:
    counts = random_counts(1, 6, 0)
    with pytest.raises(ValueError, match=r"num_experts \* replication must be a multiple"):
        Placement.from_coactivation(counts, num_sites=4, replication=1)
    with pytest.raises(ValueError, match=r"replication must be in \[1, num_sites = 2\], got 3"):
        Placement.from_coactivation(counts, num_sites=2, replication=3)
    with pytest.raises(TypeError, match="together"):
        Placement.from_coactivation(counts, num_sites=2, replication=1, together="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the placement's 2 layers of 6 experts, got 1 of 6"):
        pairs_together(
            counts,
            Placement.cyclic(num_sites=2, num_experts=6, num_layers=2, replication=1).table,
        )


def test_needs_no_torch() -> None:
    program = (
        "import sys; from fomoe_ext.placement import Placement;"
        "Placement.from_coactivation([[[0, 1], [1, 0]]], num_sites=2, replication=1);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# ---- of a run ------------------------------------------------------------------------------------


def sizes(layers: int = 2, experts: int = 8) -> list[str]:
    flags = f"--num-layers {layers} --num-experts {experts} --sites 2 --replication 1"
    return flags.split()


def test_a_job_is_placed_by_what_an_earlier_run_has_counted() -> None:
    run = finished_run()
    validation = json.loads((run / "report.json").read_text())["validation"]
    counts = measured_coactivation(run)
    assert counts.tolist() == validation["coactivation"]
    # Of both sites: each slot of a token is counted with itself, and with the other one of two.
    load = np.array(validation["load"])
    assert (counts.diagonal(axis1=1, axis2=2) == load).all()
    assert (counts.sum(axis=2) == 2 * load).all()
    assert load.sum() == 2 * 2 * validation["tokens"]
    assert not any("coactivation" in record for record in read_metrics(run / "metrics.jsonl"))
    for kind in ("together", "apart"):
        config = parse_args([*sizes(), "--placement", kind, "--placement-by", str(run)])
        wanted = Placement.from_coactivation(
            counts, num_sites=2, replication=1, together=kind == "together"
        )
        assert job_placement(config) == wanted
        assert full_replica(config).sites.placement_by is None
    few, many = (
        sum(
            pairs_together(
                counts,
                Placement.from_coactivation(counts, num_sites=2, replication=1, together=t).table,
            )
        )
        for t in (False, True)
    )
    assert (
        few
        < sum(
            pairs_together(
                counts,
                Placement.cyclic(num_sites=2, num_experts=8, num_layers=2, replication=1).table,
            )
        )
        < many
    )


def test_what_is_no_table_of_counts_is_named(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            measured_coactivation(path)
        return str(caught.value)

    assert "there, which does not exist" in message(tmp_path / "there")
    assert "path must be a finished run with report.json" in message(tmp_path)
    (tmp_path / "report.json").write_text('{"validation": {"load": [[1]]}}')
    assert "path must be a run with --coactivation" in message(tmp_path)
    file = tmp_path / "table.json"
    file.write_text("{")
    assert f"path must be a JSON file, got {file}" in message(file)
    file.write_text("[[[0, 1], [2, 0]]]")
    assert f"path {file}: counts[0][0][1] must be counts[0][1][0]" in message(file)
    file.write_text("[[[0, 1], [1, 0]]]")
    assert measured_coactivation(file).tolist() == [[[0, 1], [1, 0]]]
    config = parse_args([*sizes(), "--placement", "apart", "--placement-by", str(file)])
    with pytest.raises(ValueError, match="counts of 2 layers of 8 experts, got 1 of 2"):
        job_placement(config)
    config = parse_args([*sizes(), "--placement", "apart", "--placement-by", "nowhere"])
    with pytest.raises(FileNotFoundError, match="placement_by must be a run folder or a JSON file"):
        job_placement(config)


def test_placement_and_its_counts_need_each_other() -> None:
    for options in ({"placement": "together"}, {"placement_by": Path("run")}):
        with pytest.raises(ValueError, match="need each other"):
            SitesConfig(**options)
    assert SitesConfig(placement="apart", placement_by=Path("run")).replication == 2


def test_large_tables_are_told_when_asked_for() -> None:
    assert is_small(4, 16) and is_small(16, 128) and not is_small(17, 128)
    assert parse_args(["--coactivation"]).run.coactivation and not parse_args([]).run.coactivation
