"""MoELayer against a dense fp64 computation; resident experts; autocast, compile, copies."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from small_layer import TOLERANCE, check_against_dense, make, normalised_error, tokens
from torch import nn

from fomoe_ext import ops
from fomoe_ext.activations import ACTIVATIONS
from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.router import Router
from fomoe_ext.layer.seeding import fill_normal_

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("router_scope", ["global", "resident"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_forward_and_backward_match_fp64(
    dtype: torch.dtype, router_scope: str, activation: str, scoring: str
) -> None:
    layer = make(
        dtype=dtype,
        router_scope=router_scope,
        activation=activation,
        router_scoring=scoring,
        resident_experts=[0, 3, 4, 5],
    )
    check_against_dense(layer, tokens(3, 17, 24, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"shared_expert_intermediate_size": 28},
        {"shared_expert_intermediate_size": 28, "activation": "relu2", "dtype": torch.bfloat16},
        {"shared_expert_intermediate_size": 12, "activation": "geglu", "resident_experts": []},
        {"router_renormalize": True, "router_scale": 2.5},
        {"router_renormalize": True, "router_scoring": "softmax", "resident_experts": [1, 2]},
        {"top_k": 6},
        {"top_k": 1, "num_experts": 1},
        {"router_scope": "resident", "resident_experts": [2]},
        {"router_scope": "resident", "resident_experts": [5, 0], "router_renormalize": True},
    ],
    ids=str,
)
def test_options_match_fp64(options: dict[str, Any]) -> None:
    layer = make(**options)
    check_against_dense(layer, tokens(29, 24, dtype=options.get("dtype", torch.float32)))


def test_group_limited_choice_keeps_to_the_best_groups() -> None:
    layer = make(num_experts=8, top_k=3, router_num_groups=4, router_groups_kept=2)
    layer.router.selection_bias.copy_(tokens(8, seed=3) * 0.1)
    x = tokens(64, 24)
    weights, experts = layer.router(x)
    logits = layer.router.logits(x)
    choice = (logits.sigmoid() + layer.router.selection_bias).view(64, 4, 2)
    kept = choice.sum(-1).topk(2, dim=-1).indices  # two experts a group: its score is their sum
    assert ((experts.long() // 2)[:, :, None] == kept[:, None, :]).any(-1).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, experts.long()))


def test_selection_bias_moves_the_choice_but_not_the_weights() -> None:
    layer = make(top_k=1)
    layer.router.selection_bias[4] = 10.0
    x = tokens(11, 24)
    weights, experts = layer.router(x)
    assert experts.eq(4).all()
    torch.testing.assert_close(weights[:, 0], layer.router.logits(x)[:, 4].sigmoid())


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 5, 24), (0, 24), (4, 0, 24)], ids=str)
@pytest.mark.parametrize("router_scope", ["global", "resident"])
def test_any_leading_dimensions(shape: tuple[int, ...], router_scope: str) -> None:
    layer = make(
        router_scope=router_scope, resident_experts=[1, 4], balance="switch", router_z_loss_coef=0.1
    )
    x = tokens(*shape).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    flat = layer(x.reshape(-1, 24))
    torch.testing.assert_close(y.reshape(-1, 24), flat, rtol=0, atol=0)
    (y.sum() + layer.aux_loss).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_view_with_gaps_gives_the_same_as_its_copy() -> None:
    layer = make()
    wide = tokens(9, 48)
    sliced, swapped = wide[:, ::2], tokens(24, 9).T
    for view in (sliced, swapped):
        assert not view.is_contiguous()
        torch.testing.assert_close(layer(view), layer(view.contiguous()), rtol=0, atol=0)


# ---- residency -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_skipped_slots_add_exactly_nothing(scoring: str) -> None:
    """A full layer whose absent experts are zeroed gives the same, bit for bit."""
    x = tokens(200, 24)
    part = make(resident_experts=[1, 3, 5], router_scoring=scoring)
    full = make(router_scoring=scoring)
    with torch.no_grad():
        full.experts.contract_weight[[0, 2, 4]] = 0.0
    y, zeroed = part(x), full(x)
    torch.testing.assert_close(y, zeroed, rtol=0, atol=0)
    unserved = ~torch.isin(part.router(x)[1], torch.tensor([1, 3, 5])).any(dim=1)
    assert unserved.any() and (y[unserved] == 0).all()
    assert 0 < part.stats.skipped_share < 1 and full.stats.skipped_share == 0


def test_disjoint_sites_sum_to_the_full_layer() -> None:
    x = tokens(150, 24)
    sites = [make(resident_experts=ids) for ids in ([0, 4], [5, 1], [2, 3])]
    torch.testing.assert_close(sum(site(x) for site in sites), make()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router_scope", ["global", "resident"])
@pytest.mark.parametrize("residents", [[], [4], [0, 2, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_rows_computed_are_the_slots_on_resident_experts(
    residents: list[int], router_scope: str
) -> None:
    if router_scope == "resident" and not residents:
        pytest.skip("a layer is not built so: test_bad_input.py")
    layer = make(resident_experts=residents, router_scope=router_scope, seed=3)
    x = tokens(333, 24)
    mask = layer.allowed
    top_k = 3 if mask is None else min(3, len(residents))
    experts = layer.router.choose(layer.router.logits(x), mask, top_k)[1]
    before = ops.expand_rows_computed()
    layer(x)
    computed = ops.expand_rows_computed() - before
    on_residents = torch.isin(experts, torch.tensor(residents, dtype=torch.int32)).sum().item()
    assert computed == on_residents == layer.stats.rows.item()
    assert layer.stats.skipped_share.item() == pytest.approx(1 - computed / experts.numel())
    if router_scope == "resident":
        assert computed == experts.numel()


def test_holders_of_an_expert_start_with_the_same_bits() -> None:
    full = make()
    for residents in ([2], [5, 2, 0], [1, 2, 3, 4]):
        site = make(resident_experts=residents)
        for expert in residents:
            for mine, wanted in zip(
                site.experts.expert_weights(expert),
                full.experts.expert_weights(expert),
                strict=True,
            ):
                assert torch.equal(mine, wanted)
        assert torch.equal(site.router.weight, full.router.weight)
    weights = full.experts.expand_weight
    assert len({weights[e].sum().item() for e in range(6)}) == 6
    for other in (make(seed=8), make(layer_index=2)):
        assert not torch.equal(other.experts.expand_weight, weights)
        assert not torch.equal(other.router.weight, full.router.weight)


def test_initial_bits_depend_on_no_process_nor_vector_unit() -> None:
    code = (
        "import torch; from fomoe_ext.layer.seeding import fill_normal_\n"
        "t = fill_normal_(torch.empty(300), 0.5, 3, 'expert', 1, 2)\n"
        "print(t.view(torch.int32).sum().item(), t.dtype)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    here = fill_normal_(torch.empty(300), 0.5, 3, "expert", 1, 2)
    assert done.stdout.split()[0] == str(here.view(torch.int32).sum().item())


def test_initial_weights_have_the_deviation_asked_for() -> None:
    layer = make(hidden_size=256, intermediate_size=64, num_experts=8)
    for weight, fan_in in (
        (layer.router.weight, 256),
        (layer.experts.expand_weight, 256),
        (layer.experts.contract_weight, 64),
    ):
        assert weight.mean().item() == pytest.approx(0, abs=5 / math.sqrt(weight.numel() * fan_in))
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.06)
    state = torch.get_rng_state()
    make(shared_expert_intermediate_size=8)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not used


def test_replication_one_allocates_one_share_of_the_expert_bytes() -> None:
    """Measured at the allocator: allocating all experts and slicing would be noticed."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_experts": 16, "top_k": 2}

    def allocated(residents: list[int] | None) -> tuple[int, int]:
        with torch.profiler.profile(profile_memory=True) as profile:
            layer = MoELayer(**sizes, resident_experts=residents)
        peak = current = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                current += event.nbytes()
                peak = max(peak, current)
        return peak, sum(p.nbytes for p in layer.experts.parameters())

    expert = 3 * 64 * 96 * 4
    full_peak, full = allocated(None)
    assert full == 16 * expert and full_peak >= full
    for site in range(4):
        peak, held = allocated(list(range(site, 16, 4)))
        assert held == full // 4
        # Beside its share: the router, tables, and two fp32 drafts of the part being drawn.
        assert held <= peak < held + 2 * expert


