"""The shared expert, which every token uses and every site holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_ext.activations import ACTIVATIONS, is_gated, num_projections
from fomoe_ext.checks import an_int, at_least, one_of
from fomoe_ext.layer.arguments import changed_arguments, placed
from fomoe_ext.layer.seeding import fill_normal_
from fomoe_ext.ops.shapes import on_one_device


def activate(preact: Tensor, activation: str) -> Tensor:
    """An activation computed by torch: [..., G*N] -> [..., N]; if gated, the gate comes first."""
    up: Tensor | None = None
    if is_gated(activation):
        preact, up = preact.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        assert up is not None
        gate = preact.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    if activation in ("swiglu", "silu"):
        act = F.silu(preact)
    elif activation in ("geglu", "gelu"):
        act = F.gelu(preact, approximate="tanh")
    else:
        act = F.relu(preact).square()
    return act if up is None else act * up


class SharedExpert(nn.Module):
    """An expert that every token uses and every site holds, of two plain linear layers."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        layer_index: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Weights have the shapes of one expert: expand [G*N, D], contract [D, N]; no biases.

        Raises ValueError or TypeError naming the argument.
        """
        super().__init__()
        at_least(1, hidden_size=hidden_size, intermediate_size=intermediate_size)
        at_least(0, layer_index=layer_index)
        an_int(seed=seed)
        one_of(tuple(ACTIVATIONS), activation=activation)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation, self.layer_index, self.seed = activation, layer_index, seed
        wide = intermediate_size * num_projections(activation)
        device = torch.get_default_device() if device is None else device
        # skip_init, because the default initialisation draws from torch's global generator.
        make = nn.utils.skip_init
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.expand = make(nn.Linear, hidden_size, wide, **options)
        self.contract = make(nn.Linear, intermediate_size, hidden_size, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights of standard deviation 1/sqrt(fan-in) that depend only on (seed,
        layer_index)."""
        for name, linear in (("expand", self.expand), ("contract", self.contract)):
            std = linear.in_features**-0.5
            fill_normal_(linear.weight, std, self.seed, "shared", name, self.layer_index)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]. ValueError if a weight is on the meta device and x is not."""
        for name, linear in (("expand", self.expand), ("contract", self.contract)):
            weight = linear._parameters.get("weight")  # an adapter has others
            if weight is not None and weight.is_meta and not hasattr(linear, "_hf_hook"):
                on_one_device({"x": x, f"{name}.weight": weight})
        return self.contract(activate(self.expand(x), self.activation))

    def extra_repr(self) -> str:
        names = ("hidden_size", "intermediate_size", "activation", "layer_index", "seed")
        values = {name: getattr(self, name) for name in names}
        weight = next(self.expand.parameters())
        return changed_arguments(SharedExpert, values | placed(weight))
