"""The section [inner]: how a site trains between two meetings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe_ext.config.limits import at_least, inside


@dataclass(frozen=True)
class InnerConfig:
    """The local steps of one site."""

    inner_optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the local steps."""
    batch_size: int = 2
    """Sequences per site and step."""
    inner_lr: float = 5e-3
    """Peak learning rate of the local steps."""
    warmup_steps: int = 32
    """Steps of linear warm-up to inner_lr."""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """Course of the learning rate after the warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step as a share of inner_lr (cosine, linear)."""
    beta1: float = 0.9
    """AdamW decay of the first moment; momentum for sgd."""
    beta2: float = 0.95
    """AdamW decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices (never on norm gains)."""
    grad_clip: float = 1.0
    """Largest gradient norm of one site; 0 = no clipping."""
    uneven_steps: bool = False
    """Slower sites take fewer local steps, so that nobody waits for them, and their deltas weigh as
    many tokens as they were trained on."""

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
