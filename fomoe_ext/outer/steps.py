"""StepWatch: hooks that count local steps, so that nobody has to call `after_step`.

A local step may be the steps of several optimizers, and more may belong to it (updating selection
biases). So it is counted as late as possible: when `after_step` is called, otherwise before the
next forward pass in training mode, the next step of the same optimizer, or the meeting.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from fomoe_ext.outer.driver import Driver
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.gradients import Gradients
from fomoe_ext.outer.routed import RoutedTokens, TokenCounts
from fomoe_ext.outer.state import OuterState
from fomoe_ext.outer.step_count import StepCount

_WATCHES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[StepWatch]] = weakref.WeakKeyDictionary()


class StepWatch:
    """Watches the steps of all optimizers that hold parameters of a model.

    The watch of a later OuterSync of the same model replaces this one. Hooks have only weak
    references to it, so it ends with its OuterSync.
    """

    def __init__(
        self,
        state: OuterState,
        steps: StepCount,
        counts: TokenCounts,
        gradients: Gradients,
        driver: Driver,
    ) -> None:
        """`gradients`: averages them before a step, with "ddp". `driver`: meets during a round."""
        self._state, self._site, self._steps = state, state.layout.site, steps
        self._counts, self._gradients, self._driver = counts, gradients, driver
        self._stepped: set[int] = set()
        """Optimizers of a step that is not counted yet."""
        self._unasked = False
        """Whether the last step was counted without `after_step`."""
        site = self._site
        self._routed = RoutedTokens(site.moe_layers if site.options.counts_tokens else [])
        before, after = weakref.WeakMethod(self._before), weakref.WeakMethod(self._after)
        handles = [
            *self._routed.handles,
            register_optimizer_step_pre_hook(_Hook(before)),
            register_optimizer_step_post_hook(_Hook(after)),
        ]
        if site.options.staggered:
            handles.append(site.model.register_forward_pre_hook(_BeforePass(self)))
        self._end = weakref.finalize(self, _remove, handles)
        self._end.atexit = False
        earlier = _watch_of(site.model)
        if earlier is not None:
            earlier.close()
        _WATCHES[site.model] = weakref.ref(self)

    def close(self) -> None:
        """Removes all hooks."""
        self._end()

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has parameters of the model."""
        if not self._end.alive:
            return False
        own = {id(parameter) for parameter in self._site.model.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _before(self, optimizer: Optimizer) -> None:
        if not self.holds(optimizer):
            return
        if id(optimizer) in self._stepped:
            self.catch_up()
        if self._site.rule.name == "ddp" and not self._gradients.used_by(optimizer):
            self._gradients.reduce()
            self._gradients.used_by(optimizer)

    def _after(self, optimizer: Optimizer) -> None:
        if self.holds(optimizer):
            self._steps.optimizers.add(optimizer)
            self._stepped.add(id(optimizer))
            self._unasked = False
            self._count()

    @property
    def waiting(self) -> bool:
        """Whether a step is not counted yet."""
        return bool(self._stepped)

    @property
    def under_way(self) -> bool:
        """Whether a fragment is under way, or due."""
        return self._driver.under_way or (self._site.options.staggered and self.waiting)

    def catch_up(self) -> None:
        """Counts a step for which `after_step` was not called."""
        if self._stepped:
            self._stepped.clear()
            self._unasked = True
            self._note()

    def take_in(self) -> None:
        """Takes in all fragments that are under way, or due; a collective."""
        self.catch_up()
        self._driver.finish()

    def asked(self) -> None:
        """`OuterSync.after_step`: counts a step, unless it is counted already."""
        late = self._unasked and not self._stepped
        self._stepped.clear()
        self._unasked = False
        if not late:
            self._count()
            self._note()

    def _count(self) -> None:
        routed = self._routed.take()
        if routed is not None:
            self._counts.add(routed)

    @torch.no_grad()
    def _note(self) -> None:
        steps, options = self._steps, self._site.options
        if options.staggered and steps.since == options.local_steps:
            raise MeetingError(
                f"step was not called after local_steps = {steps.since} steps of a round"
            )
        steps.take()
        if options.staggered:
            self._driver.after_step()

    def unmet(self) -> str:
        """Says which part of the model the sites have not agreed on, or is empty."""
        site, layout = self._site, self._state.layout
        if not self._end.alive or site.num_sites == 1:
            return ""
        if self.under_way:
            return "a fragment is under way: call OuterSync.finish first"
        steps = self._steps.since + self.waiting
        if steps and site.rule.name != "ddp":
            return f"{steps} local steps have not met: call OuterSync.step first"
        for flat, anchor in zip(layout.layouts, self._state.anchors, strict=False):
            for piece, place in flat.slices() if site.options.apart else ():
                if not anchor[place].to(piece.tensor.dtype).equal(piece.values()):
                    return (
                        f"{piece.key} is this site's own: call OuterSync.copy_anchor_to_model first"
                    )
        return ""


def _watch_of(model: nn.Module) -> StepWatch | None:
    """The watch of a model's last OuterSync, if that still exists."""
    found = _WATCHES.get(model)
    return None if found is None else found()


def unmet(model: nn.Module) -> str:
    """Says which part of a model its sites have not agreed on, or is empty."""
    watch = _watch_of(model)
    return "" if watch is None else watch.unmet()


class _Hook:
    """A hook before or after the steps of all optimizers, with a weak reference to its method."""

    def __init__(self, method: weakref.WeakMethod[Any]) -> None:
        self._method = method

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        method = self._method()
        if method is not None:
            method(optimizer)


class _BeforePass:
    """A forward pre-hook of the model. In a copy of the model, or a stored one, it does nothing."""

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
