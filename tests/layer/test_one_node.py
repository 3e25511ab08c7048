"""Routing, rescaling and the balancing losses are a node for autograd each: they have the bits of
the operations that they stand for, and the derivatives of those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_layer import normalised_error, tokens
from torch import Tensor

from fomoe_ext import ops
from fomoe_ext.layer import router as router_module
from fomoe_ext.layer.losses import LossOptions, by_formulas, router_loss
from fomoe_ext.layer.router import Router
from fomoe_ext.layer.skipped import by_operations, rescale_skipped

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = [
    LossOptions(balance, 0.37, z_coef, scoring)
    for balance in ("none", "switch", "entropy")
    for z_coef in (0.0, 0.013)
    for scoring in ("softmax", "sigmoid")
    if balance != "none" or z_coef
]


def loss_inputs(count: int) -> tuple[Tensor, Tensor]:
    seed = int(torch.randint(1 << 30, ()))
    logits = 3 * tokens(count, 11, seed=seed)
    load = torch.randint(0, 9, (11,), generator=torch.Generator().manual_seed(seed))
    return logits.requires_grad_(), load


@pytest.mark.parametrize("count", [1, 2, 37, 300])
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_losses_and_gradients_have_the_bits_of_the_formulas(
    options: LossOptions, count: int
) -> None:
    logits, load = loss_inputs(count)
    for kind in (load, torch.zeros_like(load)):
        for scale in (1.0, 0.3, -1.7e5):
            found = []
            for loss_of in (router_loss, by_formulas):
                loss = loss_of(logits, kind, options)
                (grad,) = torch.autograd.grad(loss, logits, torch.tensor(scale))
                found.append((loss.detach(), grad))
            assert torch.equal(found[0][0], found[1][0])
            assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_second_derivatives_of_losses(options: LossOptions) -> None:
    logits, load = loss_inputs(9)

    def penalty(loss_of: Any) -> Tensor:
        (grad,) = torch.autograd.grad(loss_of(logits, load, options), logits, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), logits)[0]

    assert torch.equal(penalty(router_loss), penalty(by_formulas))


@pytest.mark.parametrize("resident", ["none", "some", "all"])
def test_rescaling_has_the_bits_of_its_operations(resident: str) -> None:
    index = {"none": [-1] * 6, "some": [0, -1, -1, 1, -1, 2], "all": list(range(6))}[resident]
    weights = tokens(200, 3, seed=int(torch.randint(1 << 30, ()))).sigmoid()
    weights[:20] *= 1e-31
    weights[20:30] = 0
    weights.requires_grad_()
    experts = torch.randint(-1, 6, (200, 3), dtype=torch.int32)
    given = (weights, experts, torch.tensor(index, dtype=torch.int32))
    found = []
    for rescale in (rescale_skipped, by_operations):
        got = rescale(*given)
        (grad,) = torch.autograd.grad(got, weights, tokens(200, 3, seed=1))
        (kept,) = torch.autograd.grad(rescale(*given).square().sum(), weights, create_graph=True)
        found.append((got.detach(), grad, torch.autograd.grad(kept.sum(), weights)[0]))
    (y, grad, second), (wanted_y, wanted_grad, wanted_second) = found
    assert torch.equal(y, wanted_y) and torch.equal(grad, wanted_grad)
    assert normalised_error(second, wanted_second) < 1e-6  # sums are taken in another order


def routing(
    router: Router, x: Tensor, allowed: Tensor | None, use: tuple[bool, bool]
) -> list[Tensor | None]:
    """Results and gradients of a pass; `use`: whether logits and weights have a gradient."""
    leaf = x.clone().requires_grad_()
    router.zero_grad()
    logits, weights, experts, counted = router(leaf, allowed, measured=True)
    loss = leaf.new_zeros((), dtype=torch.float32)
    if use[0]:
        loss = loss + (logits * tokens(*logits.shape, seed=1)).sum()
    if use[1]:
        loss = loss + (weights * tokens(*weights.shape, seed=2)).sum()
    loss.backward()
    grads = [leaf.grad, *(p.grad for p in router.parameters())]
    return [logits.detach(), weights.detach(), experts, counted.sums, *grads]


@pytest.mark.parametrize("use", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"scoring": "softmax", "renormalize": True, "scale": 2.5, "bias": True}],
    ids=str,
)
def test_routing_has_the_bits_of_its_operations(
    options: dict[str, Any],
    dtype: torch.dtype,
    use: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = Router(24, 10, 3, dtype=dtype, **options)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    router.selection_bias.normal_(std=0.1)
    for count in (0, 1, 40):
        x = tokens(count, 24, seed=count).to(dtype)
        for allowed in (None, torch.arange(10) % 3 > 0):
            got = routing(router, x, allowed, use)
            with monkeypatch.context() as patch:
                patch.setattr(router_module, "traced", lambda: True)  # the operations one by one
                wanted = routing(router, x, allowed, use)
            for one, other in zip(got, wanted, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_routing_of_what_is_frozen(frozen: str) -> None:
    router = Router(24, 10, 3, bias=True)
    x = tokens(7, 24).requires_grad_(frozen != "x")
    if frozen != "x":
        router.get_parameter(frozen).requires_grad_(False)
    router(x, measured=True)[1].sum().backward()
    found = {"x": x.grad, "weight": router.weight.grad, "bias": router.bias.grad}
    assert [name for name, grad in found.items() if grad is None] == [frozen]


def test_second_derivatives_of_logits() -> None:
    """Those of weights are refused (test_derivatives.py)."""
    router, x = Router(24, 10, 3), tokens(7, 24).requires_grad_()

    def penalty(logits: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    got = penalty(router(x, measured=True)[0])
    assert torch.equal(got, penalty(router.logits(x))) and got.any()
    with pytest.raises(NotImplementedError, match="fomoe::route_backward has no derivative"):
        penalty(router(x, measured=True)[1])


def test_a_tap_sees_logits_that_are_the_router_s() -> None:
    router, x, seen = Router(24, 10, 3), tokens(7, 24), []
    router.tap = torch.nn.Identity()
    router.tap.register_forward_hook(lambda module, given, output: seen.append(output))
    logits = router(x, measured=True)[0]
    assert seen == [logits] and torch.equal(router(x, measured=True)[1], ops.route(logits, 3)[0])
