"""The reference language model: a Peri-LN decoder with RoPE attention and an MoE in every block.

As in the FoMoE paper (arXiv 2606.19025) every branch is `x + m * norm(F(norm(x)))`, where F is
causal attention first and an MoE layer second. The embedding is normalised, and its weight is also
the unembedding. Norms have no bias, so an MoE layer adds exactly 0 to a token whose slots are all
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.config.model import ModelConfig
from fomoe_ext.layer.mesh import is_sharded
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.seeding import fill_normal_
from fomoe_ext.placement.placement import Placement

_NORM_EPS = 1e-5


class Loss(NamedTuple):
    """Cross entropy in nats per token, and the sum of the layers' `aux_loss`; both scalars."""

    cross_entropy: Tensor
    aux_loss: Tensor

    @property
    def total(self) -> Tensor:
        """The loss that training minimises."""
        return self.cross_entropy + self.aux_loss


def _matrix(
    seed: int,
    name: str,
    rows: int,
    columns: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """A weight [rows, columns] of standard deviation 1/sqrt(columns) that depends only on (seed,
    name)."""
    empty = torch.empty(rows, columns, device=device, dtype=dtype)
    return nn.Parameter(fill_normal_(empty, columns**-0.5, seed, name))


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension with a gain [D] and no bias, shape kept."""

    def __init__(
        self, size: int, kind: str, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.shape
        if self.kind == "rms":
            return F.rms_norm(x, size, self.weight, _NORM_EPS)
        return F.layer_norm(x, size, self.weight, None, _NORM_EPS)


def rope_table(seq_len: int, head_size: int, base: float) -> Tensor:
    """Cosines and sines of the rotary angles, fp32 [2, seq_len, head_size / 2] (Su et al. 2021)."""
    kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    frequencies = base ** (-torch.arange(0, head_size, 2, **kind) / head_size)
    angles = torch.outer(torch.arange(seq_len, **kind), frequencies)
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + S / 2]) of x [B, H, L, S] (S = head size) by the angles."""
    cos, sin = table[:, : x.shape[-2]].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions, [B, L, D] -> [B, L, D], no biases."""

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        seed: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv_weight = _matrix(seed, f"{name}.qkv_weight", 3 * width, width, device, dtype)
        self.out_weight = _matrix(seed, f"{name}.out_weight", width, width, device, dtype)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = F.linear(x, self.qkv_weight)
        qkv = qkv.view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(batch, length, width), self.out_weight)


_OF_THE_MODEL = frozenset(
    ("vocab_size", "seq_len", "num_layers", "num_heads", "norm", "rope_base", "depth_multiplier")
)
"""Options that are not those of its MoE layers."""


def layer_options(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `MoELayer` that a configuration has, by name: all but `_OF_THE_MODEL`.

    An option that only one of the two has so fails as an unknown argument.
    """
    named = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in named.items() if name not in _OF_THE_MODEL}


