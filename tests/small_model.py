"""A small language model's configuration, and tokens for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fomoe_ext.config.model import ModelConfig

# Uneven sizes, so that a mixed-up dimension shows.
SMALL = ModelConfig(
    vocab_size=50,
    seq_len=19,
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    num_experts=8,
    intermediate_size=20,
    top_k=3,
)


def small(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


def tokens(*shape: int, seed: int = 0, vocab_size: int = 50) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
