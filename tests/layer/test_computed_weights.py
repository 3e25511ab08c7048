"""Weights that are not Parameters while the layer runs: given to functional_call, or computed by
parametrizations, pruning and adapters. The layer computes with the tensors under their names.
Operations that would write into them, or average them between sites, refuse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import make_model
from hf_models import text as hf_text
from small_layer import make, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.outer.layout import check_model
from fomoe_ext.placement import Placement

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"resident_experts": [0, 2, 5]},
    "biased": {"expert_bias": True, "router_bias": True, "shared_expert_intermediate_size": 8},
    "resident": {"resident_experts": [0, 2, 5], "router_scope": "resident"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
PARTS = ("expand_weight", "contract_weight", "expand_bias", "contract_bias")


@every_kind
@pytest.mark.parametrize("buffers", [False, True])
def test_functional_call(kind: str, buffers: bool) -> None:
    layer, other = make(**KINDS[kind]), make(**KINDS[kind], seed=1)
    given = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    if buffers:
        given |= dict(other.named_buffers())
    x = tokens(9, 24)
    y = torch.func.functional_call(layer, given, (x,))
    assert torch.equal(y, other(x))
    y.square().sum().backward()
    other(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(given[name].grad, parameter.grad), name
    assert all(p.grad is None for p in layer.parameters())
    detached = {name: value.detach() for name, value in other.state_dict().items()}
    detached.pop("experts._extra_state")
    assert torch.equal(torch.func.functional_call(layer, detached, (x,)), y)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(layer: MoELayer, module: str, name: str) -> MoELayer:
    with torch.no_grad():
        layer.get_submodule(module).get_parameter(name).mul_(2)
    return layer


@pytest.mark.parametrize(
    "module, name",
    [*(("experts", part) for part in PARTS), ("router", "weight"), ("router", "bias")],
)
def test_a_parametrization(module: str, name: str) -> None:
    layer, x = make(**KINDS["biased"]), tokens(9, 24)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    wanted = doubled(copy.deepcopy(layer), module, name)
    parametrize.register_parametrization(layer.get_submodule(module), name, Twice())
    assert torch.equal(layer(x), wanted(x))
    layer(x).square().sum().backward()
    wanted(x).square().sum().backward()
    original = layer.get_submodule(module).parametrizations[name].original
    grad = wanted.get_submodule(module).get_parameter(name).grad
    torch.testing.assert_close(original.grad, 2 * grad)
    parametrize.remove_parametrizations(layer.get_submodule(module), name)
    assert torch.equal(layer(x), wanted(x))


def test_a_parametrized_layer_compiles() -> None:
    layer, x = make(**KINDS["plain"]), tokens(9, 24)
    parametrize.register_parametrization(layer.experts, "expand_weight", Twice())
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", ["expand_weight", "contract_weight"])
@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["old", "new"]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm(norm: Callable[..., nn.Module], name: str) -> None:
    """The weights are the same at first; training updates their norm and direction."""
    layer, wanted, x = make(**KINDS["plain"]), make(**KINDS["plain"]), tokens(9, 24)
    norm(layer.experts, name)
    torch.testing.assert_close(layer(x), wanted(x))
    layer(x).square().sum().backward()
    trained = dict(layer.experts.named_parameters())
    assert name not in trained and len(trained) == 3
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


def test_pruning() -> None:
    layer, wanted, x = make(**KINDS["plain"]), make(**KINDS["plain"]), tokens(9, 24)
    prune.l1_unstructured(layer.experts, "contract_weight", 0.5)
    mask = layer.experts.contract_weight_mask
    assert 0.4 < mask.mean() < 0.6
    with torch.no_grad():
        wanted.experts.contract_weight.mul_(mask)
    assert torch.equal(layer(x), wanted(x))


def test_main_grad_is_of_the_tensor_that_has_it() -> None:
    layer, x = make(**KINDS["plain"]), tokens(9, 24)
    total = torch.zeros_like(layer.experts.expand_weight)
    layer.experts.expand_weight.main_grad = total
    given = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    torch.func.functional_call(layer, given, (x,)).sum().backward()
    assert not total.any() and given["experts.expand_weight"].grad.any()
    layer(x).sum().backward()
    assert torch.equal(total, given["experts.expand_weight"].grad)


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


class Packed(torch.Tensor):
    """Like a quantised tensor: has a float dtype and a shape, but no such storage."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].inner) if func is torch.ops.aten.detach.default else NotImplemented


