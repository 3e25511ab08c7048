"""The section [model], and how many parameters a model of it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fomoe_ext.activations import Activation, num_projections
from fomoe_ext.config.limits import at_least, inside


@dataclass(frozen=True)
class ModelConfig:
    """The language model: a decoder with RoPE attention and an MoE layer in every block."""

    vocab_size: int = 256
    """Number of token ids; raised to the tokenizer's number if that is larger."""
    seq_len: int = 256
    """Tokens per training sequence."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of blocks, each of attention and an MoE layer."""
    num_heads: int = 4
    """Attention heads per block; hidden_size / num_heads must be a whole, even number."""
    num_experts: int = 16
    """Routed experts per layer, counted over all sites."""
    intermediate_size: int = 128
    """Inner width of a routed expert."""
    top_k: int = 2
    """Number of experts chosen for each token."""
    activation: Activation = "swiglu"
    """Activation of the experts. Those with glu in their name are gated and have two up
    projections."""
    expert_bias: bool = False
    """Give routed experts biases, as gpt-oss does."""
    router_scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """How the router's logits are turned into scores."""
    router_scope: Literal["global", "resident"] = "global"
    """Among which experts tokens choose. global: all; those that the site does not hold are
    skipped. resident: only those that the site holds."""
    skipped_mass: Literal["drop", "rescale"] = "drop"
    """What happens to the weight of skipped experts. drop: it is lost; rescale: the token's other
    chosen experts share it in proportion to their weights."""
    router_renormalize: bool = False
    """Divide the scores of a token's chosen experts by their sum."""
    router_scale: float = 1.0
    """Factor on the scores of a token's chosen experts."""
    router_num_groups: int = 1
    """Split the experts into this many groups and choose within the best of them (as DeepSeek-V3);
    1 = no groups."""
    router_groups_kept: int = 1
    """Number of groups that each token may choose from."""
    shared_expert_intermediate_size: int = 0
    """Inner width of a shared expert, which every site holds and every token uses; 0 = none."""
    balance: Literal["none", "switch", "entropy", "bias"] = "bias"
    """How the load of experts is balanced. switch, entropy: an auxiliary loss; bias: a selection
    bias per expert, which each site adjusts by its own load and which meetings average."""
    balance_coef: float = 0.01
    """Weight of the auxiliary loss for balance = switch or entropy."""
    router_z_loss_coef: float = 0.0
    """Weight of the router z-loss; 0 = none."""
    balance_bias_rate: float = 4e-3
    """Step size of the selection bias for balance = bias."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm (without bias) or RMSNorm."""
    rope_base: float = 10000.0
    """Base of the rotary position embedding."""
    depth_multiplier: float = 1.0
    """Factor on every block's output before it is added to the residual stream (CompleteP)."""

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
                f"model.top_k must be at most model.num_experts = {self.num_experts}, got "
                f"{self.top_k}"
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
                f"model.top_k must be at most {choosable}, the number of experts in "
                f"router_groups_kept = {self.router_groups_kept} groups, got {self.top_k}"
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
    """Number of parameters of a whole model by kind. dense: all except routed experts (`sparse`)
    and routers."""

    dense: int
    sparse: int
    router: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.sparse + self.router

    @property
    def sparse_share(self) -> float:
        """Share of all parameters that are in routed experts, 0 to 1."""
        return self.sparse / self.total


def expert_matrices(config: ModelConfig, intermediate_size: int | None = None) -> int:
    """Elements of the matrices of an expert: G*N*D up and D*N down, G = 2 for gated activations.

    `intermediate_size`: N of a shared expert; None = that of routed experts.
    """
    size = config.intermediate_size if intermediate_size is None else intermediate_size
    return (num_projections(config.activation) + 1) * size * config.hidden_size


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one routed expert: its matrices and, with biases, G*N + D more."""
    biases = num_projections(config.activation) * config.intermediate_size + config.hidden_size
    return expert_matrices(config) + (biases if config.expert_bias else 0)


def block_parameters(config: ModelConfig) -> int:
    """Parameters of a block without router and routed experts: attention, norms, shared expert."""
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
