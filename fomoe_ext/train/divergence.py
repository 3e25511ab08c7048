"""When training diverges: the error says where, what was measured before, and what to try.

A learning rate that is too high ends in NaN. Whoever sees them first (the router, the loss, the
gradient norm, a meeting, a validation) knows nothing of the rate; `Course` adds it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.outer.errors import MeetingError

_LOSSES = 5
"""So many of the last losses are told."""
_REACH = 1.5
"""An outer step that, with momentum, goes further than so many times the mean delta may be why
training diverges. One that goes about as far as the mean delta only averages the sites."""
_SIGNS = ("NaN", "infinite")
"""An error whose text has one of these words is about values that are not finite."""


class Diverged(RuntimeError):
    """Training has produced NaN or infinite values and cannot go on."""


class Course:
    """The last local steps of one rank: losses, gradient norm and learning rate."""

    def __init__(self, config: TrainConfig, site: int) -> None:
        """`site`: the number by which messages call this site."""
        self._config, self._site = config, site
        self._losses: deque[tuple[int, int, Tensor]] = deque(
            maxlen=max(_LOSSES, config.run.local_steps)
        )
        self._norm: Tensor | float | None = None
        self._lr: float | None = None

    def rate(self, lr: float) -> None:
        """The learning rate of the step under way."""
        self._lr = lr

    def norm(self, norm: Tensor | float, round: int, step: int) -> None:
        """The gradient norm of the step under way, before clipping.

        `round` and `step` as for `loss`. Raises Diverged for one that is not finite; on a GPU,
        which would have to be waited for, the losses tell it at the end of the round.
        """
        on_gpu = isinstance(norm, Tensor) and norm.device.type != "cpu"
        if not on_gpu and not math.isfinite(norm):
            raise Diverged(self._told("the gradient norm is NaN or infinite", round, step))
        self._norm = norm

    def loss(self, loss: Tensor, round: int, step: int) -> None:
        """The loss of a step: the round and the step in it, both from 1.

        Raises Diverged for one that is not finite; on a GPU `check` does.
        """
        if loss.device.type == "cpu" and not math.isfinite(loss):
            raise Diverged(self._told("the loss is NaN or infinite", round, step))
        self._losses.append((round, step, loss))

    def check(self) -> None:
        """Raises Diverged where a loss of the last round was not finite."""
        if not self._losses:
            return
        finite = torch.stack([loss for _, _, loss in self._losses]).isfinite().tolist()
        if not all(finite):
            round, step, _ = self._losses[finite.index(False)]
            raise Diverged(self._told("the loss is NaN or infinite", round, step))

    @contextmanager
    def explained(self, round: int, step: int | None) -> Iterator[None]:
        """Inside, errors about NaN or infinite values say what this knows.

        `step` None: in the meeting or the validation after the round. A ValueError becomes
        Diverged, a MeetingError, which all sites have, stays one.
        """
        try:
            yield
        except (ValueError, MeetingError) as error:
            text = str(error)
            if not any(sign in text for sign in _SIGNS):
                raise
            if "logits" in text:
                text = "the router's logits are NaN or infinite"
            if isinstance(error, MeetingError):  # it names the site, which may be another
                raise MeetingError(self._told(text, round, step, "")) from error
            raise Diverged(self._told(text, round, step)) from error

    # -------------------------------------------------------------------------------- in words

    def _told(self, what: str, round: int, step: int | None, site: str | None = None) -> str:
        steps = self._config.run.local_steps
        place = f"after round {round}" if step is None else f"in round {round}, step {step}"
        if step is not None:
            place += f" of {steps} (step {(round - 1) * steps + step} of the job)"
        if site is None:
            site = f"at site {self._site} "
        parts = [f"training has diverged {site}{place}: {what}"]
        if losses := self._finite_losses():
            parts.append(f"last finite losses: {', '.join(losses)}")
        parts += [self._measured(), f"try {self._advice(round, step)}"]
        return ". ".join(part[0].upper() + part[1:] if i else part for i, part in enumerate(parts))

    def _finite_losses(self) -> list[str]:
        values = [float(loss) for _, _, loss in self._losses]
        return [f"{value:.4g}" for value in values if math.isfinite(value)][-_LOSSES:]

    def _measured(self) -> str:
        inner = self._config.inner
        words = f"learning rate {inner.inner_lr if self._lr is None else self._lr:.3g}"
        words += f" (--inner-lr {inner.inner_lr:g})"
        if self._norm is not None:
            words += f", last gradient norm {float(self._norm):.3g}"
            return f"{words} before it was clipped to {inner.grad_clip:g}"
        return words if inner.grad_clip else f"{words}, gradients were not clipped"

    def _advice(self, round: int, step: int | None) -> str:
        inner, outer = self._config.inner, self._config.outer
        advice = ["a lower --inner-lr"]
        if round == 1 and inner.warmup_steps < self._config.run.local_steps:
            advice.append("a longer warm-up (--warmup-steps)")
        if not inner.grad_clip or inner.grad_clip > 1:
            advice.append("--grad-clip 1")
        reach = outer.resolved_lr / (1 - outer.resolved_momentum)
        if outer.optimizer != "ddp" and (round > 1 or step is None) and reach > _REACH:
            rates = f"--outer-lr (now {outer.resolved_lr:g})"
            if outer.resolved_momentum:
                rates += f" or --outer-momentum (now {outer.resolved_momentum:g})"
            if step == 1 or step is None:  # nothing but a meeting has changed the model since
                advice.insert(0, f"a lower {rates}: the loss was finite before the meeting")
            else:
                advice.append(f"a lower {rates}")
        return ", or ".join(advice)