def test_optimizer_state_covers_residents_only() -> None:
    def state_bytes(residents: list[int] | None) -> int:
        layer = make(resident_experts=residents)
        optimizer = torch.optim.AdamW(layer.experts.parameters())
        layer(tokens(64, 24)).sum().backward()
        optimizer.step()
        states = [v for s in optimizer.state.values() for v in s.values()]
        return sum(v.nbytes for v in states if v.dim() > 0)

    assert state_bytes([0, 1]) * 3 == state_bytes(None)


def test_set_resident_experts_moves_rows_in_place() -> None:
    full = make()
    layer = make(resident_experts=[1, 3, 4], router_scope="resident")
    parameters = [id(p) for p in layer.parameters()]
    arrivals = {e: full.experts.expert_weights(e) for e in (0, 5)}
    assert layer.set_resident_experts([5, 3, 0], arrivals) == (0, 5)
    fresh = make(resident_experts=[0, 3, 5], router_scope="resident")
    assert [id(p) for p in layer.parameters()] == parameters
    assert layer.experts.resident_experts == (0, 3, 5)
    for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
        assert torch.equal(dict([*layer.named_parameters(), *layer.named_buffers()])[name], tensor)
    x = tokens(40, 24)
    torch.testing.assert_close(layer(x), fresh(x), rtol=0, atol=0)
    assert layer.set_resident_experts([0, 3, 5]) == ()
    # Rows that swap places, and a resident expert that is overwritten.
    third = layer.experts.expert_weights(3)
    layer.set_resident_experts([0, 3, 5], {0: tuple(w.clone() for w in third)})
    assert torch.equal(layer.experts.expand_weight[0], layer.experts.expand_weight[1])


