"""A layer computes frozen copies of absent experts like resident ones, and trains none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_model import bits, noise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fomoe_ext.layer.moe import MoELayer


def layer_of(resident: list[int] | None, copies: list[int], **options: Any) -> MoELayer:
    """A layer of 8 experts; all layers differ only in which experts are resident or copied."""
    layer = MoELayer(
        16, 12, 8, 3, resident_experts=resident, stale_experts=copies, seed=3, **options
    )
    with torch.no_grad():
        for module in (layer.experts, *([layer.stale] if layer.stale else [])):
            for row, expert in enumerate(module.resident_experts):
                for part in module.parts:
                    if part.endswith("bias"):
                        shape = module.part(part)[row].shape
                        module.part(part)[row].copy_(0.1 * noise((part, expert), *shape))
    return layer


def run(layer: MoELayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input and of the router."""
    x = noise("x", 4, 25, 16).to(dtype).requires_grad_()
    y = layer(x)
    (y * noise("w", 4, 25, 16)).sum().backward()
    assert x.grad is not None and layer.router.weight.grad is not None
    return y.detach(), x.grad, layer.router.weight.grad


@pytest.mark.parametrize(
    "kind", [{"activation": "swiglu"}, {"activation": "gelu", "skipped_mass": "rescale"}], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("copies", [[0, 2, 3, 6, 7], [2, 7]], ids=["all", "some"])
def test_a_layer_computes_copies_as_if_it_held_them(copies, dtype, tolerance, kind):
    own = [1, 4, 5]
    options: dict[str, Any] = {**kind, "expert_bias": True, "dtype": dtype}
    holder = layer_of(sorted(own + copies), [], **options)
    layer = layer_of(own, copies, **options)
    for mine, theirs in zip(run(layer, dtype), run(holder, dtype), strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    for part in layer.experts.parts:
        mine = layer.experts.part(part).grad
        rows = [holder.experts.resident_experts.index(e) for e in own]
        theirs = holder.experts.part(part).grad[rows]
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert layer.stats.rows == holder.stats.rows > 0
    assert bool(layer.stats.skipped_share == 0) == (len(copies) == 5)
    alone = layer_of(own, [], **options)
    run(alone, dtype)
    assert alone.stats.rows < layer.stats.rows


class Backwards(TorchDispatchMode):
    """Records which weight gradients the fused backward passes were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, bool, bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fomoe.moe_experts_backward.default:
            names = [argument.name for argument in function._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            experts = given["contract_weight"].shape[0]
            self.asked.append((experts, given["need_expand"], given["need_contract"]))
        return function(*args, **(kwargs or {}))


def test_nothing_of_a_copy_is_trained():
    layer = layer_of([1, 4, 5], [0, 7])
    assert layer.stale is not None and layer.stale.nbytes == 2 * 3 * 12 * 16 * 4
    names = {name for name, _ in layer.named_parameters()} | set(layer.state_dict())
    assert names and not any("stale" in name for name in names)
    before = {part: layer.stale.part(part).clone() for part in layer.stale.parts}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    with Backwards() as seen:
        run(layer, torch.float32)
    assert sorted(seen.asked) == [(2, False, False), (3, True, True)]
    optimizer.step()
    for part, value in before.items():
        tensor = layer.stale.part(part)
        assert not tensor.requires_grad and tensor.grad is None and bits(tensor) == bits(value)
    layer.stale.expand_weight.zero_()
    layer.reset_parameters()
    assert bits(layer.stale.expand_weight) == bits(before["expand_weight"])
    layer = layer_of([1, 4, 5], [0, 7], device="meta")
    layer.make_buffers("cpu")
    assert bits(layer.stale.expand_weight) == bits(before["expand_weight"])


def test_bad_layers_are_named():
    for options, message in (
        (
            {"stale_experts": [1, 2]},
            r"stale_experts must be experts that are not resident, got \[1\]",
        ),
        ({"stale_experts": [2, 2]}, "stale_experts must be distinct"),
        ({"stale_experts": [8]}, r"stale_experts must be in 0..7 .*, got \[8\]"),
        (
            {"stale_experts": [2], "router_scope": "resident"},
            r"stale_experts must be empty with router_scope .resident., got \[2\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            MoELayer(16, 12, 8, 3, resident_experts=[0, 1], **options)
    with pytest.raises(TypeError, match="stale_experts must be ints"):
        MoELayer(16, 12, 8, 3, resident_experts=[0, 1], stale_experts=["2"])
    with pytest.raises(RuntimeError, match="a layer with stale experts cannot change"):
        layer_of([1], [2]).set_resident_experts([2])
