"""The layer and the model under torch.compile, autocast, checkpointing, export ...

One process, on the CPU; `test_frameworks_state.py` has copies, casts and the meta device,
`test_frameworks_sites.py` FSDP and DDP. Plain cases of the layer are in `test_moe.py`; here they
are combined with absent experts, biases, balancing and several numbers of tokens.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from layer_kinds import (
    EXACT,
    KINDS,
    assert_same,
    assert_same_gradients,
    every_kind,
    language_model,
    layer_of,
    outcome,
)
from small_layer import normalised_error, tokens
from small_model import tokens as text
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fomoe_ext import ops

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_compiled")
fomoe = torch.ops.fomoe


@pytest.fixture
def nothing_compiled() -> Any:
    """Resets torch.compile: recompilations of other tests do not count towards the limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "entropy"])
def test_compiled_once_for_any_number_of_tokens(kind: str) -> None:
    """The second number of tokens makes the dimension dynamic; further ones do not recompile."""
    eager, traced = layer_of(kind), layer_of(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    compilations = []
    for count in (33, 20, 48, 7, 129):
        x = tokens(count, 24, seed=count)
        assert_same(outcome(traced, x, compiled), outcome(eager, x))
        compilations.append(counter.frame_count)
    assert compilations == [1, 2, 2, 2, 2]
    assert torch.equal(traced.load_since_update, eager.load_since_update)
    traced.update_selection_bias()
    eager.update_selection_bias()
    x = tokens(40, 24)
    assert_same(outcome(traced, x, compiled), outcome(eager, x))
    assert counter.frame_count == 2


def test_compiled_for_one_token_and_none() -> None:
    eager, traced = layer_of("skipping"), layer_of("skipping")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for count in (33, 1, 0, 20, 1, 0):
        x = tokens(count, 24, seed=count)
        assert_same(outcome(traced, x, compiled), outcome(eager, x))
        compilations.append(counter.frame_count)
    assert compilations[2:] == compilations[2:3] * 4  # each is compiled at most once


@pytest.mark.parametrize("kind", [pytest.param("skipping", marks=pytest.mark.slow), "resident"])
def test_compiled_by_inductor(kind: str) -> None:
    eager, traced = layer_of(kind), layer_of(kind)
    compiled = torch.compile(traced, fullgraph=True, dynamic=True, backend="inductor")
    for count in (33, 20):
        x = tokens(count, 24)
        assert_same(outcome(traced, x, compiled), outcome(eager, x))


@pytest.mark.parametrize("kind", ["skipping", "resident"])
def test_compiled_layer_follows_a_reshuffle(kind: str) -> None:
    traced = layer_of(kind)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x = tokens(40, 24)
    before = outcome(traced, x, compiled)
    gone, *kept = traced.experts.resident_experts
    new = next(e for e in range(6) if e not in (gone, *kept))
    donor = layer_of(kind, resident_experts=[new], seed=1).experts.expert_weights(new)
    traced.set_resident_experts([new, *kept], {new: donor})
    got = outcome(traced, x, compiled)
    assert_same(got, outcome(copy.deepcopy(traced), x))
    assert not torch.equal(got["y"], before["y"])


def test_compiled_layer_adds_to_main_grad() -> None:
    eager, traced = layer_of("skipping"), layer_of("skipping")
    names = ("expand_weight", "contract_weight")
    for layer in (eager, traced):
        for name in names:
            weight = layer.experts.part(name)
            weight.main_grad = torch.zeros_like(weight)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for count in (30, 17):
        for run in (eager, compiled):
            run(tokens(count, 24)).square().sum().backward()
    for name in names:
        assert traced.experts.part(name).grad is None
        assert traced.experts.part(name).main_grad.any()
        torch.testing.assert_close(
            traced.experts.part(name).main_grad, eager.experts.part(name).main_grad
        )


def test_compiled_under_autocast() -> None:
    eager, traced = layer_of("skipping"), layer_of("skipping")
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = outcome(traced, tokens(33, 24), compiled), outcome(eager, tokens(33, 24))
    assert got["y"].dtype == torch.bfloat16
    assert_same(got, wanted)


def test_compiled_language_model() -> None:
    eager, traced = (language_model(balance="switch", num_layers=1) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(traced.loss, fullgraph=True, backend=counter)
    for shape in ((2, 15), (4, 15), (3, 15)):
        got, wanted = loss(text(*shape)), eager.loss(text(*shape))
        torch.testing.assert_close(got, wanted)
        for each in (got, wanted):
            each.total.backward()
        assert_same_gradients(traced, eager)
    assert counter.frame_count == 2


# ---- torch.library.opcheck -----------------------------------------------------------------------


ALL_CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("tokens_, residents", [(0, 2), (5, 0), (1, 4)])
def test_opcheck_at_the_edges(tokens_: int, residents: int) -> None:
    """No tokens, no resident expert, one token: every op of a pass accepts these sizes."""
    top_k, experts, hidden, inner = 2, 4, 6, 3
    logits = tokens(tokens_, experts).requires_grad_()
    routing = (top_k, 1, tokens(experts), None, 2, 2, True, 1.5)
    torch.library.opcheck(fomoe.route, (logits, *routing, True))
    weights, chosen, _ = fomoe.route(logits, *routing, True)
    allowed = torch.arange(experts) != 1
    backward = (logits.detach(), chosen, allowed, 0, False, 1.0)
    torch.library.opcheck(fomoe.route_backward, (torch.ones_like(weights), *backward))
    index = torch.arange(experts, dtype=torch.int32)
    index[residents:] = -1
    torch.library.opcheck(fomoe.compact, (chosen, index, residents, 0))
    table = ops.compact(chosen, index, residents)
    x = tokens(tokens_, hidden, seed=1)
    expand_weight = tokens(residents, 2 * inner, hidden, seed=2)
    contract_weight = tokens(residents, hidden, inner, seed=3)
    biases = tokens(residents, 2 * inner, seed=4), tokens(residents, hidden, seed=5)
    tail = (expand_weight, biases[0], contract_weight, biases[1])
    for grad in (False, True):
        leaves = [t.clone().requires_grad_(grad) for t in (x, weights.detach(), *tail)]
        arguments = (*leaves[:2], *table, *leaves[2:], 0, grad)
        # With nothing resident no row of the pre-activations is defined.
        checks = ALL_CHECKS if residents or not grad else ALL_CHECKS[:3]
        torch.library.opcheck(fomoe.moe_experts, arguments, test_utils=checks)
    _, preact = fomoe.moe_experts(x, weights.detach(), *table, *tail, 0, True)
    plain = (torch.ones_like(x), x, weights.detach(), *table, *tail, preact, 0)
    for wanted in ((True, True, True), (False, False, False)):
        torch.library.opcheck(fomoe.moe_experts_backward, (*plain, *wanted, None, None))
    torch.library.opcheck(fomoe.gather, (x, table.row_of_slot, table.offsets))
    rows = ops.gather(x, table)
    torch.library.opcheck(fomoe.combine, (rows, weights.detach(), table.row_of_slot))


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_autocast_is_near_fp32(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(kind), tokens(64, 24)
    exact = outcome(layer, x)
    with torch.autocast("cpu", dtype):
        low = outcome(layer, x)
    assert low.pop("y").dtype == dtype
    exact.pop("y")
    for name in ("load", "skipped_share", "router_entropy", "rows", "aux_loss"):
        assert torch.equal(low[name], exact[name]), name  # routing is fp32 in either case
    limit = 2**-5 if dtype == torch.bfloat16 else 2**-8
    for name, value in exact.items():
        assert low[name].dtype == value.dtype, name
        if value.numel() and name.endswith("grad"):
            assert normalised_error(low[name], value) < limit, name


# ---- activation checkpointing and accumulated gradients ------------------------------------------


@pytest.mark.parametrize("low", [False, True])
@every_kind
def test_checkpointing_leaves_the_same_behind(kind: str, low: bool) -> None:
    plain, kept, x = layer_of(kind), layer_of(kind), tokens(40, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        wanted = outcome(plain, x)
        got = outcome(kept, x, lambda leaf: checkpoint(kept, leaf, use_reentrant=False))
    assert_same(got, wanted, **EXACT)
    for layer in (plain, kept):
        layer.update_selection_bias()
    assert torch.equal(kept.router.selection_bias, plain.router.selection_bias)


def test_checkpointed_blocks_of_the_language_model() -> None:
    plain, kept = language_model(balance="switch"), language_model(balance="switch")
    for block in kept.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(
            forward, *args, use_reentrant=False
        )
    losses = [model.loss(text(3, 16)) for model in (plain, kept)]
    assert losses[1].aux_loss > 0
    assert torch.equal(losses[0].total, losses[1].total)
    for loss in losses:
        loss.total.backward()
    assert_same_gradients(kept, plain, **EXACT)


@pytest.mark.parametrize("main_grad", [False, True])
def test_accumulated_gradients_are_those_of_one_large_batch(main_grad: bool) -> None:
    whole, parts = language_model(balance="bias"), language_model(balance="bias")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, parts)]
    batch = text(6, 16)
    whole.loss(batch).total.backward()
    if main_grad:
        for layer in parts.moe_layers():
            for name in ("expand_weight", "contract_weight"):
                weight = layer.experts.part(name)
                weight.main_grad = torch.zeros_like(weight)
    for part in batch.split(2):
        (parts.loss(part).total / 3).backward()
    with_total = [p for p in parts.parameters() if hasattr(p, "main_grad")]
    assert len(with_total) == (2 * len(list(parts.moe_layers())) if main_grad else 0)
    for parameter in with_total:
        assert parameter.grad is None
        parameter.grad = parameter.main_grad
    assert_same_gradients(parts, whole, rtol=1e-4, atol=1e-6)
    for model, optimizer in zip((whole, parts), optimizers, strict=True):
        optimizer.step()
        for layer in model.moe_layers():
            assert layer.load_since_update.sum() == 6 * 15 * 3
            layer.update_selection_bias()
            assert layer.router.selection_bias.any()
    for name, value in parts.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-4, atol=1e-6)


# ---- torch.export --------------------------------------------------------------------------------


def exported(module: nn.Module, *inputs: Tensor, strict: bool = False) -> Any:
    """The module's exported program, for any size of the first dimension."""
    shapes = tuple({0: torch.export.Dim("count")} for _ in inputs)
    return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@every_kind
def test_exported_for_any_number_of_tokens(kind: str, strict: bool) -> None:
    layer = layer_of(kind).eval()
    program = exported(layer, tokens(10, 24), strict=strict).module()
    for count in (10, 33, 3):
        x = tokens(count, 24, seed=count)
        torch.testing.assert_close(program(x), layer(x), **EXACT)


@pytest.mark.parametrize("kind", ["skipping", "resident", "empty"])
def test_exported_in_training_mode(kind: str) -> None:
    """Gradients are the layer's, and no pass changes what the next one computes."""
    layer = layer_of(kind)
    program = exported(layer, tokens(10, 24)).module()
    before = {name: value.clone() for name, value in program.state_dict().items()}
    for count in (12, 40, 25):
        x, again = (tokens(count, 24).requires_grad_() for _ in range(2))
        y, wanted = program(x), layer(again)
        torch.testing.assert_close(y, wanted, **EXACT)
        y.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(x.grad, again.grad, **EXACT)
    for name, value in program.state_dict().items():
        assert torch.equal(value, before[name]), name
    got = dict(program.named_parameters())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(got[name].grad, parameter.grad, **EXACT)


def test_exported_language_model() -> None:
    model = language_model().eval()
    program = exported(model, text(2, 12)).module()
    for batch in (1, 2, 5):
        ids = text(batch, 12, seed=batch)
        torch.testing.assert_close(program(ids), model(ids))


def test_exported_into_a_file() -> None:
    layer, buffer = layer_of("skipping").eval(), io.BytesIO()
    torch.export.save(exported(layer, tokens(10, 24)), buffer)
    buffer.seek(0)
    program = torch.export.load(buffer).module()
    torch.testing.assert_close(program(tokens(33, 24)), layer(tokens(33, 24)), **EXACT)