# ---- what torch may do to the layer --------------------------------------------------------------


def test_autocast_computes_in_the_lower_precision() -> None:
    layer = make(shared_expert_intermediate_size=16, resident_experts=[0, 1, 4])
    x = tokens(30, 24).requires_grad_()
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert layer.router.logits(x).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert 0 < normalised_error(y, exact) < 0.05
    y.float().square().sum().backward()
    for parameter in [x, *layer.parameters()]:
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("router_scope", ["global", "resident"])
def test_compiles_without_graph_breaks(router_scope: str) -> None:
    layer = make(
        resident_experts=[0, 2, 3],
        router_scope=router_scope,
        shared_expert_intermediate_size=16,
        balance="switch",
        router_z_loss_coef=0.1,
    )
    copied = copy.deepcopy(layer)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    for count in (33, 20, 48):
        x, again = tokens(count, 24).requires_grad_(), tokens(count, 24).requires_grad_()
        y, z = layer(x), compiled(again)
        torch.testing.assert_close(z, y)
        torch.testing.assert_close(copied.aux_loss, layer.aux_loss)
        for mine, wanted in zip(copied.stats, layer.stats, strict=True):
            torch.testing.assert_close(mine, wanted)
        (y.square().sum() + layer.aux_loss).backward()
        (z.square().sum() + copied.aux_loss).backward()
        torch.testing.assert_close(again.grad, x.grad)
    for mine, wanted in zip(copied.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad)