def test_tensors_of_other_classes() -> None:
    layer, x = make(**KINDS["plain"]), tokens(9, 24)
    y = layer(x)
    weight = layer.experts.contract_weight.detach()
    layer.experts.contract_weight = nn.Parameter(weight.as_subclass(Plain))
    assert torch.equal(layer(x).as_subclass(torch.Tensor), y)
    layer.experts.contract_weight = nn.Parameter(Packed(weight), requires_grad=False)
    with pytest.raises(TypeError, match=r"(?s)fomoe.*Packed"):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32], ids=str)
@pytest.mark.parametrize(
    "module, name",
    [("experts", "contract_weight"), ("experts", "expand_bias"), ("router", "weight")],
)
def test_values_without_scales_are_refused(module: str, name: str, dtype: torch.dtype) -> None:
    layer = make(**KINDS["biased"])
    owner = layer.get_submodule(module)
    setattr(owner, name, nn.Parameter(getattr(owner, name).detach().to(dtype), False))
    with pytest.raises(ValueError, match=rf"^{name} must have dtype .*got {str(dtype)[6:]}"):
        layer(tokens(5, 24))


# ---- what cannot be ------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[MoELayer], Any]] = {
    "parametrized": lambda layer: parametrize.register_parametrization(
        layer.experts, "expand_weight", Twice()
    ),
    "pruned": lambda layer: prune.identity(layer.experts, "expand_weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_writes_into_computed_weights_refuses(change: str) -> None:
    layer = make(**KINDS["plain"])
    CHANGES[change](layer)
    new = {4: make().experts.expert_weights(4)}
    for call in (
        lambda: layer.set_resident_experts([0, 2, 4], new),
        lambda: layer.experts.expert_weights(2),
    ):
        with pytest.raises(RuntimeError, match=r"^expand_weight of experts must be a plain"):
            call()
    assert layer.experts.resident_experts == (0, 2, 5)


@pytest.mark.parametrize("change", [*CHANGES, "router"])
def test_meetings_refuse_computed_weights(change: str) -> None:
    model, placement = (
        nn.Sequential(make()),
        Placement.cyclic(num_sites=1, num_experts=6, num_layers=1, replication=1),
    )
    check_model(model, placement, 0)
    if change == "router":
        parametrize.register_parametrization(model[0].router, "weight", Twice())
    else:
        CHANGES[change](model[0])
    with pytest.raises(
        ValueError, match=r"^0\.(experts|router) must have exactly the parameters .*weight"
    ):
        check_model(model, placement, 0)


# ---- adapters ------------------------------------------------------------------------------------


def adapted(converted: bool) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A model with LoRA on its experts and routers: itself, its loss, its gradients."""
    peft = pytest.importorskip("peft")
    from fomoe_ext import hf

    names = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    model = make_model("mixtral")
    if converted:
        hf.convert(model)
        names = ["experts.expand_weight", "experts.contract_weight", "router.weight"]
    options = peft.LoraConfig(r=2, target_modules=[], target_parameters=names)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, options)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for seed, parameter in enumerate(trained):
            parameter.copy_(tokens(*parameter.shape, seed=seed) / 10)
    loss = model(input_ids=hf_text(), labels=hf_text()).loss
    loss.backward()
    return model, loss, [p.grad for p in trained]


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_experts_and_routers_of_a_converted_model() -> None:
    """LoRA on a converted model computes the same as on the original model."""
    _, wanted, wanted_grads = adapted(False)
    model, loss, grads = adapted(True)
    torch.testing.assert_close(loss, wanted)
    assert len(grads) == len(wanted_grads) > 0 and all(grad.any() for grad in grads)
    for grad, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    with pytest.raises(ValueError, match=r"\.(experts|router) must be a Router or Experts, got "):
        check_model(
            nn.Sequential(layer),
            Placement.cyclic(num_sites=1, num_experts=8, num_layers=1, replication=1),
            0,
        )
    merged = model.merge_and_unload()
    found = merged(input_ids=hf_text(), labels=hf_text()).loss
    torch.testing.assert_close(found, wanted)
    check_model(
        nn.Sequential(layer),
        Placement.cyclic(num_sites=1, num_experts=8, num_layers=1, replication=1),
        0,
    )
