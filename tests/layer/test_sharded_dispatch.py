"""A layer whose experts are sharded over a site's ranks computes the same as one process."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_layer import (
    HIDDEN,
    Options,
    assert_as_alone,
    gradients,
    mesh_of,
    message,
    on_a_rank,
    own_loss,
    parts,
)
from sites import pool
from small_layer import make, normalised_error, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fomoe_ext.layer.dispatch import (
    DIRECTIONS,
    ExpertAxis,
    average_dense,
    average_replicas,
    sharded_names,
)
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.placement.spread import chunk_sizes

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- against one process -------------------------------------------------------------------------


EVEN, UNEVEN, IDLE = (12, 12), (3, 17), (0, 9)
HALF = (0, 2, 3, 7)
CASES: dict[str, tuple[tuple[int, ...], Options]] = {
    "all": (EVEN, {}),
    "half": (UNEVEN, {"resident_experts": HALF}),
    "half-by-router": (UNEVEN, {"resident_experts": HALF, "router_scope": "resident"}),
    "few-by-router": (UNEVEN, {"resident_experts": (1, 6), "router_scope": "resident"}),
    "shared-expert": (UNEVEN, {"resident_experts": HALF, "shared_expert_intermediate_size": 20}),
    "biases": (
        UNEVEN,
        {"resident_experts": HALF, "expert_bias": True, "activation": "clamped_swiglu"},
    ),
    "top-1": (UNEVEN, {"top_k": 1}),
    "top-1-half": (UNEVEN, {"top_k": 1, "resident_experts": HALF}),
    "idle-rank": (IDLE, {"shared_expert_intermediate_size": 20}),
    "no-tokens": ((0, 0), {}),
    "nothing-resident": (EVEN, {"resident_experts": (), "shared_expert_intermediate_size": 20}),
    "odd-number": (UNEVEN, {"resident_experts": (0, 1, 2, 4, 6)}),
    "one-expert": (UNEVEN, {"resident_experts": (5,)}),
    "unchosen": ((1, 1), {"top_k": 1}),
    "bf16": (UNEVEN, {"dtype": torch.bfloat16, "shared_expert_intermediate_size": 20}),
    "three": ((4, 0, 11), {"resident_experts": (0, 1, 2, 4), "expert_bias": True}),
    "four": ((5, 1, 0, 14), {"shared_expert_intermediate_size": 20}),
    "four-half": ((5, 1, 0, 14), {"resident_experts": (2, 3, 4, 5, 7), "expert_bias": True}),
    "four-one": ((5, 1, 0, 14), {"resident_experts": (2,), "router_scope": "resident"}),
    "four-bf16": ((5, 1, 8, 14), {"dtype": torch.bfloat16, "resident_experts": HALF}),
}


def options_of(case: str) -> tuple[tuple[int, ...], Options]:
    sizes, changes = CASES[case]
    return sizes, {"num_experts": 8, "top_k": 4} | changes


@pytest.mark.parametrize("case", CASES)
def test_sharded_layer_is_that_of_one_process(case: str) -> None:
    sizes, options = options_of(case)
    ranks = len(sizes)
    answers = pool().run(ranks, on_a_rank, sizes, options, (ranks,))
    assert_as_alone(answers, sizes, options)
    if case == "unchosen":
        loads = sum(answer["stats"].load for answer in answers)
        assert (loads == 0).any()
    # Each expert on one rank, chunks as even as they can be.
    site = answers[0]["site_experts"]
    assert sum((answer["experts"] for answer in answers), ()) == site
    assert [len(a["experts"]) for a in answers] == chunk_sizes(len(site), ranks)


@pytest.mark.parametrize("case", ["half", "biases", "bf16", "four-half"])
def test_sharded_layer_gives_the_same_bits_twice(case: str) -> None:
    sizes, options = options_of(case)
    first, second = (
        pool().run(len(sizes), on_a_rank, sizes, options, (len(sizes),)) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["y"], other["y"])
        assert torch.equal(one["x.grad"], other["x.grad"])
        for name, grad in one["gradients"].items():
            assert torch.equal(grad, other["gradients"][name]), name


def test_sharded_replicas_average_their_gradients() -> None:
    sizes = (5, 1, 0, 14)
    options = {
        "num_experts": 7,
        "top_k": 3,
        "expert_bias": True,
        "shared_expert_intermediate_size": 20,
    }
    answers = pool().run(4, on_a_rank, sizes, options, (2, 2))
    assert [answer["rank"] for answer in answers] == [0, 1, 0, 1]
    assert answers[0]["experts"] == answers[2]["experts"] == (0, 1, 2, 3)
    assert answers[1]["experts"] == answers[3]["experts"] == (4, 5, 6)
    assert_as_alone(answers, sizes, options)
    for one, other in ((0, 2), (1, 3)):
        for name, grad in answers[one]["gradients"].items():
            assert torch.equal(grad, answers[other]["gradients"][name]), name


# ---- what travels, what is counted ---------------------------------------------------------------


def holder_of(site: tuple[int, ...], ranks: int) -> dict[int, int]:
    sizes = chunk_sizes(len(site), ranks)
    holders = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    return dict(zip(site, holders, strict=True))


@pytest.mark.parametrize("case", ["all", "half", "half-by-router", "four-bf16", "one-expert"])
def test_sharded_exchange_carries_only_rows_for_other_ranks(case: str) -> None:
    sizes, options = options_of(case)
    ranks = len(sizes)
    answers = pool().run(ranks, on_a_rank, sizes, options, (ranks,))
    layer = make(**options)
    holder = holder_of(layer.site_experts, ranks)
    dtype = options.get("dtype", torch.float32)
    pairs: Counter[tuple[int, int]] = Counter()  # (rank of the token, of the expert): rows
    for rank, x in enumerate(parts(sizes, dtype)):
        top_k = min(options["top_k"], len(holder)) if layer.allowed is not None else None
        _, chosen = layer.router.choose(layer.router.logits(x), layer.allowed, top_k)
        for expert in chosen.flatten().tolist():
            if expert in holder:
                pairs[rank, holder[expert]] += 1
    row = HIDDEN * dtype.itemsize
    for rank, answer in enumerate(answers):
        away = row * sum(n for (a, b), n in pairs.items() if a == rank != b)
        back = row * sum(n for (a, b), n in pairs.items() if b == rank != a)
        expected = dict(zip(DIRECTIONS, (away, back, away, back), strict=True))
        assert {name: answer["bytes_sent"][name] for name in DIRECTIONS} == expected
        stats = answer["stats"]
        own = sum(n for (a, _), n in pairs.items() if a == rank)
        assert stats.rows.item() == sum(n for (_, b), n in pairs.items() if b == rank)
        slots = stats.load.sum().item()
        assert stats.skipped_share.item() == pytest.approx(1 - own / slots)
    if case == "one-expert":  # the second rank holds no expert, so only its own rows travel
        assert answers[0]["bytes_sent"]["tokens"] == 0 < answers[1]["bytes_sent"]["tokens"]


def nothing_resident(rank: int, ranks: int) -> dict[str, int]:
    layer = make(mesh=mesh_of(ranks), resident_experts=())
    layer(tokens(8, HIDDEN).requires_grad_()).sum().backward()
    return layer.dispatch.bytes_sent


def test_sharded_exchange_of_skipped_slots_is_empty() -> None:
    for sent in pool().run(2, nothing_resident):
        counts = sent.pop("counts")
        assert counts > 0 and not any(sent.values())


def measures(rank: int, ranks: int, options: Options) -> list[Any]:
    """Statistics, loss and bias of a layer with a mesh and of one without, on the same tokens."""
    found = []
    for more in ({"mesh": mesh_of(ranks)}, {}):
        layer = make(**options, **more)
        layer(tokens(6 + rank, HIDDEN, seed=rank))
        layer.update_selection_bias()
        stats = layer.stats._replace(rows=torch.zeros(()))
        found.append((*stats, layer.aux_loss.detach(), layer.router.selection_bias))
    return found


@pytest.mark.parametrize("scope", ["global", "resident"])
@pytest.mark.parametrize("balance", ["switch", "entropy", "bias"])
def test_sharded_layer_measures_its_own_tokens(scope: str, balance: str) -> None:
    options = {"router_scope": scope, "balance": balance, "resident_experts": (0, 1, 2, 5)}
    for got, wanted in pool().run(2, measures, options | {"router_z_loss_coef": 0.1}):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert wanted[-2] > 0 or balance != "switch"
        assert (wanted[-1] != 0).any() == (balance == "bias")


# ---- memory, state, copies -----------------------------------------------------------------------


def shapes_and_state(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    layer = make(mesh=mesh_of(ranks), num_experts=7, expert_bias=True)
    whole = make(num_experts=7, expert_bias=True)
    shapes = {n: tuple(p.shape) for n, p in layer.experts.named_parameters()}
    equal = all(
        torch.equal(mine, theirs)
        for expert in layer.experts.resident_experts
        for mine, theirs in zip(
            layer.experts.expert_weights(expert),
            whole.experts.expert_weights(expert),
            strict=True,
        )
    )
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    again = MoELayer(HIDDEN, 20, 7, 3, expert_bias=True, seed=0, mesh=mesh_of(ranks), device="meta")
    again.to_empty(device="cpu")
    again.reset_parameters()
    other = copy.deepcopy(layer)
    again.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    x = tokens(5, HIDDEN, seed=rank)
    ys = [each(x) for each in (layer, other, again)]
    dense = nn.Sequential(nn.Linear(HIDDEN, 20), nn.SiLU(), nn.Linear(20, HIDDEN))
    for seed, parameter in enumerate(dense.parameters()):  # the same on all ranks
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        copied = MoELayer.from_dense(dense, 7, top_k=3, mesh=mesh_of(ranks))(x)
        difference = normalised_error(copied, dense(x))
    return {
        "shapes": shapes,
        "equal_weights": equal,
        "same_bits": all(torch.equal(ys[0], y) for y in ys[1:]),
        "own_sent": other.dispatch.bytes_sent is not layer.dispatch.bytes_sent,
        "from_dense": difference,
    }


def test_sharded_rank_allocates_its_own_experts_only(tmp_path: Any) -> None:
    for rank, found in enumerate(pool().run(3, shapes_and_state, str(tmp_path))):
        held = (3, 2, 2)[rank]
        assert found["shapes"] == {
            "expand_weight": (held, 40, 24),
            "contract_weight": (held, 24, 20),
            "expand_bias": (held, 40),
            "contract_bias": (held, 24),
        }
        assert found["equal_weights"] and found["same_bits"] and found["own_sent"]
        assert found["from_dense"] < 1e-6


def totals(rank: int, ranks: int) -> tuple[list[Tensor], list[Tensor]]:
    """main_grad after two passes, and twice the gradient of one."""
    mesh = mesh_of(1, ranks)
    layers = [make(mesh=mesh, dtype=torch.bfloat16) for _ in range(2)]
    for p in (layers[0].experts.expand_weight, layers[0].experts.contract_weight):
        p.main_grad = torch.zeros(p.shape)
    x = tokens(6 + rank, HIDDEN, seed=rank, dtype=torch.bfloat16)
    for layer in (layers[0], layers[0], layers[1]):
        own_loss(layer(x), rank).backward()
    average_replicas(layers[0], mesh)
    assert layers[0].experts.expand_weight.grad is None
    names = ("expand_weight", "contract_weight")
    return (
        [getattr(layers[0].experts, name).main_grad for name in names],
        [2 * getattr(layers[1].experts, name).grad.float() for name in names],
    )


def test_sharded_experts_add_to_main_grad() -> None:
    for got, wanted in pool().run(2, totals):
        for total, twice in zip(got, wanted, strict=True):
            assert total.dtype == torch.float32
            assert normalised_error(total, twice) < 2**-8


# ---- with torch's own ----------------------------------------------------------------------------


def in_other_ways(rank: int, ranks: int) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """One pass of two layers eagerly, compiled, checkpointed, under DDP."""
    mesh = mesh_of(ranks)
    x = tokens(6 + rank, HIDDEN, seed=rank)
    experts = {"num_experts": 7}

    def model() -> nn.Sequential:
        layers = [
            make(mesh=mesh, shared_expert_intermediate_size=8, layer_index=i, **experts)
            for i in range(2)
        ]
        return nn.Sequential(*layers)

    def checkpointed(inner: nn.Module, x: Tensor) -> Tensor:
        for layer in inner:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x

    found = {}
    for way in ("eager", "compiled", "checkpointed", "ddp"):
        inner = model()
        outer: Any = inner
        if way == "compiled":
            outer = torch.compile(inner, backend="aot_eager")
        elif way == "ddp":
            inner._ddp_params_and_buffers_to_ignore = sharded_names(inner)
            outer = DistributedDataParallel(inner)
        own = x.clone().requires_grad_()
        y = checkpointed(inner, own) if way == "checkpointed" else outer(own)
        own_loss(y, rank).backward()
        if way != "ddp":
            average_dense(inner, mesh)
        found[way] = y.detach(), gradients(inner)
    return found


def test_sharded_layers_in_compile_checkpointing_and_ddp() -> None:
    for found in pool().run(2, in_other_ways):
        y, wanted = found.pop("eager")
        for way, (other, got) in found.items():
            assert normalised_error(other, y) < 2e-6, way
            assert got.keys() == wanted.keys()
            for name, grad in got.items():
                assert normalised_error(grad, wanted[name]) < 2e-6, (way, name)


def under_autocast(rank: int, ranks: int) -> list[list[Tensor]]:
    """y and the gradients of x and of the router, with a mesh and without, on the same tokens."""
    found = []
    for more in ({"mesh": mesh_of(ranks)}, {}):
        layer = make(shared_expert_intermediate_size=8, **more)
        x = tokens(6 + rank, HIDDEN, seed=rank).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        own_loss(y, rank).backward()
        found.append([y.detach().float(), x.grad, layer.router.weight.grad])
        assert all(grad.dtype == torch.float32 for grad in gradients(layer).values())
    return found


def test_sharded_layer_under_autocast() -> None:
    for got, wanted in pool().run(2, under_autocast):
        for mine, theirs in zip(got, wanted, strict=True):
            assert normalised_error(mine, theirs) < 2**-7


# ---- errors --------------------------------------------------------------------------------------


def bad_calls(rank: int, ranks: int) -> dict[str, str]:
    mesh = mesh_of(ranks)
    other = init_device_mesh("cpu", (ranks,), mesh_dim_names=("model",))
    first = DeviceMesh("cpu", [0], mesh_dim_names=("expert",))
    layer = make(mesh=mesh)
    x = tokens(4, HIDDEN)
    ways = {
        "layers": lambda: make(mesh=mesh, layer_index=rank)(x),
        "residents": lambda: make(mesh=mesh, resident_experts=range(2 + rank))(x),
        "dtypes": lambda: make(mesh=mesh, dtype=(torch.float32, torch.float16)[rank])(
            x.to((torch.float32, torch.float16)[rank])
        ),
        "gradient of x": lambda: layer(x.clone().requires_grad_(rank == 1)),
        "no_grad": lambda: torch.set_grad_enabled(rank == 1).__class__ and layer(x),
    }
    found = {name: message(call) for name, call in ways.items()}
    torch.set_grad_enabled(True)
    return found | {
        "no axis": message(lambda: make(mesh=other)),
        "unnamed": message(lambda: make(mesh=init_device_mesh("cpu", (ranks,)))),
        "no mesh": message(lambda: make(mesh=dist.group.WORLD)),
        "outside": message(lambda: make(mesh=first)),
        "device": message(lambda: ExpertAxis(mesh, "cuda")),
        "no replica": message(lambda: average_replicas(layer, mesh)),
        "residents change": message(lambda: layer.set_resident_experts(range(3))),
        "pickle": message(lambda: pickle.dumps(layer)),
        "still works": message(lambda: layer(x).sum().backward()),
    }


def test_sharded_layers_name_what_is_wrong() -> None:
    for rank, found in enumerate(pool().run(2, bad_calls)):
        alike = (
            "RuntimeError: the ranks of the mesh's axis 'expert' must make the same calls of the "
            "same layers"
        )
        for name, values in (
            ("layers", f"in layer {rank} they differ in layer_index, by rank: [0, 1]"),
            ("residents", "in layer 1 they differ in site's experts and sizes, by rank: ["),
            ("dtypes", "in layer 1 they differ in dtype, by rank: [0, 2]"),
            ("gradient of x", "in layer 1 they differ in gradient of x, by rank: [0, 1]"),
            ("no_grad", "in layer 1 they differ in gradient of the experts, by rank: [0, 1]"),
        ):
            assert found[name].startswith(alike) and values in found[name], found[name]
        assert found["no axis"] == ("ValueError: mesh must have an axis 'expert', got 'model'")
        assert found["unnamed"].endswith("an axis 'expert', got none with a name")
        assert found["no mesh"].startswith("TypeError: mesh must be a DeviceMesh, got ")
        outside = "ValueError: mesh must hold this process, rank 1, got "
        assert found["outside"].startswith("no error" if rank == 0 else outside)
        assert (
            found["device"] == "ValueError: mesh must be for cuda, the device of the layer, got cpu"
        )
        assert "mesh must have an axis 'replica', got 'expert'" in found["no replica"]
        assert found["residents change"].startswith(
            "RuntimeError: a layer sharded over a mesh cannot"
        )
        assert found["pickle"].startswith(
            "TypeError: a layer sharded over a mesh cannot be pickled"
        )
        assert found["still works"] == "no error"


def one_rank(rank: int, ranks: int) -> list[Any]:
    """A mesh axis of one rank changes nothing."""
    mesh = mesh_of(ranks, 1)
    layers = [make(mesh=mesh), make()]
    for layer in layers:
        own_loss(layer(tokens(5, HIDDEN, seed=rank)), rank).backward()
    average_dense(layers[0], mesh)
    average_replicas(layers[0], mesh)  # there are none left to average
    return [layers[0].dispatch, gradients(layers[0]), gradients(layers[1])]


def test_sharded_over_one_rank_is_not_sharded() -> None:
    (dispatch, first, own), (_, second, other) = pool().run(2, one_rank)
    assert dispatch is None
    for name, grad in first.items():
        assert torch.equal(grad, second[name])
        assert normalised_error(grad, (own[name] + other[name]) / 2) < 1e-6
