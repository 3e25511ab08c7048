"""Tiny random models of the families that `fomoe_ext.hf` knows, and texts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH, EXPERTS, TOP_K, LAYERS = 64, 32, 8, 3, 3
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": EXPERTS},
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": EXPERTS,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "head_dim": 8,
        # One dense block among them, as published models may have.
        "mlp_only_layers": [1],
    },
    "olmoe": {"intermediate_size": 24, "num_experts": EXPERTS, "norm_topk_prob": False},
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": EXPERTS,
        "head_dim": 8,
        "layer_types": ["full_attention"] * LAYERS,
    },
}


def make_config(family: str, **changes: Any) -> Any:
    """A configuration of transformers, of `LAYERS` small blocks."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**_COMMON, **_OWN[family], **changes})


@torch.no_grad()
def make_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A causal language model in eval mode, with weights and biases of noticeable size."""
    from transformers import AutoModelForCausalLM

    config = make_config(family, **changes)
    config._attn_implementation = "eager"
    # Tests compare with transformers' eager blocks.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        scale = 0.05 if "bias" in name else 0.2
        noise = scale * torch.randn(tensor.shape, generator=generator)
        offset = 1.0 if "norm" in name else 0.0
        tensor.copy_(noise + offset)
    return model


def text(batch: int = 2, length: int = 17, seed: int = 1) -> Tensor:
    """Token ids int64 [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The original MoE blocks by path."""
    from fomoe_ext.hf.families import family_of

    return [(path, m) for path, m in model.named_modules() if family_of(m) is not None]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """L2, in fp64."""
    exact = wanted.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm().clamp_min(1e-300))
