"""Configuration of an exported FoMoE language model, for transformers >= 5.6."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class FomoeConfig(PretrainedConfig):
    """A decoder with rotary attention and a Mixture of Experts in every block.

    Sizes have the usual names of transformers. Other options:

    activation: of all experts: swiglu, geglu, silu, relu2, gelu or clamped_swiglu.
    expert_bias: whether routed experts have biases.
    router_scoring: sigmoid or softmax, how router logits become scores.
    router_renormalize: divide the chosen experts' scores by their sum.
    router_scale: factor on the chosen experts' scores.
    router_num_groups, router_groups_kept: equal ranges of experts, and how many of them a token may
        choose from.
    shared_expert_intermediate_size: inner width of the expert that every token uses; 0 = none.
    norm: layer (LayerNorm without bias) or rms.
    rope_base: base of the rotary angles.
    depth_multiplier: factor on what a block adds to the residual stream.
    tokens: "bytes" (the ids are UTF-8 bytes) or "tokenizer.json".
    """

    model_type = "fomoe"
    # Trainer appends to this, so it must be a list.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 256,
        num_experts: int = 16,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int = 128,
        activation: str = "swiglu",
        expert_bias: bool = False,
        router_scoring: str = "sigmoid",
        router_renormalize: bool = False,
        router_scale: float = 1.0,
        router_num_groups: int = 1,
        router_groups_kept: int = 1,
        shared_expert_intermediate_size: int = 0,
        norm: str = "layer",
        rope_base: float = 10000.0,
        depth_multiplier: float = 1.0,
        tokens: str = "bytes",
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.activation = activation
        self.expert_bias = expert_bias
        self.router_scoring = router_scoring
        self.router_renormalize = router_renormalize
        self.router_scale = router_scale
        self.router_num_groups = router_num_groups
        self.router_groups_kept = router_groups_kept
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.norm = norm
        self.rope_base = rope_base
        self.depth_multiplier = depth_multiplier
        self.tokens = tokens
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        for derived in ("num_key_value_heads", "head_dim"):  # also in a saved file
            kwargs.pop(derived, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
