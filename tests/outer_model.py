"""A small model for tests of the outer step, its pieces by name, and the definition of a round."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.placement import Placement

EXPERTS, LAYERS, HIDDEN, SIZE = 12, 2, 7, 5


class SmallModel(nn.Module):
    """Dense parameters of awkward sizes around MoE layers of one site."""

    def __init__(self, placement: Placement, site: int, scope: str = "global", **options: Any):
        super().__init__()
        self.first = nn.Parameter(noise("first", HIDDEN, 3))
        self.layers = nn.ModuleList(
            MoELayer(
                HIDDEN,
                SIZE,
                EXPERTS,
                2,
                router_scope=scope,
                resident_experts=placement.resident(layer, site),
                layer_index=layer,
                seed=5,
                **options,
            )
            for layer in range(LAYERS)
        )
        self.scalar = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.scalar * (x @ self.first)


def cyclic_placement(num_sites: int, replication: int) -> Placement:
    """The cyclic placement of this model's experts."""
    return Placement.cyclic(
        num_sites=num_sites, num_experts=EXPERTS, num_layers=LAYERS, replication=replication
    )


def random_placement(
    num_sites: int, replication: int, *, seed: int = 0, epoch: int = 0
) -> Placement:
    """A random placement of this model's experts."""
    return Placement.random(
        num_sites=num_sites,
        num_experts=EXPERTS,
        num_layers=LAYERS,
        replication=replication,
        seed=seed,
        epoch=epoch,
    )


def noise(name: Any, *shape: int) -> Tensor:
    """Normal fp32 values that depend on the name and the shape."""
    digest = hashlib.sha256(repr((name, shape)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator)


def give_gradients(model: nn.Module, site: int, step: int) -> None:
    """Replaces a backward pass: gives every parameter a gradient that depends on site and step."""
    for name, parameter in model.named_parameters():
        grad = noise(("grad", site, step, name), *parameter.shape)
        parameter.grad = grad.to(parameter.dtype)


def pieces(
    model: nn.Module, of: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[tuple[Any, ...], Tensor]:
    """Copies of all parameters: ("dense", name), ("router", l, e), ("expert", l, e, part).

    `of` maps a parameter to the tensor to cut, e.g. its gradient.
    """
    result: dict[tuple[Any, ...], Tensor] = {}
    special = set()
    for index, layer in enumerate(m for m in model.modules() if isinstance(m, MoELayer)):
        special |= {id(p) for p in (*layer.experts.parameters(), layer.router.weight)}
        for expert, row in enumerate(of(layer.router.weight).detach()):
            result["router", index, expert] = row.clone()
        for row, expert in enumerate(layer.experts.resident_experts):
            for part in layer.experts.parts:
                stack = of(layer.experts.part(part))
                result["expert", index, expert, part] = stack.detach()[row].clone()
    for name, parameter in model.named_parameters():
        if id(parameter) not in special:
            result["dense", name] = of(parameter).detach().clone()
    return result


def contributors(
    key: tuple[Any, ...], placement: Placement, router_mean: str = "holders"
) -> tuple[int, ...]:
    """The sites whose values of a piece are averaged, by the definition."""
    if key[0] == "dense" or (key[0] == "router" and router_mean == "all"):
        return tuple(range(placement.num_sites))
    return placement.owners(key[1], key[2])


def receivers(key: tuple[Any, ...], placement: Placement, scope: str) -> tuple[int, ...]:
    """The sites that must hold the same bits of a piece after a round."""
    if key[0] == "dense" or (key[0] == "router" and scope == "global"):
        return tuple(range(placement.num_sites))
    return placement.owners(key[1], key[2])


def mean(values: list[dict[tuple[Any, ...], Tensor]], key: Any, sites: tuple[int, ...]) -> Tensor:
    """Mean over sites in fp64."""
    return torch.stack([values[site][key].double() for site in sites]).mean(0)


def assert_same_bits(after: list[dict[Any, Tensor]], placement: Placement, scope: str) -> int:
    """All receivers of every piece hold the same bits; returns how many pieces were compared."""
    compared = 0
    for key in sorted({key for site in after for key in site}, key=repr):
        sites = receivers(key, placement, scope)
        for site in sites:
            assert bits(after[site][key]) == bits(after[sites[0]][key]), (
                f"{key} differs between sites {sites[0]} and {site}"
            )
        compared += len(sites) > 1
    return compared


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes."""
    if not tensor.numel():
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