def test_compiled_layer_counts_load_for_bias_balancing() -> None:
    layer = make(balance="bias", resident_experts=[0, 1])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(tokens(16, 24))
    assert layer.load_since_update.sum().item() == 2 * 16 * 3


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain = make(balance="entropy", shared_expert_intermediate_size=8)
    kept = copy.deepcopy(plain)
    x, again = tokens(21, 24).requires_grad_(), tokens(21, 24).requires_grad_()
    (plain(x).square().sum() + plain.aux_loss).backward()
    y = torch.utils.checkpoint.checkpoint(kept, again, use_reentrant=False)
    (y.square().sum() + kept.aux_loss).backward()
    torch.testing.assert_close(again.grad, x.grad, rtol=0, atol=0)
    for mine, wanted in zip(kept.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_after_a_pass_behave_the_same(way: str) -> None:
    layer = make(balance="switch", resident_experts=[0, 5], router_scope="resident")
    x = tokens(8, 24)
    y = layer(x)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(other(x), y, rtol=0, atol=0)
    assert other.experts.resident_experts == (0, 5)
    assert layer.aux_loss.requires_grad  # the original keeps its graph
    with torch.no_grad():
        other.experts.expand_weight.zero_()
    assert layer.experts.expand_weight.abs().sum() > 0


def test_state_dict_round_trip() -> None:
    layer = make(shared_expert_intermediate_size=8, resident_experts=[1, 2], balance="bias")
    layer.router.selection_bias.copy_(tokens(6))
    state = layer.state_dict()
    assert sorted(state) == [
        "experts._extra_state",
        "experts.contract_weight",
        "experts.expand_weight",
        "router.selection_bias",
        "router.weight",
        "shared_expert.contract.weight",
        "shared_expert.expand.weight",
    ]
    other = make(shared_expert_intermediate_size=8, resident_experts=[1, 2], seed=1)
    other.load_state_dict(state)
    x = tokens(8, 24)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"expand_weight.*\[2, 40, 24\]"):
        make(shared_expert_intermediate_size=8, resident_experts=[1, 2, 3]).load_state_dict(state)


def test_meta_device_then_memory() -> None:
    options: dict[str, Any] = {
        "shared_expert_intermediate_size": 8,
        "resident_experts": [1, 2],
        "router_scope": "resident",
    }
    built = make(**options, device="meta")
    with torch.device("meta"):
        assert all(p.is_meta for p in make(**options).parameters())
    assert all(t.is_meta for t in [*built.parameters(), *built.buffers()])
    built.to_empty(device="cpu")
    for tensor in [*built.parameters(), *built.buffers()]:
        tensor.detach().fill_(1)  # whatever was in the memory
    built.reset_parameters()
    wanted = make(**options)
    x = tokens(8, 24)
    torch.testing.assert_close(built(x), wanted(x), rtol=0, atol=0)
    for mine, theirs in zip(built.buffers(), wanted.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_casting_keeps_the_selection_bias_in_fp32() -> None:
    layer = make(balance="bias")
    layer.router.selection_bias.fill_(1.001)
    layer.to(torch.bfloat16)
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.router.selection_bias.dtype == torch.float32
    assert layer.router.selection_bias[0].item() == pytest.approx(1.001)
    layer(tokens(8, 24, dtype=torch.bfloat16))


def test_same_input_twice_gives_the_same_bits() -> None:
    layer = make(resident_experts=[0, 2, 3, 5])
    grads = []
    for _ in range(2):
        x = tokens(257, 24).requires_grad_()
        layer.zero_grad()
        layer(x).square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_repr_tells_what_is_resident() -> None:
    text = repr(make(resident_experts=[0, 2], router_scope="resident", balance="entropy"))
    assert "resident_experts=[0, 2]" in text and "top_k=3" in text and "balance='entropy'" in text
    parts = nn.Sequential(Router(8, 4, 2), Experts(8, 4, 4))
    assert "Router(hidden_size=8, num_experts=4, top_k=2)" in repr(parts)
    assert "Experts(hidden_size=8, intermediate_size=4, num_experts=4)" in repr(parts)
