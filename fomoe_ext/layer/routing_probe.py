"""How stable routing is while a model trains on sites that hold only some of its experts.

All sites route the same validation text before and after every meeting. The FoMoE paper (arXiv
2606.19025) says that routing stays stable but gives no numbers. We report these:

entropy: nats: the entropy of a token's scores, normalised to sum 1, mean over tokens and layers.
load_variation: standard deviation of the experts' load divided by its mean, mean over layers.
dead_experts: number of experts, over all layers, that no token of the probe chose.
between_sites: share of a token's chosen experts that two sites have in common before a meeting,
    mean over pairs of sites, layers and tokens; None for one site.
between_rounds: the same between the models after this meeting and after the previous one; None in
    the first round.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fomoe_ext.layer.balance import expert_load
from fomoe_ext.layer.losses import log_scores
from fomoe_ext.layer.moe import MoELayer


class Choices(NamedTuple):
    """The routing of some tokens: chosen experts int32 [L, T, K] and the mean entropy."""

    experts: Tensor
    entropy: float


Found: TypeAlias = tuple[Choices, Choices, float | None]
"""Result of `RoutingProbe.after_meeting`."""


@torch.no_grad()
def routed(model: nn.Module, layers: list[MoELayer], tokens: Tensor) -> Choices:
    """Runs `model` on tokens [B, S] in eval mode and returns the choices of its `layers`.

    A layer with router_scope "resident" chooses among its resident experts, as in training. With a
    mesh all ranks of a site must call it.
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
    """The mean of `overlap` over all pairs; None for fewer than two choices."""
    pairs = [overlap(a, b) for a, b in combinations(choices, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def load_figures(choices: list[Tensor], num_experts: int) -> tuple[float, int]:
    """load_variation and dead_experts (see the module) of the choices of all sites together."""
    variations, dead = [], 0
    for layer in range(choices[0].shape[0]):
        load = sum(expert_load(c[layer], num_experts) for c in choices)
        assert isinstance(load, Tensor)
        mean = load.double().mean()
        variations.append(float(load.double().std(correction=0) / mean))
        dead += int((load == 0).sum())
    return sum(variations) / len(variations), dead


class RoutingProbe:
    """Measures the routing of a job in every round; all sites must make its calls together."""

    def __init__(self, model: nn.Module, layers: list[MoELayer], tokens: Tensor) -> None:
        """tokens: int64 [B, S], the same on all sites."""
        self.model, self.layers, self.tokens = model, layers, tokens
        self._local: Choices | None = None
        self._last: Tensor | None = None

    def before_meeting(self) -> None:
        """Routes the tokens by this site's model."""
        self._local = routed(self.model, self.layers, self.tokens)

    def after_meeting(self) -> Found:
        """Routes the tokens by the model after the meeting.

        Returns the choices before and after the meeting, and the `overlap` of the latter with the
        choices after the previous meeting.
        """
        assert self._local is not None
        local, now = self._local, routed(self.model, self.layers, self.tokens)
        last, self._last, self._local = self._last, now.experts, None
        return local, now, None if last is None else overlap(last, now.experts)


def pack(found: Found) -> tuple[Any, ...]:
    """Turns the result of `after_meeting` into plain numbers and lists, to send to other sites."""
    *choices, steady = found
    return (*((c.experts.tolist(), c.entropy) for c in choices), steady)


def unpack(plain: tuple[Any, ...]) -> Found:
    """The inverse of `pack`."""
    local, after, steady = plain
    before, now = (
        Choices(torch.tensor(experts, dtype=torch.int32), entropy)
        for experts, entropy in (local, after)
    )
    return before, now, steady


def figures(parts: list[Found], num_experts: int) -> dict[str, Any]:
    """The figures of a round (see the module), from the results of `after_meeting` of all sites."""
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
