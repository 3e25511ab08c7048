"""What the cost model must know of a model: its tensors, and which multiply tokens; without torch.

`ModelSizes` describes any decoder of which some blocks have experts: `sizes_of` makes one of a
`ModelConfig`, `fomoe_ext.plan.hf` of a config.json of transformers. A planned job has either as its
`TrainConfig.model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from fomoe_ext.activations import num_projections
from fomoe_ext.config.model import ModelConfig, ParameterCounts, expert_matrices, expert_parameters

Part = Literal["attention", "shared", "unembedding", "other"]
"""What a dense tensor is for: matrices of attention, of MLPs that every token goes through (shared
experts, dense blocks), of the logits; or nothing that multiplies tokens (embedding, norms, biases).
"""


class Weight(NamedTuple):
    """`times` dense tensors of the same shape, `rows` of `row_size` elements.

    in_block: they are in blocks that have experts, equally many in each.
    """

    part: Part
    rows: int
    row_size: int
    times: int = 1
    in_block: bool = True

    @property
    def elements(self) -> int:
        """Of all of them."""
        return self.rows * self.row_size * self.times


@dataclass(frozen=True)
class ModelSizes:
    """A model's sizes as the cost model sees it. Names that `ModelConfig` has mean the same.

    num_layers: blocks with experts. dense: all tensors but routers and routed experts. router_row:
    elements of a router per expert. expert: elements of one. expert_matrices: those of them that
    multiply a token. attention_scores: FLOPs per token for scores and weighted sums, all layers.
    gates: up projections of an expert.
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
    gates: int = 2

    @property
    def intermediate_size(self) -> int:
        """Inner width of a routed expert."""
        return self.expert_matrices // ((self.gates + 1) * self.hidden_size)

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
    """The sizes of the model that `fomoe train` makes of a `ModelConfig`; others as they are.

    Attention of 4 D^2 and a tied embedding, as in the FoMoE paper (arXiv 2606.19025), whose sizes
    `count_parameters` reproduces. Of attention the causal half is counted.
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
        gates=num_projections(model.activation),
    )
