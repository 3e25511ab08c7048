"""Tensors on several devices, or without storage, are refused by name, instead of computing with
uninitialised memory. Needs no GPU: uses the meta device and fake CUDA tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_inputs import OP_NAMES, Sizes, op_arguments
from expert_inputs import make as make_inputs
from small_layer import make, tokens
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fomoe_ext import ops
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.outer.codec import Codec, DeltaPart, hash_bits

pytestmark = pytest.mark.usefixtures("one_thread")

fomoe = torch.ops.fomoe
SIZES = Sizes(12, 9, 7, 3, 3, 2)


def every_op() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> op and good arguments on the CPU, of every op that takes tensors."""
    found = op_arguments(make_inputs(SIZES), "swiglu", grad=False)
    chosen = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    index, allowed = torch.tensor([0, -1, 1], dtype=torch.int32), torch.ones(3, dtype=torch.bool)
    table = ops.compact(chosen, index, 2)
    logits, weights = torch.zeros(2, 3), torch.ones(2, 2)
    of_route = (0, torch.zeros(3), allowed, 1, 1, False, 1.0, False)
    codec = Codec("int8")
    values, payload = torch.zeros(64), torch.empty(codec.wire_bytes(64), dtype=torch.uint8)
    given = (torch.ones(4, 3), torch.ones(4, 5), None, table.token_of_row, table.offsets)
    return found | {
        "route": (fomoe.route, (logits, 2, *of_route)),
        "route_backward": (
            fomoe.route_backward,
            (weights, logits, torch.zeros_like(chosen), allowed, 0, False, 1.0),
        ),
        "compact": (fomoe.compact, (chosen, index, 2, 0)),
        "gather": (fomoe.gather, (torch.ones(2, 5), table.row_of_slot, table.offsets)),
        "combine": (fomoe.combine, (torch.ones(4, 5), weights, table.row_of_slot)),
        "combine_backward": (
            fomoe.combine_backward,
            (torch.ones(2, 5), torch.ones(4, 5), weights, table.row_of_slot),
        ),
        "weight_grad_add": (fomoe.weight_grad_add, (torch.zeros(2, 3, 5), *given)),
        "bias_grad": (
            fomoe.bias_grad,
            (torch.ones(4, 3), None, None, None, table.offsets),
        ),
        "delta_encode": (
            fomoe.delta_encode,
            (
                values,
                [values],
                [0],
                [1.0],
                values.clone(),
                64,
                *codec._format.values(),
                0,
                0,
                payload,
            ),
        ),
        "delta_reduce": (
            fomoe.delta_reduce,
            (
                payload[None],
                values,
                0,
                None,
                64,
                *codec._format.values(),
                0,
                0,
                None,
                values.clone(),
            ),
        ),
        "hash_bits": (fomoe.hash_bits, ([values, payload],)),
    }


NAMES = (
    *OP_NAMES,
    *("route", "route_backward", "compact", "gather", "combine", "combine_backward"),
    *("weight_grad_add", "bias_grad", "delta_encode", "delta_reduce", "hash_bits"),
)


def test_every_op_is_tried() -> None:
    names = [schema.name for schema in torch._C._jit_get_all_schemas()]
    ours = {name.removeprefix("fomoe::") for name in names if name.startswith("fomoe::")}
    assert ours - {"expand_rows_computed"} == set(NAMES)


def on_meta(value: Any, last_alone: bool = False) -> Any:
    """The tensor, or those of the list."""
    if isinstance(value, list):
        moved = [on_meta(v) for v in value]
        return [*value[:-1], moved[-1]] if last_alone else moved
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", NAMES)
def test_one_argument_on_meta_is_refused(name: str) -> None:
    """One argument at a time is refused; all on meta are accepted."""
    op, arguments = every_op()[name]
    names = "|".join(argument.name for argument in op.default._schema.arguments)
    op(*arguments)
    places = [
        at
        for at, a in enumerate(arguments)
        if isinstance(a, Tensor) or (isinstance(a, list) and isinstance(a[0], Tensor))
    ]
    assert places
    for at in places:
        changed = list(arguments)
        changed[at] = on_meta(changed[at], last_alone=True)
        with pytest.raises(ValueError, match=rf"^({names}) must be on \w+ like ({names}), got \w+"):
            op(*changed)
    op(*map(on_meta, arguments))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("hash_bits", "delta_encode")])
