"""The section [model], and how many parameters a model of it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fomoe_ext.activations import Activation, num_projections
from fomoe_ext.config.limits import at_least, inside


@dataclass(frozen=True)
class ModelConfig:
    """The language model: a decoder with RoPE attention and an MoE in every block."""

    vocab_size: int = 256
    """Number of token ids; grown to the tokenizer's when that is larger."""
    seq_len: int = 256
    """Tokens per training sequence."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of blocks (attention + MoE)."""
    num_heads: int = 4
    """Attention heads; the head size hidden_size / num_heads must be even."""
    num_experts: int = 16
    """Routed experts per layer, over all sites."""
    intermediate_size: int = 128
    """Inner width of one routed expert."""
    top_k: int = 2
    """Experts chosen per token."""
    activation: Activation = "swiglu"
    """Activation of the experts; those with glu in their name are gated (two up projections)."""
    expert_bias: bool = False
    """Biases in the routed experts, as gpt-oss has them."""
    router_scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become scores."""
    router_scope: Literal["global", "resident"] = "global"
    """global: choose among all experts, skip those not resident; resident: among those resident."""
    skipped_mass: Literal["drop", "rescale"] = "drop"
    """drop: a skipped expert's weight is lost; rescale: the token's computed experts share it."""
    router_renormalize: bool = False
    """Divide the chosen experts' scores by their sum."""
    router_scale: float = 1.0
    """Factor on the chosen experts' scores."""
    router_num_groups: int = 1
    """Expert groups for group-limited choice."""
    router_groups_kept: int = 1
    """Groups a token may choose from."""
    shared_expert_intermediate_size: int = 0
    """Inner width of an expert that every token uses and every site holds; 0 = none."""
    balance: Literal["none", "switch", "entropy", "bias"] = "bias"
    """Load balancing: an auxiliary loss (switch, entropy) or a learned selection bias, which each
    site moves by its own load and which is averaged at the end of a round (also with ddp)."""
    balance_coef: float = 0.01
    """Weight of the auxiliary balance loss."""
    router_z_loss_coef: float = 0.0
    """Weight of the router z-loss."""
    balance_bias_rate: float = 4e-3
    """Step of the selection bias for balance = bias."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm (without bias) or RMSNorm."""
    rope_base: float = 10000.0
    """Base of the rotary position angles."""
    depth_multiplier: float = 1.0
    """Factor on every block output before it joins the residual stream (CompleteP)."""

    def __post_init__(self) -> None:
        at = "model."
        at_least(at, 1, vocab_size=self.vocab_size, seq_len=self.seq_len, top_k=self.top_k)
        at_least(at, 1, hidden_size=self.hidden_size, num_layers=self.num_layers)
        at_least(at, 1, num_heads=self.num_heads, num_experts=self.num_experts)
        at_least(
            at,
            1,
            intermediate_size=self.intermediate_size,
            router_num_groups=self.router_num_groups,
        )
        at_least(
            at,
            0,
            shared_expert_intermediate_size=self.shared_expert_intermediate_size,
            router_z_loss_coef=self.router_z_loss_coef,
        )
        at_least(at, 0, balance_coef=self.balance_coef, balance_bias_rate=self.balance_bias_rate)
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"model.num_heads must divide model.hidden_size into heads of even size, got "
                f"hidden_size {self.hidden_size} and num_heads {self.num_heads}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.top_k must be <= model.num_experts, got {self.top_k} and {self.num_experts}"
            )
        if self.num_experts % self.router_num_groups:
            raise ValueError(
                f"model.router_num_groups must divide model.num_experts = {self.num_experts}, got "
                f"{self.router_num_groups}"
            )
        inside(at, 1, self.router_num_groups, router_groups_kept=self.router_groups_kept)
        choosable = self.num_experts // self.router_num_groups * self.router_groups_kept
        if self.top_k > choosable:
            raise ValueError(
                f"model.top_k must be <= the {choosable} experts in router_groups_kept groups, got "
                f"{self.top_k}"
            )
        if not self.rope_base > 1:
            raise ValueError(f"model.rope_base must be > 1, got {self.rope_base}")
        if not (self.depth_multiplier > 0 and self.router_scale > 0):
            raise ValueError(
                f"model.depth_multiplier and model.router_scale must be > 0, got "
                f"{self.depth_multiplier} and {self.router_scale}"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class ParameterCounts(NamedTuple):
    """Parameters of a whole model by kind; `dense` is all that is neither expert nor router."""

    dense: int
    sparse: int
    router: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.sparse + self.router

    @property
    def sparse_share(self) -> float:
        """Share of all parameters that sits in routed experts, 0..1."""
        return self.sparse / self.total


def expert_matrices(config: ModelConfig, intermediate_size: int | None = None) -> int:
    """Elements of the matrices of an expert, routed or (of another size) shared: G*N*D up and D*N
    down, G = 2 for gated activations.
    """
    size = config.intermediate_size if intermediate_size is None else intermediate_size
    return (num_projections(config.activation) + 1) * size * config.hidden_size


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one routed expert: its matrices and, with biases, G*N + D more."""
    biases = num_projections(config.activation) * config.intermediate_size + config.hidden_size
    return expert_matrices(config) + (biases if config.expert_bias else 0)


def block_parameters(config: ModelConfig) -> int:
    """Parameters of a block but for router and routed experts: attention, norms, shared expert."""
    width, shared = (
        config.hidden_size,
        expert_matrices(config, config.shared_expert_intermediate_size),
    )
    return 4 * width * width + 4 * width + shared


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameter counts of the whole model (every expert once), without allocating anything.

    Dense: tied embedding V*D, attention 4*D^2 per layer, norm gains (4 per layer and 2), shared
    experts. Without the norms the sum is the formula that reproduces the FoMoE paper's sizes,
    V*D + L*(4*D^2 + 2*D*N*E + D*E).
    """
    width, layers = config.hidden_size, config.num_layers
    dense = config.vocab_size * width + 2 * width + layers * block_parameters(config)
    return ParameterCounts(
        dense=dense,
        sparse=layers * config.num_experts * expert_parameters(config),
        router=layers * config.num_experts * width,
    )
