"""Sites of several ranks give the same bits and bytes as sites of one rank, for every option."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from outer_model import (
    EXPERTS,
    LAYERS,
    SmallModel,
    bits,
    cyclic_placement,
    noise,
    pieces,
    random_placement,
)
from sites import pool
from torch import Tensor, nn

from fomoe_ext.layer.mesh import make_mesh
from fomoe_ext.outer import OuterOptions, OuterSync
from fomoe_ext.placement import Placement

BUCKET_BYTES = 4 * 131  # several buckets, and none that ends with a piece
ROUNDS = 3

CODECS = ["fp32", "bf16", "int8", "int8-128", "int4", "int4-128", "int2", "int2-128", "topk"]


class Result(NamedTuple):
    pieces: dict[Any, Tensor]
    biases: list[Tensor]
    hashes: dict[str, str]
    sent: int
    predicted: int
    norms: list[float]
    state: tuple[int, int, int]
    mine: set[Any]


def place(num_sites: int, replication: int) -> Placement:
    return cyclic_placement(num_sites, replication)


@torch.no_grad()
def local_steps(model: nn.Module, inner: torch.optim.Optimizer, site: int, step: int) -> None:
    """Changes every piece of a site, its moments and gradient, whichever rank has it."""
    stacks = {
        id(layer.experts.part(part)): (layer, part)
        for layer in model.layers
        for part in layer.experts.parts
    }

    def of(what: str, name: str, parameter: Tensor) -> Tensor:
        if id(parameter) not in stacks:
            return 0.01 * noise((what, site, step, name), *parameter.shape)
        layer, part = stacks[id(parameter)]
        rows = [
            noise((what, site, step, layer.layer_index, part, e), *parameter.shape[1:])
            for e in layer.experts.resident_experts
        ]
        return 0.01 * torch.stack(rows) if rows else torch.zeros_like(parameter)

    for name, parameter in model.named_parameters():
        parameter += of("change", name, parameter)
        parameter.grad = of("gradient", name, parameter)
        inner.state[parameter]["exp_avg"] = of("exp_avg", name, parameter)
        inner.state[parameter]["exp_avg_sq"] = of("exp_avg_sq", name, parameter).square()
    for index, layer in enumerate(model.layers):
        layer.router.selection_bias += noise(("bias", site, step, index), EXPERTS)


def meet(
    process: int,
    processes: int,
    shape: tuple[int, int],
    replication: int,
    scope: str,
    options: dict[str, Any],
) -> Result:
    """Rounds at one rank; shape = (replicas, expert ranks) of every site."""
    ranks = shape[0] * shape[1]
    num_sites, site = processes // ranks, process // ranks
    mesh = make_mesh(num_sites, ranks, shape[0]) if ranks > 1 else None
    placement = place(num_sites, replication)
    model = SmallModel(placement, site, scope, balance="bias", mesh=mesh)
    inner = torch.optim.AdamW(model.parameters())
    sync = OuterSync(
        model,
        placement,
        site,
        OuterOptions(bucket_bytes=BUCKET_BYTES, **options),
        inner_optimizer=inner,
        mesh=mesh,
        timeout_s=20,
    )
    norms, predicted, per_round = [], 0, options.get("local_steps", 1)
    for step in range(ROUNDS * per_round):
        local_steps(model, inner, site, step)
        if options.get("optimizer") == "ddp":
            sync.reduce_gradients()
            norms.append(float(sync.clip_grad_norm_(0.05)))
        sync.after_step()
        if (step + 1) % per_round == 0:
            predicted += sync.predicted_bytes(1, clip=True)
            sync.step()
    sync.finish()
    sync.verify()
    own = pieces(model)
    if options.get("optimizer") == "ddp":
        own |= {("grad", *key): value for key, value in pieces(model, lambda p: p.grad).items()}
    if options.get("optimizer") == "local-adamw":
        for name in ("exp_avg", "exp_avg_sq"):
            found = pieces(model, lambda p, name=name: inner.state[p][name])
            own |= {(name, *key): value for key, value in found.items()}
    return Result(
        own,
        [layer.router.selection_bias.clone() for layer in model.layers],
        sync.hashes(),
        sync.bytes_sent,
        predicted,
        norms,
        sync.state_bytes(),
        {e for layer in model.layers for e in layer.experts.resident_experts},
    )


def compare(
    shape: tuple[int, int], replication: int, scope: str, num_sites: int = 2, **options: Any
) -> None:
    ranks = shape[0] * shape[1]
    alone = pool().run(num_sites, meet, (1, 1), replication, scope, options)
    many = pool().run(num_sites * ranks, meet, shape, replication, scope, options)
    for site, one in enumerate(alone):
        of_site = many[site * ranks : (site + 1) * ranks]
        found: set[Any] = set()
        for part in of_site:
            for key, value in part.pieces.items():
                assert bits(value) == bits(one.pieces[key]), (site, key)
            for mine, wanted in zip(part.biases, one.biases, strict=True):
                assert bits(mine) == bits(wanted)
            found |= part.pieces.keys()
            assert part.norms == pytest.approx(one.norms, rel=1e-6)
        assert found == one.pieces.keys()
        assert sum(part.sent for part in of_site) == one.sent == one.predicted
        assert {part.predicted for part in of_site} == {one.predicted}
        # The site stores the outer optimizer's state once, not once per rank.
        kept = [sum(part.state) for part in of_site]
        assert sum(kept) == sum(one.state)
        if options.get("optimizer") != "ddp":  # which may keep the errors of sums alone
            assert max(kept) < 0.9 * sum(kept)


@pytest.mark.parametrize("scope", ["global", "resident"])
@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.parametrize("codec", CODECS)
def test_two_ranks_per_site_are_one(codec: str, replication: int, scope: str) -> None:
    compare((1, 2), replication, scope, codec=codec)


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "int4", "rounding": "stochastic", "seed": 3},
        {"codec": "int8", "error_feedback": False, "rescale": True},
        {"optimizer": "fedavg", "router_mean": "all"},
        {"optimizer": "local-adamw", "codec": "bf16", "moment_periods": (1, 2)},
        {"optimizer": "ddp"},
        {"optimizer": "ddp", "codec": "int8"},
        {"codec": "int8", "fragments": 2, "local_steps": 2},
        {"codec": "int8", "fragments": 2, "local_steps": 4, "overlap": 1},
        {"codec": "int4", "local_steps": 3, "overlap": 2, "overlap_alpha": 0.3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)], ids=["expert", "replica"])
def test_options(options: dict[str, Any], shape: tuple[int, int]) -> None:
    compare(shape, 1, "resident", **options)


def test_one_site_of_many_ranks() -> None:
    compare((2, 2), 1, "global", num_sites=1)


def test_no_rank_allocates_experts_of_another() -> None:
    results = pool().run(4, meet, (1, 2), 1, "global", {})
    for site in range(2):
        first, second = results[2 * site].pieces, results[2 * site + 1].pieces
        shared = {key for key in first.keys() & second.keys() if key[0] == "expert"}
        assert not shared
    held = [sum(key[0] == "expert" for key in r.pieces) for r in results]
    assert sum(held) == 2 * EXPERTS * LAYERS  # two matrices each


def bad_mesh(process: int, processes: int, what: str) -> str:
    site = process // 2
    mesh = make_mesh(2, 2)
    dist.barrier()  # no rank leaves while another one still connects
    placement = place(2, 1)
    try:
        if what == "no mesh in the model":
            model = SmallModel(placement, site)
            OuterSync(model, placement, site, mesh=mesh, timeout_s=20)
        elif what == "no mesh in OuterSync":
            model = SmallModel(placement, site, mesh=mesh)
            OuterSync(model, placement, site, timeout_s=20)
        elif what == "another site":
            model = SmallModel(placement, site, mesh=mesh)
            OuterSync(model, placement, 1 - site, mesh=mesh, timeout_s=20)
        elif what == "other ranks per site":
            make_mesh(1, 3)
        elif what == "reshuffle":
            model = SmallModel(placement, site, mesh=mesh)
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            sync = OuterSync(model, placement, site, mesh=mesh, inner_optimizer=inner, timeout_s=20)
            sync.reshuffle(random_placement(2, 1, seed=1))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no mesh in the model", "the same mesh"),
        ("no mesh in OuterSync", "rank"),
        ("another site", "mesh must have this process in site"),
        ("other ranks per site", "must have 3 processes"),
        ("reshuffle", "several ranks"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(what: str, words: str) -> None:
    for text in pool().run(4, bad_mesh, what):
        assert words in text


def different(process: int, processes: int, mode: str) -> str:
    """One rank of site 1 holds something else after the meeting."""
    site, rank = divmod(process, 2)
    mesh, placement = make_mesh(3 if processes == 6 else 2, 2), place(processes // 2, 2)
    model = SmallModel(placement, site, mesh=mesh)
    sync = OuterSync(
        model,
        placement,
        site,
        OuterOptions(bucket_bytes=BUCKET_BYTES, on_mismatch=mode),
        mesh=mesh,
        timeout_s=20,
    )
    if (site, rank) == (1, 1):
        sync.state.anchors[0][0] += 1
    try:
        sync.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_difference_on_one_rank_is_named_by_all() -> None:
    for text in pool().run(4, different, "stop"):
        assert "hold other bits of" in text


def not_finite(process: int, processes: int) -> str:
    site, rank = divmod(process, 2)
    mesh, placement = make_mesh(2, 2), place(2, 1)
    model = SmallModel(placement, site, mesh=mesh)
    sync = OuterSync(
        model, placement, site, OuterOptions(bucket_bytes=BUCKET_BYTES), mesh=mesh, timeout_s=20
    )
    before = pieces(model)
    if (site, rank) == (0, 1):
        with torch.no_grad():
            model.layers[1].experts.expand_weight[0, 0, 0] = float("nan")
    try:
        sync.step()
    except RuntimeError as error:
        after = pieces(model)
        kept = all(bits(before[key]) == bits(after[key]) for key in before)
        assert kept or (site, rank) == (0, 1)
        return str(error)
    return ""


def test_a_value_on_one_rank_that_is_not_finite_stops_all() -> None:
    for text in pool().run(4, not_finite):
        assert "NaN or infinite" in text
        assert "site 0" in text