class Block(nn.Module):
    """Attention, then an MoE, each between two norms and added to the stream [B, L, D]."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        residents: tuple[int, ...] | None,
        seed: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **sharding: Any,
    ) -> None:
        super().__init__()

        def norm() -> Norm:
            return Norm(config.hidden_size, config.norm, device, dtype)

        self.multiplier = config.depth_multiplier
        self.attention_in, self.attention_out = norm(), norm()
        self.moe_in, self.moe_out = norm(), norm()
        self.attention = Attention(config, f"blocks.{layer}.attention", seed, device, dtype)
        self.moe = MoELayer(
            **layer_options(config),
            resident_experts=residents,
            layer_index=layer,
            seed=seed,
            device=device,
            dtype=dtype,
            **sharding,
        )

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        branch = self.attention_out(self.attention(self.attention_in(x), rope))
        x = torch.add(x, branch, alpha=self.multiplier)
        return torch.add(x, self.moe_out(self.moe(self.moe_in(x))), alpha=self.multiplier)


class LanguageModel(nn.Module):
    """A decoder-only language model that holds all dense parameters and one site's experts.

    Initial weights depend only on the seed and on the parameter's name, never on the site.

    Args:
        config: sizes and options.
        placement, site: the model holds the experts of `site` in `placement`, or all experts if
            neither is given.
        seed: of the initial weights.
        mesh: for a site of several ranks, as in `MoELayer`.
        rank_experts, stale_experts: as in `MoELayer`, one entry per layer.
        device, dtype: of the parameters; device may be "meta".

    Raises ValueError if only one of placement and site is given, if the placement is for another
    model or if it has no such site.
    """

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement | None = None,
        site: int | None = None,
        seed: int = 0,
        *,
        mesh: DeviceMesh | None = None,
        rank_experts: Sequence[Sequence[Sequence[int]]] | None = None,
        stale_experts: Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config must be a ModelConfig, got {type(config).__name__}")
        if placement is not None:
            site = _check_placement(config, placement, site)
        elif site is not None:
            raise ValueError(f"site must be given with a placement, got site = {site} without one")
        self.config = config
        self.embedding = _matrix(
            seed, "embedding", config.vocab_size, config.hidden_size, device, dtype
        )
        self.embedding_norm = Norm(config.hidden_size, config.norm, device, dtype)
        self.blocks = nn.ModuleList(
            Block(
                config,
                layer,
                None if placement is None or site is None else placement.resident(layer, site),
                seed,
                device,
                dtype,
                mesh=mesh,
                rank_experts=None if rank_experts is None else rank_experts[layer],
                stale_experts=() if stale_experts is None else stale_experts[layer],
            )
            for layer in range(config.num_layers)
        )
        self.final_norm = Norm(config.hidden_size, config.norm, device, dtype)
        self._rope = self._make_rope(torch.get_default_device() if device is None else device)

    def _make_rope(self, device: torch.device | str) -> Tensor:
        config = self.config
        with torch.inference_mode(False):  # it is used after the current pass, too
            return rope_table(config.seq_len, config.head_size, config.rope_base).to(device)

    @property
    def rope(self) -> Tensor:
        """The `rope_table`. It is computed from the configuration and not a buffer, so that tools
        that change buffers (casts, averages, the meta device) cannot change it."""
        return self._rope

    def _rope_to(self, device: torch.device) -> Tensor:
        if self._rope.device != device:
            self._rope = self._make_rope(device)
        return self._rope

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        super()._apply(fn, recurse)
        self._rope_to(fn(torch.empty(0, device=self._rope.device)).device)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token: int64 [B, L] -> [B, L, vocab_size], L <= config.seq_len.

        Raises TypeError or ValueError for a wrong dtype, shape or length, IndexError for an id
        outside the vocabulary (on the CPU).
        """
        _check_tokens(tokens, self.config.seq_len)
        x = self.embedding_norm(F.embedding(tokens, self.embedding))
        rope = self._rope_to(tokens.device)
        for block in self.blocks:
            x = block(x, rope)
        return F.linear(self.final_norm(x), self.embedding)

    def loss(self, tokens: Tensor) -> Loss:
        """Loss of predicting tokens[:, 1:] from tokens[:, :-1], for int64 [B, L + 1]."""
        _check_tokens(tokens, self.config.seq_len + 1)
        if tokens.shape[1] < 2:
            raise ValueError(f"tokens must be [B, L + 1] with L >= 1, got {tuple(tokens.shape)}")
        logits = self(tokens[:, :-1])
        entropy = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        aux = sum((layer.aux_loss for layer in self.moe_layers()), entropy.new_zeros(()))
        return Loss(entropy, aux)

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, first block first."""
        return [block.moe for block in self.blocks]


def _check_placement(config: ModelConfig, placement: Placement, site: int | None) -> int:
    wanted = (config.num_layers, config.num_experts)
    given = (placement.num_layers, placement.num_experts)
    if wanted != given:
        raise ValueError(
            f"placement must be for the model's {wanted[0]} layers of {wanted[1]} experts, got one "
            f"for {given[0]} layers of {given[1]}"
        )
    if site is None or not 0 <= site < placement.num_sites:
        raise ValueError(f"site must be in [0, {placement.num_sites}), got {site}")
    return site


def _check_tokens(tokens: Tensor, longest: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int64 tensor, got {found}")
    if tokens.dim() != 2 or tokens.shape[0] < 1 or not 1 <= tokens.shape[1] <= longest:
        raise ValueError(
            f"tokens must be [B, L] with B >= 1 and 1 <= L <= {longest}, got {tuple(tokens.shape)}"
        )


def parameter_kinds(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The model's named parameters under "dense", "router" and "sparse" (routed experts).

    Works for any module with `MoELayer`s in it.
    """
    kinds: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, MoELayer):
            kinds.update({id(p): "router" for p in module.router.parameters()})
            kinds.update({id(p): "sparse" for p in module.experts.parameters()})
    result: dict[str, list[tuple[str, nn.Parameter]]] = {"dense": [], "router": [], "sparse": []}
    for name, parameter in model.named_parameters():
        result[kinds.get(id(parameter), "dense")].append((name, parameter))
    return result


def optimizer_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict]:
    """Parameter groups for torch.optim: matrices with `weight_decay`, vectors without.

    DTensors have groups of their own, because optimizers cannot mix them with other tensors.

    Raises ValueError for a negative `weight_decay`.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    experts = [module.experts for module in model.modules() if isinstance(module, MoELayer)]
    biases = {id(bias) for e in experts for bias in (e.expand_bias, e.contract_bias)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in biases]
    plain = [p for p in trained if p.dim() <= 1 or id(p) in biases]
    result = []
    for params, decay in ((decayed, weight_decay), (plain, 0.0)):
        for kind in (False, True):
            some = [p for p in params if is_sharded(p) == kind]
            if some:
                result.append({"params": some, "weight_decay": decay})
    return result
