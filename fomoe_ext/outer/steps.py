"""Local steps that are taken note of by hooks of optimizers, where nobody calls `after_step`.

A step may be that of several optimizers, and other things may belong to it (a step of bias
balancing). So it is taken note of as late as can be: when `after_step` is called, else before the
next forward pass in training, the next step of the same optimizer, or the meeting.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fomoe_ext.outer.options import MeetingError
from fomoe_ext.outer.routed import RoutedTokens

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from fomoe_ext.layer.moe import MoELayer
    from fomoe_ext.outer.sync import OuterSync

_WATCHES: weakref.WeakKeyDictionary[nn.Module, StepWatch] = weakref.WeakKeyDictionary()


class StepWatch:
    """Watches the optimizers that hold parameters of an OuterSync's model, while that is there.

    A later OuterSync of the same model takes over.
    """

    def __init__(self, sync: OuterSync) -> None:
        self._sync = weakref.ref(sync)
        self._stepped: set[int] = set()
        """Optimizers of the step that is not taken note of yet."""
        self._unasked = False
        """Whether the last step was taken note of without `after_step`."""
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.since = 0
        """Steps since the last meeting of a round, as far as that is known."""
        self._warned = False
        self._reductions = 0
        """Reductions of gradients before that."""
        layers = sync.moe_layers if sync.options.counts_tokens else []
        self.counted = [False] * len(sync.moe_layers)
        """By layer, whether any tokens were counted since its last meeting."""
        self._routed = RoutedTokens(layers)
        before, after = weakref.WeakMethod(self._before), weakref.WeakMethod(self._after)
        handles = [
            *self._routed.handles,
            register_optimizer_step_pre_hook(_Hook(before)),
            register_optimizer_step_post_hook(_Hook(after)),
        ]
        if sync.options.staggered:
            handles.append(sync.model.register_forward_pre_hook(_BeforePass(self)))
        self._end = weakref.finalize(sync, _remove, handles)
        self._end.atexit = False
        earlier = _WATCHES.get(sync.model)
        if earlier is not None:
            earlier.close()
        _WATCHES[sync.model] = self

    def close(self) -> None:
        """Removes all hooks."""
        self._end()

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has parameters of the model."""
        sync = self._sync()
        if sync is None or not self._end.alive:
            return False
        own = {id(parameter) for parameter in sync.model.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _before(self, optimizer: Optimizer) -> None:
        if not self.holds(optimizer):
            return
        if id(optimizer) in self._stepped:
            self.catch_up()
        sync = self._sync()
        assert sync is not None
        if sync.rule.name == "ddp" and not sync.reduction.used_by(optimizer, sync.model):
            sync.reduce_gradients()
            sync.reduction.used_by(optimizer, sync.model)

    def _after(self, optimizer: Optimizer) -> None:
        if self.holds(optimizer):
            sync = self._sync()
            assert sync is not None
            self._seen.add(optimizer)
            self._stepped.add(id(optimizer))
            self._unasked = False
            self._count(sync)

    @property
    def waiting(self) -> bool:
        """Whether a step has not been taken note of yet."""
        return bool(self._stepped)

    def catch_up(self) -> None:
        """Takes note of a step for which `after_step` was not called."""
        sync = self._sync()
        if self._stepped and sync is not None:
            self._stepped.clear()
            self._unasked = True
            self._note(sync)

    def asked(self) -> None:
        """`OuterSync.after_step`: takes note of a step, unless that has been done."""
        sync, late = self._sync(), self._unasked and not self._stepped
        self._stepped.clear()
        self._unasked = False
        if not late and sync is not None:
            self._count(sync)
            self._note(sync)

    def _count(self, sync: OuterSync) -> None:
        """Takes note of the tokens routed in the passes that have led to a step."""
        routed = self._routed.take()
        if routed is not None:
            sync.tokens += routed
            found = routed.any(1).tolist()
            self.counted = [a or b for a, b in zip(self.counted, found, strict=True)]

    @torch.no_grad()
    def _note(self, sync: OuterSync) -> None:
        since, options = self.since, sync.options
        if options.staggered and since == options.local_steps:
            raise MeetingError(f"step was not called after local_steps = {since} steps of a round")
        sync._steps += 1
        self.since = since + 1
        if options.staggered:
            sync.meet_parts()

    def other_optimizer(self, named: Iterable[tuple[str, Tensor]]) -> str:
        """Names a parameter that another optimizer than the inner one has trained, or is empty."""
        sync = self._sync()
        assert sync is not None
        names = {id(parameter): name for name, parameter in named}
        for optimizer in self._seen:
            if optimizer is sync.inner_optimizer:
                continue
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            if found := [names[key] for key in held if key in names]:
                return f"{found[0]} was trained by another optimizer than inner_optimizer"
        return ""

    def steps_set(self) -> None:
        """The number of steps is that of a checkpoint, or of others."""
        sync = self._sync()
        assert sync is not None
        staggered = sync.options.staggered and sync.options.local_steps
        self.since = sync.steps % staggered if staggered else 0

    def missed(self) -> str:
        """Names a call that was due before a meeting and missed, or is empty."""
        sync = self._sync()
        assert sync is not None
        reduced = sync.reductions - self._reductions
        if sync.rule.name == "ddp" and reduced < self.since:
            return (
                f"reduce_gradients is due before every step, was called {reduced} times in "
                f"{self.since}"
            )
        return ""

    def round_over(self) -> None:
        """The sites have met at the end of a round."""
        sync = self._sync()
        assert sync is not None
        if self.since and not self._warned:
            self._warned = _warn_of_balance(sync.moe_layers)
        self.since, self._reductions = 0, sync.reductions

    def unmet(self) -> str:
        """What of the model the sites have not agreed on, or is empty."""
        sync = self._sync()
        if sync is None or not self._end.alive or sync.placement.num_sites == 1:
            return ""
        if sync.under_way:
            return "a fragment is under way: call OuterSync.finish first"
        steps = self.since + self.waiting
        if steps and sync.rule.name != "ddp":
            return f"{steps} local steps have not met: call OuterSync.step first"
        for layout, anchor in zip(sync.layouts, sync.anchors, strict=False):
            for piece, place in layout.slices() if sync.options.apart else ():
                if not anchor[place].to(piece.tensor.dtype).equal(piece.values()):
                    return (
                        f"{piece.key} is this site's own: call OuterSync.copy_anchor_to_model first"
                    )
        return ""


def _warn_of_balance(layers: Sequence[MoELayer]) -> bool:
    """Warns where routers are to be balanced by bias and nobody does it."""
    forgotten = [
        layer
        for layer in layers
        if layer.balance == "bias"
        and bool(layer.load_since_update.any())
        and not bool(layer.router.selection_bias.any())
    ]
    if forgotten:
        warnings.warn(
            "balance = 'bias' needs MoELayer.update_selection_bias after every optimizer step; it "
            f"has not moved the bias of {len(forgotten)} layers",
            stacklevel=5,
        )
    return bool(forgotten)


def unmet(model: nn.Module) -> str:
    """What of a model the sites that train it have not agreed on, or is empty."""
    watch = _WATCHES.get(model)
    return "" if watch is None else watch.unmet()


class _Hook:
    """What is called before or after a step of any optimizer; it keeps nothing alive."""

    def __init__(self, method: weakref.WeakMethod[Any]) -> None:
        self._method = method

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        method = self._method()
        if method is not None:
            method(optimizer)


class _BeforePass:
    """A forward pre-hook of the model. A copy of the model, or a stored one, has one without
    effect."""

    def __init__(self, watch: StepWatch | None = None) -> None:
        self._watch = None if watch is None else weakref.ref(watch)

    def __call__(self, model: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        watch = None if self._watch is None else self._watch()
        if watch is not None and model.training and torch.is_grad_enabled():
            watch.catch_up()

    def __deepcopy__(self, memo: Any) -> _BeforePass:
        return _BeforePass()

    def __reduce__(self) -> Any:
        return _BeforePass, ()


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
