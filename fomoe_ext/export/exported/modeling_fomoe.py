"""An exported FoMoE language model in plain torch, for transformers >= 5.6.

A Peri-LN decoder: every branch is `x + m * norm(F(norm(x)))`, the embedding is normed once more and
its weight is also the unembedding; F is causal attention with rotary positions, then a Mixture of
Experts. Shapes use the letters B sequences, L tokens, T = B * L, D hidden size, H heads, S head
size, E experts, K experts per token, N intermediate size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_fomoe import FomoeConfig

_NORM_EPS = 1e-5
_GATED = ("swiglu", "geglu", "clamped_swiglu")

# Versions of transformers differ in the name of the cache in outputs.
_OUTPUT_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _OUTPUT_FIELDS else "past_key_values"


class FomoeNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension with a gain [D] and no bias."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, self.weight.shape, self.weight, _NORM_EPS)
        return F.layer_norm(x, self.weight.shape, self.weight, None, _NORM_EPS)


def rotary_angles(positions: Tensor, config: FomoeConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [B, 1, L, S / 2], of int positions [B, L].

    They are computed in every pass: a buffer would be lost if the model is built on the meta
    device. The arithmetic is fp64, as in training, if the device supports it.
    """
    size = config.hidden_size // config.num_attention_heads
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    steps = torch.arange(0, size, 2, dtype=wide, device=positions.device) / size
    angles = positions[:, None, :, None].to(wide) * config.rope_base**-steps
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + S / 2]) of x [B, H, L, S]."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def visible_keys(mask: Tensor | None, past: int, queries: int, keys: int) -> Tensor | None:
    """Bool [B or 1, 1, queries, keys]: the keys that a query attends to; None = causal, or all.

    mask: None, or the padding mask [B, tokens], True = a token. Query i is at position past + i. A
    query always attends to itself, so that rows of padding have no NaN.
    """
    if mask is None and keys == past + queries and (past == 0 or queries == 1):
        return None
    device = None if mask is None else mask.device
    at = torch.arange(past, past + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    seen = (key <= at)[None, None]
    if mask is not None:
        tokens = F.pad(mask, (0, max(0, keys - mask.shape[1])))[:, :keys]
        seen = seen & (tokens[:, None, None] | (key == at))
    return seen


class FomoeAttention(nn.Module):
    """Causal multi-head attention with rotary positions, [B, L, D] -> [B, L, D]."""

    def __init__(self, config: FomoeConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.layer = config.num_attention_heads, layer
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: int,
        cache: Any,
    ) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            # Positions of the keys, which static caches of older versions need.
            places = {"cache_position": torch.arange(past, past + length, device=x.device)}
            k, v = cache.update(k, v, self.layer, places)
        if mask is None or mask.dim() == 2:
            mask = visible_keys(mask, past, length, k.shape[-2])
            mask = mask if mask is None else mask.to(x.device)
        causal = mask is None and length > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def activate(x: Tensor, activation: str) -> Tensor:
    """[*, G * N] -> [*, N]; G = 2 for gated activations, whose gate comes first."""
    up = None
    if activation in _GATED:
        x, up = x.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate = x.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    if activation in ("swiglu", "silu"):
        x = F.silu(x)
    elif activation in ("geglu", "gelu"):
        x = F.gelu(x, approximate="tanh")
    elif activation == "relu2":
        x = F.relu(x).square()
    else:
        raise ValueError(f"activation must be one of those in FomoeConfig, got {activation!r}")
    return x if up is None else x * up


class FomoeExpert(nn.Module):
    """One expert, routed or shared: [T, D] -> [T, D]."""

    def __init__(self, config: FomoeConfig, size: int, bias: bool) -> None:
        super().__init__()
        self.activation = config.activation
        wide = 2 * size if config.activation in _GATED else size
        self.expand = nn.Linear(config.hidden_size, wide, bias=bias)
        self.contract = nn.Linear(size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(activate(self.expand(x), self.activation))


class FomoeRouter(nn.Module):
    """Chooses K of E experts per token; all arithmetic is fp32.

    weight: [E, D]. selection_bias: fp32 [E], added to the scores for the choice only.
    """

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("selection_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> weights fp32 [T, K] and experts int64 [T, K], best first."""
        config = self.config
        with torch.autocast(device_type=x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if config.router_scoring == "sigmoid" else logits.softmax(dim=-1)
        choice = scores.detach() + self.selection_bias.float()
        if config.router_num_groups > 1:
            choice = self._within_best_groups(choice)
        # A stable sort: among equal scores the lower index is first, as in training.
        experts = choice.sort(dim=-1, descending=True, stable=True).indices
        experts = experts[:, : config.num_experts_per_tok]
        weights = scores.gather(1, experts)
        if config.router_renormalize:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, torch.ones_like(total))
        return weights * config.router_scale, experts

    def _within_best_groups(self, choice: Tensor) -> Tensor:
        """Sets scores to -inf except in the groups with the largest sums of their two best."""
        groups = choice.view(choice.shape[0], self.config.router_num_groups, -1)
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
        order = best.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(1, order[:, : self.config.router_groups_kept], True)
        return groups.masked_fill(~kept[..., None], -torch.inf).view_as(choice)


class FomoeMoE(nn.Module):
    """Shared expert plus the weighted sum of each token's K experts, [B, L, D] -> [B, L, D]."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.router = FomoeRouter(config)
        self.experts = nn.ModuleList(
            FomoeExpert(config, config.moe_intermediate_size, config.expert_bias)
            for _ in range(config.num_experts)
        )
        self.shared_expert: FomoeExpert | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = FomoeExpert(
                config, config.shared_expert_intermediate_size, bias=False
            )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self.router(tokens)
        y = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in experts.unique().tolist():  # only experts with tokens
            token, slot = (experts == expert).nonzero(as_tuple=True)
            rows = self.experts[expert](tokens[token])
            y = y.index_add(0, token, rows.float() * weights[token, slot, None])
        y = y.to(x.dtype)
        if self.shared_expert is not None:
            y = y + self.shared_expert(tokens)
        return y.view(x.shape)


class FomoeBlock(GradientCheckpointingLayer):
    """Attention, then experts, each between two norms and added to the stream [B, L, D]."""

    def __init__(self, config: FomoeConfig, layer: int) -> None:
        super().__init__()
        self.multiplier = config.depth_multiplier
        for name in ("attention_in", "attention_out", "moe_in", "moe_out"):
            self.add_module(name, FomoeNorm(config.hidden_size, config.norm))
        self.attention = FomoeAttention(config, layer)
        self.moe = FomoeMoE(config)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: int,
        cache: Any = None,
    ) -> Tensor:
        branch = self.attention(self.attention_in(x), angles, mask, past, cache)
        x = torch.add(x, self.attention_out(branch), alpha=self.multiplier)
        return torch.add(x, self.moe_out(self.moe(self.moe_in(x))), alpha=self.multiplier)


def chosen_outputs(
    config: FomoeConfig, hidden_states: bool | None, return_dict: bool | None, other: dict[str, Any]
) -> tuple[bool, bool]:
    """Whether to return hidden states, and a named output; by default as in the configuration.

    Raises ValueError if attention weights are requested: this attention does not compute them.
    """
    if other.get("output_attentions", getattr(config, "output_attentions", False)):
        raise ValueError(
            "output_attentions must be False, got True: this attention computes no weights"
        )
    if hidden_states is None:
        hidden_states = bool(getattr(config, "output_hidden_states", False))
    if return_dict is None:
        return_dict = bool(getattr(config, "return_dict", True))
    return hidden_states, return_dict


class FomoePreTrainedModel(PreTrainedModel):
    """Common parts of both models."""

    config_class = FomoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["FomoeBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    # Updates of the bias are too small for bf16.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["selection_bias"]
    _supports_sdpa = True
    _can_compile_fullgraph = False  # which experts get tokens depends on the data

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FomoeNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, FomoeRouter):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.selection_bias)


class FomoeModel(FomoePreTrainedModel):
    """The decoder without the unembedding."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = FomoeNorm(config.hidden_size, config.norm)
        self.blocks = nn.ModuleList(
            FomoeBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.final_norm = FomoeNorm(config.hidden_size, config.norm)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """int64 [B, L], or embeddings [B, L, D], -> hidden states [B, L, D] after the last norm.

        attention_mask: [B, tokens so far], 0 = padding, or a complete mask [B, 1, L, keys].
        cache, past_key_values: two names of the same argument.
        """
        output_hidden_states, return_dict = chosen_outputs(
            self.config, output_hidden_states, return_dict, kwargs
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("one of input_ids and inputs_embeds must be given")
        cache = past_key_values if cache is None else cache
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointing or not (self.config.use_cache if use_cache is None else use_cache):
            cache = None
        elif cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else int(cache.get_seq_length())

        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()
            attention_mask = None if bool(attention_mask.all()) else attention_mask
        angles = rotary_angles(position_ids, self.config)

        x = self.embedding_norm(x)
        states = (x,)
        for block in self.blocks:
            x = block(x, angles, attention_mask, past, cache=cache)
            states = (*states, x) if output_hidden_states else states
        output = BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(x),
            hidden_states=states if output_hidden_states else None,
            **{_CACHE: cache},
        )
        return output if return_dict else output.to_tuple()


class FomoeForCausalLM(FomoePreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__(config)
        self.model = FomoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """As `FomoeModel.forward`, -> logits of the next token [B, L, vocab_size].

        labels: int64 [B, L], -100 = ignored; the loss is the cross entropy of labels[:, 1:] in
        nats, without losses that balance experts. logits_to_keep: number of last tokens to compute
        logits of, 0 = all; or their indices.
        """
        output_hidden_states, return_dict = chosen_outputs(
            self.config, output_hidden_states, return_dict, kwargs
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache=cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{_CACHE: outputs.get(_CACHE)},
        )
        return output if return_dict else output.to_tuple()
