"""Bad input to every public entry point of the layer and the ops.

Each must raise ValueError, TypeError or RuntimeError with the argument's name. (More kinds of bad
tensors are in the tests of each verb.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fomoe_ext.layer
from fomoe_ext import ops
from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.residents import Residents
from fomoe_ext.layer.router import Router
from fomoe_ext.layer.shared import SharedExpert

NAN, INF = math.nan, math.inf
GOOD: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 6, "num_experts": 4, "top_k": 2}


def layer(**changes: Any) -> MoELayer:
    return MoELayer(**(GOOD | changes))


def refused(call: Callable[[], Any], name: str, kind: type[Exception] = ValueError) -> None:
    """The call raises `kind` and the message names the argument."""
    with pytest.raises(kind, match=rf"\b{name}\b"):
        call()


# ---- building a layer ----------------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict[str, Any], str, type[Exception]]] = [
    *[
        ({name: value}, name, ValueError)
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k")
        for value in (0, -1)
    ],
    *[
        ({name: value}, name, TypeError)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_experts",
            "top_k",
            "shared_expert_intermediate_size",
        )
        for value in (2.0, "2", None, True)
    ],
    ({"top_k": 5}, "top_k", ValueError),
    ({"activation": "relu"}, "activation", ValueError),
    ({"activation": None}, "activation", ValueError),
    ({"router_scoring": "tanh"}, "router_scoring", ValueError),
    ({"router_scope": "local"}, "router_scope", ValueError),
    ({"balance": "aux"}, "balance", ValueError),
    ({"resident_experts": [0, 4]}, "resident_experts", ValueError),
    ({"resident_experts": [-1, 2]}, "resident_experts", ValueError),
    ({"resident_experts": [1, 1]}, "resident_experts", ValueError),
    ({"resident_experts": [0.5, 1]}, "resident_experts", TypeError),
    ({"resident_experts": ["0"]}, "resident_experts", TypeError),
    ({"resident_experts": 2}, "resident_experts", TypeError),
    ({"resident_experts": [], "router_scope": "resident"}, "resident_experts", ValueError),
    ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size", ValueError),
    ({"router_renormalize": "yes"}, "router_renormalize", TypeError),
    ({"expert_bias": 1}, "expert_bias", TypeError),
    ({"router_bias": 1}, "router_bias", TypeError),
    *[({"router_scale": value}, "router_scale", ValueError) for value in (NAN, INF, -1.0)],
    ({"router_scale": "1"}, "router_scale", TypeError),
    ({"router_num_groups": 3}, "router_num_groups", ValueError),
    ({"router_num_groups": 0}, "router_num_groups", ValueError),
    ({"router_num_groups": 2, "router_groups_kept": 3}, "router_groups_kept", ValueError),
    ({"router_groups_kept": 0}, "router_groups_kept", ValueError),
    ({"router_num_groups": 4, "router_groups_kept": 1}, "top_k", ValueError),
    *[
        ({name: value}, name, ValueError)
        for name in ("balance_coef", "router_z_loss_coef", "balance_bias_rate")
        for value in (NAN, INF, -0.1)
    ],
    ({"balance_coef": None}, "balance_coef", TypeError),
    ({"layer_index": -1}, "layer_index", ValueError),
    ({"layer_index": 1.0}, "layer_index", TypeError),
    ({"seed": 0.5}, "seed", TypeError),
    ({"seed": "7"}, "seed", TypeError),
    ({"dtype": torch.float64}, "dtype", ValueError),
    ({"dtype": torch.int32}, "dtype", ValueError),
    ({"dtype": "float32"}, "dtype", ValueError),
    ({"device": "nowhere"}, "device", RuntimeError),
]


@pytest.mark.parametrize("changes, name, kind", BAD_OPTIONS, ids=str)
def test_a_layer_is_not_built_from(
    changes: dict[str, Any], name: str, kind: type[Exception]
) -> None:
    refused(lambda: layer(**changes), name, kind)


def test_a_good_layer_is_built() -> None:
    """The arguments of which each case above changes one."""
    assert layer()(torch.zeros(3, 8)).shape == (3, 8)


@pytest.mark.parametrize(
    "call, name, kind",
    [
        (lambda: Router(0, 4, 2), "hidden_size", ValueError),
        (lambda: Router(8, 4, 5), "top_k", ValueError),
        (lambda: Router(8, 4, 2, scoring="x"), "scoring", ValueError),
        (lambda: Router(8, 4, 2, seed=None), "seed", TypeError),
        (lambda: Router(8, 4, 2, layer_index=-1), "layer_index", ValueError),
        (lambda: Router(8, 4, 2, bias=1), "bias", TypeError),
        (lambda: Experts(8, 6, 4, bias=1), "bias", TypeError),
        (lambda: Residents([9], 4, name="site_experts"), "site_experts", ValueError),
        (lambda: Experts(8, 0, 4), "intermediate_size", ValueError),
        (lambda: Experts(8, 6, 4, activation="x"), "activation", ValueError),
        (lambda: Experts(8, 6, 4, resident_experts=[9]), "resident_experts", ValueError),
        (lambda: Experts(8, 6, 4, seed=1.5), "seed", TypeError),
        (lambda: SharedExpert(8, 0), "intermediate_size", ValueError),
        (lambda: SharedExpert(8, 6, activation="x"), "activation", ValueError),
        (lambda: SharedExpert(8.0, 6), "hidden_size", TypeError),
    ],
)
def test_parts_are_not_built_from(
    call: Callable[[], Any], name: str, kind: type[Exception]
) -> None:
    refused(call, name, kind)


# ---- running a layer -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, name, kind",
    [
        (torch.zeros(3, 7), "x", ValueError),
        (torch.zeros(3, 0), "x", ValueError),
        (torch.tensor(1.0), "x", ValueError),
        (torch.zeros(3, 8, dtype=torch.int64), "x", ValueError),
        (torch.zeros(3, 8, dtype=torch.float64), "x", ValueError),
        (torch.zeros(3, 8, dtype=torch.bfloat16), "x", ValueError),
        (torch.zeros(3, 8, dtype=torch.complex64), "x", ValueError),
        (torch.zeros(3, 8, device="meta"), "x", ValueError),
        ([[0.0] * 8], "x", TypeError),
        (None, "x", TypeError),
        (torch.full((3, 8), NAN), "logits", ValueError),
        (torch.full((3, 8), INF), "logits", ValueError),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_a_layer_does_not_run_on(x: Any, name: str, kind: type[Exception]) -> None:
    refused(lambda: layer()(x), name, kind)


def test_one_nan_token_is_refused_and_leaves_the_layer_usable() -> None:
    built = layer()
    x = torch.zeros(5, 8)
    x[3, 2] = NAN
    refused(lambda: built(x), "logits")
    assert built(torch.zeros(5, 8)).isfinite().all()


def test_nan_in_a_routers_state_is_refused() -> None:
    built = layer()
    built.router.selection_bias[1] = NAN
    refused(lambda: built(torch.zeros(5, 8)), "selection_bias")
    built = layer()
    with torch.no_grad():
        built.router.weight[1] = NAN
    refused(lambda: built(torch.zeros(5, 8)), "logits")


@pytest.mark.parametrize(
    "ids, weights, name, kind",
    [
        ([0], None, "resident_experts", ValueError),
        ([0, 1, 2], None, "resident_experts", ValueError),
        ([0, 4], None, "resident_experts", ValueError),
        ([0, 0], None, "resident_experts", ValueError),
        ([0, 1.5], None, "resident_experts", TypeError),
        ([0, 3], None, "weights", ValueError),
        ([0, 1], {2: (torch.zeros(12, 8), torch.zeros(8, 6))}, "weights", ValueError),
        ([0, 3], {3: (torch.zeros(12, 7), torch.zeros(8, 6))}, "weights", ValueError),
        ([0, 3], {3: (torch.zeros(8, 6), torch.zeros(12, 8))}, "weights", ValueError),
        ([0, 3], {3: (torch.zeros(12, 8),)}, "weights", TypeError),
        ([0, 3], {3: ([0.0], [0.0])}, "weights", TypeError),
    ],
    ids=str,
)
def test_resident_experts_do_not_become(
    ids: list[int], weights: Any, name: str, kind: type[Exception]
) -> None:
    """A refused change leaves the layer as it was."""
    built = layer(resident_experts=[0, 1])
    before = {key: value.clone() for key, value in built.state_dict().items()}
    refused(lambda: built.set_resident_experts(ids, weights), name, kind)
    assert built.experts.resident_experts == (0, 1)
    assert all(torch.equal(built.state_dict()[key], value) for key, value in before.items())


def test_other_methods_refuse() -> None:
    built = layer(balance="bias", resident_experts=[0, 1])
    refused(lambda: built.update_selection_bias(torch.zeros(3)), "load")
    refused(lambda: built.update_selection_bias([1, 2, 3, 4]), "load", TypeError)
    refused(lambda: built.experts.expert_weights(2), "expert")
    refused(lambda: built.router(torch.full((2, 8), NAN)), "logits")
    with pytest.raises(RuntimeError, match=r"router\.weight"):
        built.load_state_dict({})
    with pytest.raises(RuntimeError, match="expand_weight"):
        built.load_state_dict(layer().state_dict())


# ---- the ops -------------------------------------------------------------------------------------

EXPERTS = torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.int32)
INDEX = torch.tensor([0, -1, 1, -1], dtype=torch.int32)
TABLE = ops.compact(EXPERTS, INDEX, 2)
BAD_CALLS: list[tuple[str, dict[str, Any], str, type[Exception]]] = [
    ("route", {"logits": torch.zeros(3, 4, 1)}, "logits", ValueError),
    ("route", {"logits": torch.full((3, 4), NAN)}, "logits", ValueError),
    ("route", {"logits": torch.zeros(3, 4).double()}, "logits", ValueError),
    ("route", {"top_k": 5}, "top_k", ValueError),
    ("route", {"scoring": "x"}, "scoring", ValueError),
    ("route", {"selection_bias": torch.zeros(3)}, "selection_bias", ValueError),
    ("route", {"allowed": torch.ones(3, dtype=torch.bool)}, "allowed", ValueError),
    ("route", {"num_groups": 3}, "num_groups", ValueError),
    ("route", {"groups_kept": 2}, "groups_kept", ValueError),
    ("route", {"scale": NAN}, "scale", ValueError),
    ("compact", {"experts": EXPERTS.long()}, "experts", ValueError),
    ("compact", {"experts": EXPERTS[0]}, "experts", ValueError),
    ("compact", {"experts": EXPERTS + 1}, "experts", ValueError),
    ("compact", {"experts": EXPERTS - 2}, "experts", ValueError),
    ("compact", {"resident_index": INDEX.long()}, "resident_index", ValueError),
    ("compact", {"resident_index": INDEX[None]}, "resident_index", ValueError),
    ("compact", {"resident_index": INDEX * 2}, "resident_index", ValueError),
    ("compact", {"num_resident": -1}, "num_resident", ValueError),
    ("compact", {"num_resident": 1}, "resident_index", ValueError),
    ("compact", {"tile_rows": -1}, "tile_rows", ValueError),
    ("gather", {"x": torch.zeros(4, 8)}, "row_of_slot", ValueError),
    ("gather", {"x": torch.zeros(3, 8).double()}, "x", ValueError),
    (
        "gather",
        {"table": TABLE._replace(row_of_slot=TABLE.row_of_slot.long())},
        "row_of_slot",
        ValueError,
    ),
    ("gather", {"table": TABLE._replace(offsets=TABLE.offsets[:2])}, "offsets", ValueError),
    ("gather", {"table": TABLE._replace(offsets=TABLE.offsets[:0])}, "offsets", ValueError),
    ("expand", {"x": torch.zeros(8)}, "x", ValueError),
    ("expand", {"x": torch.zeros(3, 8).double()}, "x", ValueError),
    ("expand", {"expand_weight": torch.zeros(2, 11, 8)}, "expand_weight", ValueError),
    ("expand", {"expand_weight": torch.zeros(2, 12, 7)}, "expand_weight", ValueError),
    ("expand", {"table": TABLE._replace(offsets=TABLE.offsets[:2])}, "offsets", ValueError),
    ("expand", {"activation": "x"}, "activation", ValueError),
    ("contract", {"act": torch.zeros(6, 6).long()}, "act", ValueError),
    ("contract", {"act": torch.zeros(1, 6)}, "offsets", ValueError),
    ("contract", {"contract_weight": torch.zeros(2, 8, 5)}, "contract_weight", ValueError),
    ("combine", {"rows": torch.zeros(8)}, "rows", ValueError),
    ("combine", {"rows": torch.zeros(6, 8).double()}, "rows", ValueError),
    ("combine", {"weights": torch.zeros(3, 3)}, "weights", ValueError),
    ("combine", {"weights": torch.zeros(3, 2).half()}, "weights", ValueError),
    (
        "combine",
        {"table": TABLE._replace(row_of_slot=TABLE.row_of_slot + 6)},
        "row_of_slot",
        ValueError,
    ),
    ("moe_experts", {"x": torch.zeros(4, 8)}, "weights", ValueError),
    ("moe_experts", {"weights": torch.zeros(3, 2).half()}, "weights", ValueError),
    ("moe_experts", {"expand_weight": torch.zeros(3, 12, 8)}, "contract_weight", ValueError),
    ("moe_experts", {"contract_weight": torch.zeros(2, 6, 8)}, "contract_weight", ValueError),
    ("moe_experts", {"activation": "x"}, "activation", ValueError),
    ("is_gated", {"activation": "x"}, "activation", ValueError),
]


def good_call(verb: str) -> dict[str, Any]:
    """Valid arguments of a verb."""
    x, weights = torch.ones(3, 8), torch.ones(3, 2)
    expand_weight, contract_weight = torch.ones(2, 12, 8), torch.ones(2, 8, 6)
    return {
        "route": {"logits": torch.zeros(3, 4), "top_k": 2},
        "gather": {"x": x, "table": TABLE},
        "compact": {"experts": EXPERTS, "resident_index": INDEX, "num_resident": 2},
        "expand": {"x": x, "expand_weight": expand_weight, "table": TABLE},
        "contract": {
            "act": torch.ones(6, 6),
            "contract_weight": contract_weight,
            "table": TABLE,
        },
        "combine": {"rows": torch.ones(6, 8), "weights": weights, "table": TABLE},
        "moe_experts": {
            "x": x,
            "weights": weights,
            "table": TABLE,
            "expand_weight": expand_weight,
            "contract_weight": contract_weight,
        },
        "is_gated": {"activation": "silu"},
    }[verb]


@pytest.mark.parametrize("verb, changes, name, kind", BAD_CALLS, ids=str)
def test_an_op_refuses(
    verb: str, changes: dict[str, Any], name: str, kind: type[Exception]
) -> None:
    call = getattr(ops, verb)
    call(**good_call(verb))
    refused(lambda: call(**(good_call(verb) | changes)), name, kind)


def test_every_public_function_is_tried() -> None:
    functions = {name for name in ops.__all__ if callable(getattr(ops, name))}
    assert functions - {verb for verb, *_ in BAD_CALLS} == {
        "RowTable",
        "RouterStatistics",
        "expand_rows_computed",
    }
    assert set(fomoe_ext.layer.__all__) == {"Experts", "MoELayer", "Router", "SharedExpert"}
