"""The section [inner]: the optimizer and schedule of a site's local steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe_ext.config.limits import at_least, inside


@dataclass(frozen=True)
class InnerConfig:
    """The local steps of one site."""

    inner_optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the local steps. sgd uses beta1 as its momentum."""
    batch_size: int = 2
    """Sequences per site and local step, over all ranks of the site."""
    inner_lr: float = 5e-3
    """Peak learning rate of the local steps."""
    warmup_steps: int = 32
    """Steps over which the learning rate rises linearly to inner_lr."""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """How the learning rate falls after the warm-up, until the last step."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step divided by inner_lr (for schedule = cosine or linear)."""
    beta1: float = 0.9
    """AdamW: decay rate of the first moment. sgd: momentum."""
    beta2: float = 0.95
    """AdamW: decay rate of the second moment."""
    adam_eps: float = 1e-8
    """AdamW: added to the denominator for numerical stability."""
    weight_decay: float = 0.0
    """Decoupled weight decay of weight matrices; norm gains have none."""
    grad_clip: float = 1.0
    """Clip gradients to this norm, which each site computes from its own gradients (ddp: all sites
    from the averaged ones); 0 = no clipping."""
    uneven_steps: bool = False
    """Let slower sites take fewer local steps per round, so that faster sites need not wait for
    them. Means over sites are then weighted by the tokens that each site trained on."""

    def __post_init__(self) -> None:
        at = "inner."
        at_least(at, 1, batch_size=self.batch_size)
        at_least(at, 0, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        at_least(at, 0, grad_clip=self.grad_clip)
        inside(at, 0, 1, min_lr_ratio=self.min_lr_ratio, beta1=self.beta1, beta2=self.beta2)
        if not (self.inner_lr > 0 and self.adam_eps > 0):
            raise ValueError(
                f"inner.inner_lr and inner.adam_eps must be > 0, got {self.inner_lr} "
                f"and {self.adam_eps}"
            )
