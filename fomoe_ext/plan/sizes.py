"""The sizes of a model that the cost model needs. Needs no torch.

`ModelSizes` describes any decoder with experts in some of its blocks. `sizes_of` makes it from a
`ModelConfig`, `fomoe_ext.plan.hf` from a config.json of transformers. The `model` of a planned
job's `TrainConfig` is of either type.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from fomoe_ext.config.model import ModelConfig, ParameterCounts, expert_matrices, expert_parameters

Part = Literal["attention", "shared", "unembedding", "other"]
"""What a dense tensor is for: attention; MLPs that all tokens use (shared experts, dense blocks);
logits; or other tensors, which do not multiply tokens (embedding, norms, biases)."""


class Weight(NamedTuple):
    """`times` dense tensors of one shape, each of `rows` rows of `row_size` elements.

    in_block: whether they are in the blocks with experts, the same number in each.
    """

    part: Part
    rows: int
    row_size: int
    times: int = 1
    in_block: bool = True

    @property
    def elements(self) -> int:
        """Elements of all `times` tensors."""
        return self.rows * self.row_size * self.times


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model. Fields that are also in `ModelConfig` mean the same.

    num_layers: blocks with experts. dense: all tensors except routers and routed experts.
    router_row: elements of a router per expert. expert: elements of one expert. expert_matrices:
    elements of its matrices, without biases. attention_scores: FLOPs per token for scores and
    weighted sums in all layers.
    """

    num_layers: int
    num_experts: int
    top_k: int
    seq_len: int
    hidden_size: int
    dense: tuple[Weight, ...]
    router_row: int
    expert: int
    expert_matrices: int
    attention_scores: float
    router_scope: Literal["global", "resident"] = "global"
    balance: str = "none"

    @cached_property
    def counts(self) -> ParameterCounts:
        """Parameters of the whole model by kind, every expert once."""
        rows = self.num_layers * self.num_experts
        dense = sum(weight.elements for weight in self.dense)
        return ParameterCounts(dense, rows * self.expert, rows * self.router_row)

    @cached_property
    def block(self) -> int:
        """Dense elements of a block with experts."""
        return sum(weight.elements for weight in self.dense if weight.in_block) // self.num_layers

    def elements_of(self, part: Part) -> int:
        """Elements of the dense tensors of a part."""
        return sum(weight.elements for weight in self.dense if weight.part == part)


@lru_cache(maxsize=64)
def sizes_of(model: ModelConfig | ModelSizes) -> ModelSizes:
    """The sizes of the model that `fomoe train` builds from a `ModelConfig`. A `ModelSizes` is
    returned as it is.

    Attention has 4 D^2 parameters and the embedding is tied, as in the FoMoE paper (arXiv
    2606.19025). Attention scores count the causal half.
    """
    if isinstance(model, ModelSizes):
        return model
    width, layers, shared = (
        model.hidden_size,
        model.num_layers,
        model.shared_expert_intermediate_size,
    )
    up = expert_matrices(model, shared) // width - shared
    dense = (
        Weight("unembedding", model.vocab_size, width, 1, in_block=False),
        Weight("attention", 3 * width, width, layers),
        Weight("attention", width, width, layers),
        Weight("shared", up, width, layers),
        Weight("shared", width, shared, layers),
        Weight("other", width, 1, 4 * layers),
        Weight("other", width, 1, 2, in_block=False),
    )
    return ModelSizes(
        num_layers=layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        seq_len=model.seq_len,
        hidden_size=width,
        dense=dense,
        router_row=width,
        expert=expert_parameters(model),
        expert_matrices=expert_matrices(model),
        attention_scores=layers * 2.0 * (model.seq_len + 1) * width,
        router_scope=model.router_scope,
        balance=model.balance,
    )
