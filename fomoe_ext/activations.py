"""The activations that an expert may have: name, number and whether gated. Needs no torch.

    swiglu          silu(gate) * up
    geglu           gelu(gate) * up
    silu            silu(up)
    relu2           relu(up)^2
    gelu            gelu(up)
    clamped_swiglu  gate * sigmoid(1.702 * gate) * (up + 1), with gate at most 7 and up in -7 .. 7,
                    that of gpt-oss (arXiv 2508.10925)

GELU is in its tanh form. Gated activations take two projections, gate first and then up.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Activation: TypeAlias = Literal["swiglu", "geglu", "silu", "relu2", "gelu", "clamped_swiglu"]
"""The names, for type hints and for what a configuration accepts."""

_TABLE: tuple[tuple[Activation, int, bool], ...] = (
    ("swiglu", 0, True),
    ("geglu", 1, True),
    ("silu", 2, False),
    ("relu2", 3, False),
    ("gelu", 4, False),
    ("clamped_swiglu", 5, True),
)
"""Name, number in `csrc/kernels.h`, gated."""

ACTIVATIONS: dict[str, int] = {name: number for name, number, _ in _TABLE}
"""The kernels' number of every activation, by name."""

_GATED = frozenset(name for name, _, gated in _TABLE if gated)


def activation_id(activation: str) -> int:
    """The kernels' number of an activation. ValueError for an unknown name."""
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    return ACTIVATIONS[activation]


def is_gated(activation: str) -> bool:
    """Whether an activation takes a gate besides up. ValueError for an unknown name."""
    activation_id(activation)
    return activation in _GATED


def num_projections(activation: str) -> int:
    """G, the up projections of an expert: 2 for gated activations (gate and up), else 1."""
    return 2 if is_gated(activation) else 1
