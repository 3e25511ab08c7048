"""The presets: models of several sizes, and how each is trained."""

from __future__ import annotations

from typing import NamedTuple

from fomoe_ext.config.inner import InnerConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.config.outer import OuterConfig
from fomoe_ext.config.run import RunConfig


class Preset(NamedTuple):
    """The sections that a preset sets; the others have their defaults."""

    model: ModelConfig
    inner: InnerConfig
    run: RunConfig
    outer: OuterConfig = OuterConfig()


def _paper_model(hidden: int, layers: int, heads: int, experts: int, top_k: int) -> ModelConfig:
    """A size of the FoMoE paper (arXiv 2606.19025): V = 200,019, plain SiLU experts of size 128.

    The paper has a CompleteP depth multiplier on block outputs but does not give its base depth; we
    use the depth of its trained proxy, 4 layers.
    """
    return ModelConfig(
        vocab_size=200_019,
        seq_len=2048,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_experts=experts,
        intermediate_size=128,
        top_k=top_k,
        activation="silu",
        balance_bias_rate=1e-3,
        depth_multiplier=4 / layers,
    )


# The paper's inner loop: AdamW 0.01, betas (0.9, 0.95), warm-up over 160 of 640 steps, constant.
_PAPER_INNER = InnerConfig(
    batch_size=16, inner_lr=0.01, warmup_steps=160, schedule="constant", min_lr_ratio=1.0
)
_PAPER_RUN = RunConfig(local_steps=32, rounds=20)
# What won in docs/claims.md: tokens choose among a site's own experts, deltas travel in int4, and
# the sites meet every 4 steps, for half the bytes of fp32 every 16.
_TINY_MODEL = ModelConfig(router_scope="resident")
_TINY_RUN = RunConfig(local_steps=4, rounds=192, eval_rounds=48)
_TINY_OUTER = OuterConfig(codec="int4")

PRESETS: dict[str, Preset] = {
    "tiny": Preset(_TINY_MODEL, InnerConfig(), _TINY_RUN, _TINY_OUTER),
    "54m": Preset(_paper_model(256, 4, 4, 8, 2), _PAPER_INNER, _PAPER_RUN),
    "153m": Preset(_paper_model(512, 16, 8, 16, 4), _PAPER_INNER, _PAPER_RUN),
    "1.8b": Preset(_paper_model(1024, 128, 16, 32, 8), _PAPER_INNER, _PAPER_RUN),
    "13.3b": Preset(_paper_model(2048, 256, 32, 64, 16), _PAPER_INNER, _PAPER_RUN),
    "104b": Preset(_paper_model(4096, 512, 64, 128, 32), _PAPER_INNER, _PAPER_RUN),
}


def check_preset(name: str) -> None:
    """Raises ValueError for an unknown preset."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
