"""`print(module)` shows every argument that differs from its default."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from sharded_layer import mesh_of
from sites import pool
from small_layer import make

from fomoe_ext.layer.arguments import changed_arguments
from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.router import Router
from fomoe_ext.layer.shared import SharedExpert
from fomoe_ext.layer.stale import StaleExperts

ROUTED = {
    "scoring": ("softmax", "'softmax'"),
    "renormalize": (True, "True"),
    "scale": (2.5, "2.5"),
    "num_groups": (2, "2"),
    "groups_kept": (2, "2"),
}
"""An argument: a value that is not its default, and how that is shown."""
COMMON = {
    "layer_index": (3, "3"),
    "seed": (5, "5"),
    "device": ("meta", "'meta'"),
    "dtype": (torch.bfloat16, "torch.bfloat16"),
}
RESIDENT = {"resident_experts": ([0, 2, 3], "[0, 2, 3]"), "activation": ("gelu", "'gelu'")}
CHANGED: dict[type, dict[str, tuple[Any, str]]] = {
    Router: {**ROUTED, **COMMON, "bias": (True, "True")},
    Experts: {**RESIDENT, **COMMON, "bias": (True, "True")},
    SharedExpert: {**COMMON, "activation": ("gelu", "'gelu'")},
    MoELayer: {
        **{f"router_{name}": value for name, value in ROUTED.items()},
        **RESIDENT,
        **COMMON,
        "expert_bias": (True, "True"),
        "shared_expert_intermediate_size": (8, "8"),
        "skipped_mass": ("rescale", "'rescale'"),
        "router_scope": ("resident", "'resident'"),
        "router_bias": (True, "True"),
        "router_z_loss_coef": (0.5, "0.5"),
        "balance": ("switch", "'switch'"),
        "balance_coef": (0.5, "0.5"),
        "balance_bias_rate": (0.5, "0.5"),
        "stale_experts": ([1], "[1]"),
    },
}
OF_RANKS = {"mesh", "rank_experts"}
SIZES = {Router: (8, 4, 2), Experts: (8, 6, 4), SharedExpert: (8, 6), MoELayer: (8, 6, 4, 2)}
NEEDED = {
    "groups_kept": {"num_groups": 2},
    "router_groups_kept": {"router_num_groups": 2},
    "stale_experts": {"resident_experts": [0, 2, 3]},
}


def shown(module: torch.nn.Module) -> dict[str, str]:
    """What `extra_repr` shows, by name."""
    found: dict[str, str] = {}
    name = ""
    for word in module.extra_repr().split(", "):
        if "=" in word:
            name, _, found[name] = word.partition("=")
        else:
            found[name] += f", {word}"
    return found


@pytest.mark.parametrize("kind", CHANGED)
def test_every_argument_that_is_not_its_default_is_shown(kind: type) -> None:
    parameters = inspect.signature(kind).parameters.values()
    sizes = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    options = {p.name for p in parameters} - {*sizes}
    assert options - OF_RANKS == CHANGED[kind].keys()
    plain = dict(zip(sizes, map(str, SIZES[kind]), strict=True))
    assert shown(kind(*SIZES[kind])) == plain
    for name, (value, text) in CHANGED[kind].items():
        module = kind(*SIZES[kind], **{name: value}, **NEEDED.get(name, {}))
        needed = {other: repr(given) for other, given in NEEDED.get(name, {}).items()}
        assert shown(module) == plain | needed | {name: text}


def test_frozen_copies_are_called_so() -> None:
    layer = make(resident_experts=[0, 2], stale_experts=[3, 5], layer_index=0, seed=0)
    assert isinstance(layer.stale, StaleExperts)
    assert shown(layer.stale) == {
        "hidden_size": "24",
        "intermediate_size": "20",
        "num_experts": "6",
        "stale_experts": "[3, 5]",
    }


def test_later_changes_and_many_ids_are_shown() -> None:
    layer = MoELayer(8, 6, 64, 2, resident_experts=range(0, 64, 2))
    layer.router.scale = 3.0
    assert "router_scale=3.0" in layer.extra_repr()
    assert "resident_experts=[0, 2, 4, ..., 62] (32)" in layer.extra_repr()


def test_an_argument_cannot_be_forgotten() -> None:
    with pytest.raises(KeyError, match="top_k"):
        changed_arguments(Router, {"hidden_size": 1, "num_experts": 2})


def texts(rank: int, ranks: int) -> list[str]:
    mesh = mesh_of(ranks)
    alone, spread = make(mesh=mesh), make(mesh=mesh, rank_experts=((0, 1, 2, 3), (4, 5)))
    return [alone.extra_repr(), spread.extra_repr()]


def test_a_mesh_and_who_holds_what_are_shown() -> None:
    for rank, (alone, spread) in enumerate(pool().run(2, texts)):
        assert alone.endswith(f"mesh='rank {rank} of 2'")
        assert spread.endswith(f"mesh='rank {rank} of 2', rank_experts=[(0, 1, 2, 3), (4, 5)]")