def test_one_argument_on_a_gpu_is_refused(name: str) -> None:
    with FakeTensorMode() as mode:
        op, arguments = every_op()[name]
    for at, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            changed = list(arguments)
            with mode, pytest.raises(ValueError, match=r"must be on \S+ like \S+, got \S+"):
                changed[at] = torch.empty_like(argument, device="cuda")
                op(*changed)


# ---- the layer -----------------------------------------------------------------------------------

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"expert_bias": True, "router_bias": True, "shared_expert_intermediate_size": 8},
    "resident": {"resident_experts": [0, 2, 5], "router_scope": "resident"},
    "stale": {"resident_experts": [0, 2, 5], "stale_experts": [1]},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_one_parameter_on_meta_is_refused(kind: str) -> None:
    names = [*make(**LAYERS[kind]).state_dict()]
    assert len(names) > 3
    for name in names:
        path, _, last = name.rpartition(".")
        if last == "_extra_state":
            continue
        layer = make(**LAYERS[kind])
        module, old = layer.get_submodule(path), layer.state_dict()[name].to("meta")
        is_parameter = last in module._parameters
        setattr(module, last, nn.Parameter(old, old.is_floating_point()) if is_parameter else old)
        with pytest.raises(ValueError, match=rf"^{name} must be on the device of x, cpu.*to_empty"):
            layer(tokens(5, 24))


def test_parts_alone_refuse_parameters_on_meta() -> None:
    layer, x = make(shared_expert_intermediate_size=8), tokens(5, 24)
    weights, experts = layer.router(x)
    layer.router.weight = nn.Parameter(layer.router.weight.to("meta"))
    with pytest.raises(ValueError, match=r"^weight must be on cpu like x, got meta"):
        layer.router(x)
    layer.experts.contract_weight = nn.Parameter(layer.experts.contract_weight.to("meta"))
    with pytest.raises(ValueError, match=r"^contract_weight must be on cpu like x, got meta"):
        layer.experts(x, weights, experts)
    linear = layer.shared_expert.contract
    linear.weight = nn.Parameter(linear.weight.to("meta"))
    with pytest.raises(ValueError, match=r"^contract\.weight must be on cpu like x, got meta"):
        layer.shared_expert(x)


def test_a_layer_of_the_meta_device_runs_there() -> None:
    layer = make(device="meta", shared_expert_intermediate_size=8, balance="switch")
    y = layer(torch.empty(2, 5, 24, device="meta"))
    assert y.is_meta and y.shape == (2, 5, 24)
    with pytest.raises(ValueError, match=r"^\S+ must be on the device of x, cpu"):
        layer(tokens(5, 24))
    with pytest.raises(ValueError, match=r"^x must be on the layer's device cpu, got meta"):
        make()(torch.empty(5, 24, device="meta"))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        layer = MoELayer(24, 20, 6, 3, router_scope="resident", resident_experts=[1, 2])
        y = layer(torch.empty(5, 24, requires_grad=True))
        y.sum().backward()
        assert y.shape == (5, 24) and layer.experts.expand_weight.grad is not None
        with pytest.raises(ValueError, match=r"^x must be on the layer's device cpu, got cuda:0"):
            layer(torch.empty(5, 24, device="cuda"))


def test_deltas_and_hashes_of_nothing_are_refused() -> None:
    codec = Codec("int8")
    out = torch.empty(codec.wire_bytes(64), dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be on meta like local, got cpu"):
        codec.encode_delta([DeltaPart(torch.empty(64, device="meta"), 0)], 64, out)
    with pytest.raises(ValueError, match="tensors must be on cpu like tensors, got meta"):
        hash_bits([torch.zeros(3), torch.zeros(3, device="meta")])
