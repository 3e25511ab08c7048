"""The cost model of a job: bytes sent, memory and arithmetic of each site. Needs no torch.

Bytes are exact: `round_bytes` is what `OuterSync` counts where it sends. Memory counts parameters,
gradients, optimizer and outer state, not activations. The paper's own formulas (arXiv 2606.19025,
section on cost models) are the functions that begin with `paper_`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fomoe_ext.config import ModelConfig, ParameterCounts, count_parameters, expert_parameters
from fomoe_ext.placement import Placement

FLOAT_BYTES = 4
"""Parameters, gradients, moments, anchor and momentum are fp32."""


# ----------------------------------------------------------------------------------------- memory


class SiteMemory(NamedTuple):
    """Bytes that one site holds, without activations and buffers of a meeting."""

    parameters: int
    gradients: int
    inner_state: int
    anchor: int
    outer_state: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def site_parameters(model: ModelConfig, placement: Placement | None, site: int) -> ParameterCounts:
    """Parameters that a site holds by kind; `placement` None = a full replica."""
    whole = count_parameters(model)
    if placement is None:
        return whole
    experts = sum(len(placement.resident(layer, site)) for layer in range(model.num_layers))
    return whole._replace(sparse=experts * expert_parameters(model))


def site_memory(
    model: ModelConfig,
    placement: Placement | None,
    site: int = 0,
    *,
    optimizer: str = "diloco",
    inner_optimizer: str = "adamw",
) -> SiteMemory:
    """Bytes of parameters and state on a site; `placement` None = a full replica.

    `optimizer` as in `OuterConfig`: ddp needs no anchor, diloco keeps a momentum, local-adamw an
    anchor of both moments too. `inner_optimizer` adamw keeps two moments, sgd one.
    """
    _one_of("optimizer", optimizer, ("diloco", "fedavg", "local-adamw", "ddp"))
    _one_of("inner_optimizer", inner_optimizer, ("adamw", "sgd"))
    unit = FLOAT_BYTES * site_parameters(model, placement, site).total
    return SiteMemory(
        parameters=unit,
        gradients=unit,
        inner_state=unit * (2 if inner_optimizer == "adamw" else 1),
        anchor=0 if optimizer == "ddp" else unit,
        outer_state=unit if optimizer == "diloco" else 0,
    )


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


# ------------------------------------------------------------------------------------- arithmetic


class TokenFlops(NamedTuple):
    """Floating-point operations of a forward pass per token (a multiply-add is two)."""

    attention: float
    router: float
    experts: float
    shared_experts: float
    unembedding: float

    @property
    def forward(self) -> float:
        """All of the forward pass."""
        return sum(self)

    @property
    def training(self) -> float:
        """Forward and backward: three times the forward pass."""
        return 3 * sum(self)


def flops_per_token(model: ModelConfig, resident_share: float = 1.0) -> TokenFlops:
    """FLOPs per token of a sequence of `model.seq_len`; norms and other vector work are left out.

    `resident_share` in 0..1 is the share of experts a site holds. With router_scope "global" slots
    on the others are skipped: with an even load the experts' work is times that share. With
    "resident" a token still has min(top_k, residents) experts. Attention counts the causal half.
    """
    if not 0 < resident_share <= 1:
        raise ValueError(f"resident_share must be in (0, 1], got {resident_share}")
    width, layers = model.hidden_size, model.num_layers
    if model.router_scope == "global":
        slots = model.top_k * resident_share
    else:
        slots = min(model.top_k, model.num_experts * resident_share)
    per_unit = expert_parameters(model) / model.expert_size
    return TokenFlops(
        attention=layers * (8.0 * width**2 + 2.0 * (model.seq_len + 1) * width),
        router=layers * 2.0 * model.num_experts * width,
        experts=layers * slots * 2.0 * expert_parameters(model),
        shared_experts=layers * 2.0 * per_unit * model.shared_expert_size,
        unembedding=2.0 * model.vocab_size * width,
    )


# ------------------------------------------------------------------------------ the paper's model


def paper_ring_bytes(payload: float, members: int) -> float:
    """Bytes each of n `members` sends in a ring all-reduce of `payload` bytes: 2 (n - 1) / n."""
    return 2.0 * (members - 1) / members * payload


def paper_round_bytes(
    dense: float,
    sparse: float,
    num_sites: int,
    replication: int,
    *,
    bytes_per_parameter: float = 2.0,
    reshuffles_per_round: float = 0.0,
    moments: bool = False,
) -> float:
    """Bytes a site sends per round by the paper's formula, for numbers of parameters of the model.

    B = 2(M-1)/M S_dense + (2(O-1)/O + gamma (1 - O/M)) (O/M) S_sparse, times 3 for LocalAdamW
    (`moments`), with M sites, O = replication and gamma = `reshuffles_per_round`. Their payload is
    bf16.
    """
    if not 1 <= replication <= num_sites:
        raise ValueError(f"replication must be in [1, num_sites = {num_sites}], got {replication}")
    held = replication / num_sites
    ring = 2.0 * (replication - 1) / replication
    moved = reshuffles_per_round * (1.0 - held)
    total = paper_ring_bytes(dense, num_sites) + (ring + moved) * held * sparse
    return total * bytes_per_parameter * (3 if moments else 1)


def paper_memory_bytes(dense: float, sparse: float, num_sites: int, replication: int) -> float:
    """Bytes per site by the paper: 18 per parameter (fp16 and fp32 weight, moments, gradient)."""
    return 18.0 * (dense + sparse * replication / num_sites)
