"""How stable routing is while a model trains on sites that hold only some of its experts.

All sites route the same validation text before and after every meeting. The FoMoE paper (arXiv
2606.19025) says that routing stays stable and gives no numbers; these are ours:

entropy: nats, mean over tokens and layers of the entropy of a token's scores normalised to sum 1.
load_variation: standard deviation over mean of the load of experts, mean over layers.
dead_experts: experts of all layers that no token of the probe chose.
between_sites: share of a token's choices that two sites have in common before a meeting, mean over
    pairs of sites, layers and tokens; None for one site.
between_rounds: the same of the model after this meeting and after the one before; None at first.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fomoe_ext.layer.balance import expert_load, log_scores
from fomoe_ext.layer.moe import MoELayer


class Choices(NamedTuple):
    """What a model's routers made of some tokens: experts int32 [L, T, K] and the mean entropy."""

    experts: Tensor
    entropy: float


Found: TypeAlias = tuple[Choices, Choices, float | None]
"""What `RoutingProbe.after_meeting` returns."""


@torch.no_grad()
def routed(model: nn.Module, layers: list[MoELayer], tokens: Tensor) -> Choices:
    """Runs `model` on tokens [B, S] in eval mode and returns what its `layers` chose.

    A layer with router_scope "resident" chooses among its residents, as in training. Under a mesh
    all ranks of a site must call it.
    """
    chosen: list[Tensor] = []
    entropies: list[Tensor] = []

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MoELayer)
        x, router = arguments[0], layer.router
        logits = router.logits(x.reshape(-1, layer.hidden_size))
        top_k = layer.top_k
        if layer.allowed is not None:
            top_k = min(top_k, int(layer.allowed.sum()))
        _, experts = router.choose(logits, layer.allowed, top_k)
        if layer.allowed is not None:
            logits = logits[:, layer.allowed]
        scores = log_scores(logits, router.scoring)
        chosen.append(experts.cpu())
        entropies.append(-(scores.exp() * scores).sum(-1).mean())

    training, before = model.training, [layer.stats for layer in layers]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    model.eval()
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
        for layer, stats in zip(layers, before, strict=True):
            layer.stats = stats
    return Choices(torch.stack(chosen), float(torch.stack(entropies).mean()))


def overlap(one: Tensor, other: Tensor) -> float:
    """Mean over layers and tokens of |A and B| / K of two choices int32 [L, T, K].

    Raises ValueError for different shapes.
    """
    if one.shape != other.shape:
        raise ValueError(f"one and other must have one shape, got {one.shape} and {other.shape}")
    return float((one.unsqueeze(-1) == other.unsqueeze(-2)).any(-1).double().mean())


def between(choices: list[Tensor]) -> float | None:
    """`overlap`, mean over all pairs; None for fewer than two."""
    pairs = [overlap(a, b) for a, b in combinations(choices, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def load_figures(choices: list[Tensor], num_experts: int) -> tuple[float, int]:
    """Variation and dead experts (see the module) of the choices of all sites together."""
    variations, dead = [], 0
    for layer in range(choices[0].shape[0]):
        load = sum(expert_load(c[layer], num_experts) for c in choices)
        assert isinstance(load, Tensor)
        mean = load.double().mean()
        variations.append(float(load.double().std(correction=0) / mean))
        dead += int((load == 0).sum())
    return sum(variations) / len(variations), dead


class RoutingProbe:
    """The figures of a job, round after round; all sites must make its calls together."""

    def __init__(self, model: nn.Module, layers: list[MoELayer], tokens: Tensor) -> None:
        """`tokens` int64 [B, S]: the same on all sites."""
        self.model, self.layers, self.tokens = model, layers, tokens
        self._local: Choices | None = None
        self._last: Tensor | None = None

    def before_meeting(self) -> None:
        """Routes by this site's own model."""
        self._local = routed(self.model, self.layers, self.tokens)

    def after_meeting(self) -> Found:
        """Routes by the model that the meeting made.

        Returns the choices before and after, and how much the latter have in common with those
        after the last meeting.
        """
        assert self._local is not None
        local, now = self._local, routed(self.model, self.layers, self.tokens)
        last, self._last, self._local = self._last, now.experts, None
        return local, now, None if last is None else overlap(last, now.experts)


def pack(found: Found) -> tuple[Any, ...]:
    """What `after_meeting` returned, as plain numbers and lists for the other sites."""
    *choices, steady = found
    return (*((c.experts.tolist(), c.entropy) for c in choices), steady)


def unpack(plain: tuple[Any, ...]) -> Found:
    """What `pack` was given."""
    local, after, steady = plain
    before, now = (
        Choices(torch.tensor(experts, dtype=torch.int32), entropy)
        for experts, entropy in (local, after)
    )
    return before, now, steady


def figures(parts: list[Found], num_experts: int) -> dict[str, Any]:
    """The figures of a round (see the module) of what `after_meeting` returned on every site."""
    local, after = [part[0] for part in parts], [part[1] for part in parts]
    variation, dead = load_figures([choices.experts for choices in after], num_experts)
    steady = [part[2] for part in parts if part[2] is not None]
    return {
        "entropy": sum(choices.entropy for choices in after) / len(after),
        "load_variation": variation,
        "dead_experts": dead,
        "between_sites": between([choices.experts for choices in local]),
        "between_rounds": sum(steady) / len(steady) if steady else None,
    }
