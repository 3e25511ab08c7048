"""The MoE blocks of transformers' models: their modules, and the options of an equal `MoELayer`.

A family describes how to read the options of a block, and the layout of its experts: in memory,
where transformers stacks them, and in files, where most architectures store them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fomoe_ext.layer.experts import ExpertWeights

# `Experts.parts` and their names in transformers.
PARTS = {
    "expand_weight": "gate_up_proj",
    "contract_weight": "down_proj",
    "expand_bias": "gate_up_proj_bias",
    "contract_bias": "down_proj_bias",
}
_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
}
Options = dict[str, Any]


class Reader(Protocol):
    """A checkpoint's tensors by name; it counts the bytes that are read."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor or, without reading the others, one row of it."""
        ...


# ---- layouts of experts --------------------------------------------------------------------------


@dataclass(frozen=True)
class SingleExperts:
    """In memory [E, 2N, D], gate rows first, and [E, D, N], as in `Experts`; in files one by one.

    names: of the gate, up and down projections of one expert.
    """

    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    alike: ClassVar[bool] = True
    """Whether the layout in memory is that of `Experts`."""

    def to_ours(self, part: str, values: Tensor) -> Tensor:
        """One expert's part in the layout of `Experts`."""
        return values

    def to_theirs(self, part: str, values: Tensor) -> Tensor:
        """The inverse of `to_ours`."""
        return values

    def read(self, reader: Reader, block: str, expert: int, parts: Iterable[str]) -> ExpertWeights:
        """One expert in the order of `Experts.parts`, from stacked or single tensors in files.

        block: path of the block."""
        stack = f"{block}.experts.gate_up_proj"
        if reader.has(stack):
            return tuple(reader.read(f"{block}.experts.{PARTS[p]}", expert) for p in parts)
        gate, up, down = (
            reader.read(f"{block}.experts.{expert}.{name}.weight") for name in self.names
        )
        return torch.cat((gate, up)), down

    def stored(
        self, reader: Reader, block: str, expert: int, parts: Iterable[str]
    ) -> Iterator[str]:
        """Names of the tensors that `read` reads for an expert."""
        if reader.has(f"{block}.experts.gate_up_proj"):
            yield from (f"{block}.experts.{PARTS[part]}" for part in parts)
        else:
            yield from (f"{block}.experts.{expert}.{name}.weight" for name in self.names)

    def write(
        self, block: str, experts: Iterable[ExpertWeights], parts: Iterable[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all experts, in ascending order, as files have them."""
        for expert, (expand, contract) in enumerate(experts):
            gate, up = expand.chunk(2)
            for name, values in zip(self.names, (gate, up, contract), strict=True):
                yield f"{block}.experts.{expert}.{name}.weight", values


@dataclass(frozen=True)
class InterleavedExperts:
    """Stacked in memory and in files: [E, D, 2N], gate and up columns alternating, and
    [E, N, D]."""

    alike: ClassVar[bool] = False

    def to_ours(self, part: str, values: Tensor) -> Tensor:
        """One expert's part in the layout of `Experts`: gate rows first, then up rows."""
        if part.endswith("weight"):
            values = values.T
        if part.startswith("expand"):
            values = torch.cat((values[0::2], values[1::2]))
        return values

    def to_theirs(self, part: str, values: Tensor) -> Tensor:
        """The inverse of `to_ours`."""
        if part.startswith("expand"):
            values = torch.stack(values.chunk(2), dim=1).flatten(0, 1)
        return values.T if part.endswith("weight") else values

    def read(self, reader: Reader, block: str, expert: int, parts: Iterable[str]) -> ExpertWeights:
        """One expert in the order of `Experts.parts`."""
        names = [(part, f"{block}.experts.{PARTS[part]}") for part in parts]
        return tuple(self.to_ours(part, reader.read(name, expert)) for part, name in names)

    def stored(
        self, reader: Reader, block: str, expert: int, parts: Iterable[str]
    ) -> Iterator[str]:
        """Names of the tensors that `read` reads for an expert."""
        yield from (f"{block}.experts.{PARTS[part]}" for part in parts)

    def write(
        self, block: str, experts: Iterable[ExpertWeights], parts: Iterable[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all experts, in ascending order, as files have them."""
        stacks: dict[str, list[Tensor]] = {part: [] for part in parts}
        for weights in experts:
            for (part, rows), values in zip(stacks.items(), weights, strict=True):
                rows.append(self.to_theirs(part, values))
        for part, rows in stacks.items():
            yield f"{block}.experts.{PARTS[part]}", torch.stack(rows)


# ---- families ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One kind of MoE block.

    name: of the architecture, for messages.
    block: name of the block's class. Its modules are `experts`, the router and those in `shared`.
    options: (block, config) -> keyword options of `MoELayer`; sizes are read from the weights.
        Raises ValueError if the block has a feature that `MoELayer` lacks.
    router: name of the router in the block. It has `weight` and perhaps `bias`.
    selection_bias: name of the router's selection bias; "" = it has none.
    shared: names of the shared expert in the block and, if there is one, of the linear layer whose
        sigmoid scales it; empty = no shared expert.
    layout: of the experts.
    returns_scores: whether the block returns (y, scores) instead of y.
    block_in_files: name of the block in files, if it differs from the attribute's name.
    """

    name: str
    block: str
    options: Callable[[nn.Module, Any], Options]
    router: str = "gate"
    selection_bias: str = ""
    shared: tuple[str, ...] = ()
    layout: SingleExperts | InterleavedExperts = SingleExperts()
    returns_scores: bool = False
    block_in_files: str = ""

    def path_in_files(self, path: str) -> str:
        """Path in files of the block that is at `path` in the model."""
        parent, _, name = path.rpartition(".")
        return f"{parent}.{self.block_in_files or name}" if parent else name


def gated_activation(name: str) -> str:
    """The name in `MoELayer` of a gated activation, from its name in transformers.

    Raises ValueError for an activation that the kernels do not support.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def softmax_options(config: Any, renormalize: bool) -> Options:
    """Options for a softmax over all experts, of which the top `num_experts_per_tok` are kept."""
    return {
        "top_k": config.num_experts_per_tok,
        "activation": gated_activation(config.hidden_act),
        "router_scoring": "softmax",
        "router_renormalize": renormalize,
    }


def _mixtral(block: nn.Module, config: Any) -> Options:
    if config.router_jitter_noise:
        raise ValueError(
            f"router_jitter_noise must be 0 for a MoELayer, got {config.router_jitter_noise}"
        )
    return softmax_options(config, renormalize=True)


def _normalised(block: nn.Module, config: Any) -> Options:
    return softmax_options(config, renormalize=bool(config.norm_topk_prob))


def _deepseek_v3(block: nn.Module, config: Any) -> Options:
    return {
        "top_k": config.num_experts_per_tok,
        "activation": gated_activation(config.hidden_act),
        "router_scoring": "sigmoid",
        "router_renormalize": bool(config.norm_topk_prob),
        "router_scale": float(config.routed_scaling_factor),
        "router_num_groups": config.n_group,
        "router_groups_kept": config.topk_group,
    }


def _gpt_oss(block: nn.Module, config: Any) -> Options:
    experts: Any = block.experts
    if (experts.alpha, experts.limit) != (1.702, 7.0):
        raise ValueError(
            "swiglu_alpha and swiglu_limit must be 1.702 and 7.0, got "
            f"{experts.alpha} and {experts.limit}"
        )
    # A softmax over the chosen logits equals one over all logits, renormalised over the chosen.
    return {
        "top_k": config.num_experts_per_tok,
        "activation": "clamped_swiglu",
        "expert_bias": True,
        "router_bias": True,
        "router_scoring": "softmax",
        "router_renormalize": True,
    }


_families: dict[str, Family] = {}


def register(family: Family) -> None:
    """Adds a family. It replaces one with the same block class."""
    _families[family.block] = family


def families() -> tuple[Family, ...]:
    """All supported families."""
    return tuple(_families.values())


def family_of(module: nn.Module) -> Family | None:
    """The family whose block a module is; None = of no supported family."""
    return _families.get(type(module).__name__)


for _family in (
    Family(
        "mixtral",
        "MixtralSparseMoeBlock",
        _mixtral,
        layout=SingleExperts(("w1", "w3", "w2")),
        block_in_files="block_sparse_moe",
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        _normalised,
        shared=("shared_expert", "shared_expert_gate"),
    ),
    Family("qwen3_moe", "Qwen3MoeSparseMoeBlock", _normalised),
    Family("olmoe", "OlmoeSparseMoeBlock", _normalised),
    Family(
        "deepseek_v3",
        "DeepseekV3MoE",
        _deepseek_v3,
        selection_bias="e_score_correction_bias",
        shared=("shared_experts",),
    ),
    Family(
        "gpt_oss",
        "GptOssMLP",
        _gpt_oss,
        router="router",
        layout=InterleavedExperts(),
        returns_scores=True,
    ),
):
    register(_family)
