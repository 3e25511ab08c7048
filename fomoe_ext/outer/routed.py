"""Tokens routed to each expert in all forward passes that lead to an optimizer step.

`RoutedTokens` counts them by hooks, `TokenCounts` sums them up until the expert meets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fomoe_ext.layer.moe import MoELayer


class _Count:
    """A forward hook of one layer. Counts each pass in training mode with gradients once.

    `seen`: tokens of such passes, int64 [E]; `trained`: those of passes that had a backward pass.
    It has no reference to an OuterSync, so that a model with this hook can be copied and stored.
    """

    def __init__(self, layer: MoELayer) -> None:
        self.seen = torch.zeros_like(layer.load_since_update)
        self.trained = torch.zeros_like(self.seen)

    def __call__(self, layer: MoELayer, inputs: Any, output: Any) -> None:
        if not (layer.training and torch.is_grad_enabled()) or layer.stats is None:
            return
        load = layer.stats.load
        if torch.compiler.is_compiling():
            self.seen.add_(load)
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return
        if self.seen.device != load.device:
            self.seen, self.trained = self.seen.to(load.device), self.trained.to(load.device)
        # An activation checkpoint computes a layer again in the backward pass. In its reentrant
        # form this second result gets the gradient, in the other form the first one does.
        if torch._C._current_graph_task_id() == -1:
            self.seen.add_(load)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        if y.requires_grad:
            y.register_hook(_Once(self, load))


class _Once:
    """Counts a pass as trained when its output first gets a gradient."""

    def __init__(self, count: _Count, load: Tensor) -> None:
        self._count, self._load = count, load
        self._done = False

    def __call__(self, gradient: Tensor) -> None:
        if not self._done:
            self._done = True
            self._count.trained.add_(self._load)


class RoutedTokens:
    """Counts in the layers of a model, since the last `take`."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._counts = [_Count(layer) for layer in layers]
        self.handles: list[RemovableHandle] = [
            layer.register_forward_hook(count)
            for layer, count in zip(layers, self._counts, strict=True)
        ]
        """Of the hooks."""

    @torch.no_grad()
    def take(self) -> Tensor | None:
        """The slots that chose each expert since the last call, fp64 [L, E] on the CPU; None
        without layers.

        Counts passes that had a backward pass. If none was seen (a replayed graph, gradients set by
        hand), counts all passes in training mode with gradients.
        """
        if not self._counts:
            return None
        both = torch.stack([torch.stack([c.seen, c.trained]).cpu() for c in self._counts])
        for count in self._counts:
            count.seen.zero_()
            count.trained.zero_()
        seen, trained = both.double().unbind(1)
        return trained if bool(trained.any()) else seen


class TokenCounts:
    """Tokens of a site since the last meetings of its experts.

    tokens: routed to each expert since that met last, fp64 [L, E], where they are counted. met: the
    round in which each expert that this site holds last met, int64 [L, E]; 0 = none yet. counted:
    by layer, whether any tokens were counted since its last meeting. trained: what this rank has
    trained on in the round, with site_mean "tokens".
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        shape = len(layers), layers[0].num_experts if layers else 0
        self.tokens = torch.zeros(shape, dtype=torch.float64)
        self.met = torch.zeros(shape, dtype=torch.int64)
        self.counted = [False] * len(layers)
        self.trained = 0.0

    def add(self, routed: Tensor) -> None:
        """Adds the tokens routed in the passes before a step, fp64 [L, E]."""
        self.tokens += routed
        found = routed.any(1).tolist()
        self.counted = [a or b for a, b in zip(self.counted, found, strict=True)]

    def forget(self, experts: Iterable[tuple[int, int]], round_index: int) -> None:
        """Resets the counts of these experts (layer, expert), which meet in this round."""
        for expert in experts:
            self.tokens[expert] = 0
            self.counted[expert[0]] = False
            self.met[expert] = round_index
