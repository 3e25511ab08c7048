"""The Mixture-of-Experts layer of one site: routes to all experts, holds the resident ones.

    y = shared_expert(x) + sum over the token's slots of w[t, k] * expert[e[t, k]](x[t])

A slot whose expert is not resident is skipped: it costs no row and adds exactly nothing, unless the
layer keeps a frozen copy of that expert (`stale_experts`). Shapes use the letters T tokens, K slots
per token, E experts, R resident experts, D hidden size, N intermediate size, G = 2 for gated
activations and else 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.checks import a_bool, at_least, finite, one_of
from fomoe_ext.layer import upcycle
from fomoe_ext.layer.balance import Balanced, measure
from fomoe_ext.layer.compute import Compute, compute_here
from fomoe_ext.layer.dispatch import make_dispatch
from fomoe_ext.layer.experts import Experts, ExpertWeights
from fomoe_ext.layer.inputs import (
    all_tensors_of,
    autocasts,
    check_kind,
    check_shape,
    tensors_of,
)
from fomoe_ext.layer.residents import Residents, resident_ids
from fomoe_ext.layer.router import Router
from fomoe_ext.layer.shared import SharedExpert
from fomoe_ext.layer.skipped import SKIPPED_MASS, rescale_skipped
from fomoe_ext.layer.stale import StaleExperts
from fomoe_ext.ops.tokens import RouterStatistics

TRAINING_OPTIONS = (
    "router_scope",
    "skipped_mass",
    "balance",
    "balance_coef",
    "z_loss_coef",
    "bias_update_rate",
)
"""Options of `MoELayer` that matter while it trains: not what it computes with all experts."""

Activation: TypeAlias = Literal["swiglu", "geglu", "silu", "relu2", "gelu", "clamped_swiglu"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Module = TypeVar("_Module", bound=nn.Module)


def _within(module: nn.Module, kind: type[_Module]) -> _Module:
    """The module itself, or the one of this class that an adapter is around."""
    if isinstance(module, kind):
        return module
    return next(inner for inner in module.modules() if isinstance(inner, kind))


class MoELayer(Balanced):
    """A Mixture-of-Experts feed-forward layer of which this site holds only the resident experts.

    After a forward pass `stats` holds its measurements (`balance.MoEStats`, device tensors) and
    `aux_loss` the sum of its balancing losses, each times its coefficient: a scalar to add to the
    training loss, 0 in eval mode or when no loss is asked for.

    Under activation checkpointing use `use_reentrant=False`; the reentrant form runs the layer
    without a graph, so that `aux_loss` would train nothing.

    With `mesh` a site's ranks share its resident experts (`fomoe_ext.layer.dispatch` says what
    gradients then are). `stats` and `aux_loss` are of this rank's tokens, `stats.rows` counts rows
    made here.

    Args:
        hidden_size: D, width of a token.
        intermediate_size: N, inner width of an expert.
        num_experts: E, experts over all sites.
        top_k: K, experts chosen per token.
        activation: a key of `ops.ACTIVATIONS`; swiglu, geglu and clamped_swiglu are gated (G = 2).
        bias: the routed experts have biases, 0 at first, in both of their layers.
        scoring: how logits become scores.
        router_scope: "global" chooses among all experts and skips those not resident, "resident"
            chooses min(K, R) among the resident ones.
        skipped_mass: "drop" loses the weights of skipped slots, "rescale" shares them out over the
            token's computed ones (`skipped.rescale_skipped`).
        resident_experts: ids this site holds; None = all, empty = none ("global" only).
        shared_expert_intermediate_size: inner width of an expert that every token uses; 0 = none.
        renormalize: divide the chosen experts' scores by their sum.
        scale: factor on the combine weights.
        num_groups, groups_kept: group-limited choice (DeepSeek-V3).
        router_bias: the router's logits have a bias, 0 at first (gpt-oss).
        balance: "switch" and "entropy" add a loss, "bias" moves the selection bias whenever
            `update_selection_bias` is called.
        balance_coef, z_loss_coef: factors of the balance loss and of the router z-loss.
        bias_update_rate: step of the selection bias.
        layer_index, seed: with e all that the initial weights of expert e depend on.
        stale_experts: ids of absent experts of which frozen copies are computed
            (`stale.StaleExperts`); for router_scope "global", without a mesh.
        mesh: its axis "expert" shares out the resident experts; None, or one rank: all here.
        rank_experts: by rank of that axis its ids (`spread.spread_experts`); None = chunks.
        device, dtype: of the parameters; float32, bfloat16 or float16.

    Raises ValueError or TypeError naming the argument.
    """

    # Long for its arguments: each is checked and handed to whom it is for.
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        scoring: Literal["sigmoid", "softmax"] = "sigmoid",
        router_scope: Literal["global", "resident"] = "global",
        skipped_mass: Literal["drop", "rescale"] = "drop",
        resident_experts: Sequence[int] | None = None,
        shared_expert_intermediate_size: int = 0,
        renormalize: bool = False,
        scale: float = 1.0,
        num_groups: int = 1,
        groups_kept: int = 1,
        router_bias: bool = False,
        balance: Literal["none", "switch", "entropy", "bias"] = "none",
        balance_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        bias_update_rate: float = 1e-3,
        layer_index: int = 0,
        seed: int = 0,
        stale_experts: Sequence[int] = (),
        mesh: DeviceMesh | None = None,
        rank_experts: Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        one_of(("global", "resident"), router_scope=router_scope)
        one_of(SKIPPED_MASS, skipped_mass=skipped_mass)
        at_least(
            0,
            shared_expert_intermediate_size=shared_expert_intermediate_size,
            layer_index=layer_index,
        )
        a_bool(router_bias=router_bias)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        super().__init__(num_experts, balance, balance_coef, z_loss_coef, bias_update_rate, device)
        common: dict[str, Any] = {"layer_index": layer_index, "seed": seed}
        common |= {"device": device, "dtype": dtype}
        choice: dict[str, Any] = {"scoring": scoring, "renormalize": renormalize, "scale": scale}
        choice |= {"num_groups": num_groups, "groups_kept": groups_kept}
        self.router = Router(hidden_size, num_experts, top_k, bias=router_bias, **choice, **common)
        site = resident_ids(resident_experts, num_experts)
        if router_scope == "resident" and not site:
            raise ValueError("resident_experts must not be empty with router_scope 'resident'")
        sizes = (num_experts, hidden_size)
        self.dispatch = make_dispatch(mesh, site, *sizes, layer_index, device, rank_experts)
        common["activation"] = activation
        own = self.dispatch.own_experts if self.dispatch else site
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts, bias=bias, resident_experts=own, **common
        )
        self.stale: StaleExperts | None = None
        if len(stale_experts):
            if router_scope != "global":
                raise ValueError(f"stale_experts needs router_scope 'global', got {router_scope!r}")
            if self.dispatch is not None:
                raise ValueError("stale_experts: not possible in a layer sharded over a mesh")
            self.stale = StaleExperts(self.experts, stale_experts)
        self.shared_expert: nn.Module | None = None
        if shared_expert_intermediate_size:
            self.shared_expert = SharedExpert(
                hidden_size, shared_expert_intermediate_size, **common
            )
        self.hidden_size, self.top_k = hidden_size, top_k
        self.router_scope, self.skipped_mass = router_scope, skipped_mass
        self.layer_index, self.seed = layer_index, seed

    @classmethod
    def from_dense(
        cls,
        mlp: nn.Module,
        num_experts: int,
        *,
        top_k: int,
        noise: float = 0.0,
        seed: int = 0,
        resident_experts: Sequence[int] | None = None,
        activation: str | None = None,
        **layer_options: Any,
    ) -> MoELayer:
        """A layer whose experts are copies of a dense MLP: sparse upcycling (arXiv 2212.05055).

        The router begins as in any layer. It renormalizes unless told otherwise, so that a token's
        combine weights add up to one: without noise, with scale 1, no shared expert and every
        chosen expert resident, the layer then computes what the MLP does. A shared expert begins
        as in any layer and adds its own output.

        Args:
            mlp: of a layout that `upcycle.read_mlp` knows; with biases the layer has them too. Not
                changed, nothing is shared with it.
            num_experts, top_k, resident_experts: as of the layer; only resident experts are
                allocated.
            noise: standard deviation of normal noise added to each weight matrix of an expert,
                relative to the matrix' root mean square, e.g. 0.01. It depends only on (seed,
                layer_index, expert): sites agree on an expert that they share. Biases get none.
            seed: of the noise and of all that begins as in any layer.
            activation: needed where the module does not show one of `ops.ACTIVATIONS`; "gelu" or
                "geglu" also take an MLP with the exact GELU, up to the difference of its tanh form.
            layer_options: further arguments of `MoELayer`; scoring is "softmax", renormalize True,
                dtype and device those of mlp unless given.

        Raises TypeError or ValueError naming the argument, also for an MLP that computes anything
        that experts cannot, e.g. dropout.
        """
        finite(0.0, noise=noise)
        dense, options = upcycle.read_for_layer(mlp, activation, layer_options)
        device = options.pop("device")
        options |= {"seed": seed, "resident_experts": resident_experts}
        # On the meta device first: initial weights of the experts would be drawn in vain.
        layer = cls(*dense.sizes, num_experts, top_k, device="meta", **options)
        layer.to_empty(device=device)
        layer.make_buffers(device)
        layer.router.reset_parameters()
        if isinstance(layer.shared_expert, SharedExpert):
            layer.shared_expert.reset_parameters()
        upcycle.fill_experts(layer.experts, dense, noise)
        return layer.train(mlp.training)

    @property
    def _own(self) -> Experts:
        """The module of the experts themselves, also where an adapter is around it."""
        return _within(self.experts, Experts)

    @property
    def _own_router(self) -> Router:
        """As `_own`."""
        return _within(self.router, Router)

    @property
    def _site(self) -> Residents:
        return self._own if self.dispatch is None else self.dispatch

    @property
    def site_experts(self) -> tuple[int, ...]:
        """Ids of the site's resident experts, ascending; `experts` holds this rank's."""
        return self._site.resident_experts

    @property
    def allowed(self) -> Tensor | None:
        """bool [E], the experts among which the router chooses; None = all."""
        return self._site.resident_mask if self.router_scope == "resident" else None

    @property
    def _choosable(self) -> Tensor | None:
        """int64, the ids of `allowed`; None = all."""
        return self._site.resident_ids if self.router_scope == "resident" else None

    def make_buffers(self, device: torch.device | str) -> None:
        """Fresh buffers on a device, for a layer of the meta device into which parameters are put;
        the selection bias is 0."""
        for module in (self, self._own_router):
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.zeros_like(buffer, device=device))
        for residents in (self._own, self._site):
            residents.tables_to(device)
        if self.stale is not None:
            self.stale.to_empty(device=device).reset_parameters()

    def _settle(self, device: torch.device) -> None:
        """What no state dict holds is on this device, made anew where it has no memory."""
        self._site.tables_to(device)
        self._counts_to(device)
        if self.stale is not None:
            self.stale.settle(device)

    def reset_parameters(self) -> None:
        """The initial state again, e.g. after building on the meta device and `to_empty`."""
        self._own_router.reset_parameters()
        self._own.reset_parameters()
        if self.stale is not None:
            self.stale.reset_parameters()
        if isinstance(self.shared_expert, SharedExpert):
            self.shared_expert.reset_parameters()
        self._site.write_resident_tables()
        self.load_since_update.zero_()

    def set_resident_experts(
        self, resident_experts: Sequence[int], weights: Mapping[int, ExpertWeights] | None = None
    ) -> tuple[int, ...]:
        """`Experts.set_resident_experts`; in scope "resident" the router chooses among these.
        A copy that averages this layer must be made anew after it: rows there are of the experts
        before. RuntimeError for a layer that is sharded over a mesh or has stale experts.
        """
        if self.dispatch is not None:
            raise RuntimeError("set_resident_experts: not possible in a layer sharded over a mesh")
        if self.stale is not None:
            raise RuntimeError("set_resident_experts: not possible in a layer with stale experts")
        return self._own.set_resident_experts(resident_experts, weights)

    def update_selection_bias(self, load: Tensor | None = None) -> None:
        """One step of bias balancing, to be called after an optimizer step; else it does nothing.

        selection_bias += bias_update_rate * sign(mean load - load), over the experts that may be
        chosen. `load` is [E], slots per expert, e.g. summed over sites; None = what this layer
        counted in training mode since the last update. Raises ValueError for another shape.
        """
        if self.balance == "bias":
            bias = self._own_router.selection_bias
            self._settle(bias.device)
            self._move_bias(bias, load, self._choosable)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] of the layer's dtype (any float dtype under autocast) -> the same shape.

        Raises ValueError for a wrong last dimension, dtype or device of x and for NaN logits,
        TypeError where x is no tensor.
        """
        check_shape(x, self.hidden_size)
        check_kind(x, self._own.expand_weight, self._tensors())
        self._settle(x.device)
        tokens = x.reshape(-1, self.hidden_size).contiguous()
        logits, weights, chosen, counted = self._route(tokens)
        inputs = tokens.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) else tokens
        of_shared = lambda: None if self.shared_expert is None else self.shared_expert(tokens)
        done = self._compute(inputs, weights, chosen, self.experts, of_shared)
        y = done.y if done.beside is None else done.y + done.beside
        self.stats = measure(counted, done.rows, done.rows_here, chosen.shape[0], chosen.numel())
        self._weigh(logits, self.stats.load, self._choosable, self._own_router.scoring)
        return y.view(x.shape)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, RouterStatistics]:
        """Logits [T, E], combine weights and chosen experts [T, K], and what the router counted."""
        top_k = self.top_k if self.allowed is None else min(self.top_k, self._site.num_resident)
        logits, weights, chosen, counted = self.router(tokens, self.allowed, top_k, measured=True)
        if self.skipped_mass == "rescale":
            index = self._site.resident_index
            if self.stale is not None:
                index = torch.maximum(index, self.stale.resident_index)
            weights = rescale_skipped(weights, chosen, index)
        return logits, weights, chosen, counted

    @property
    def _compute(self) -> Compute:
        """Who computes the slots of a pass."""
        if self.dispatch is not None:
            return self.dispatch
        return compute_here if self.stale is None else self.stale.compute_too

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a pass will read of this layer's modules, by name."""
        yield from tensors_of("router", self._own_router)
        yield from tensors_of("experts", self._own)
        if self.shared_expert is not None:
            yield from all_tensors_of("shared_expert", self.shared_expert)

    def extra_repr(self) -> str:
        text = f"router_scope={self.router_scope}, balance={self.balance}"
        if self.skipped_mass != "drop":
            text += f", skipped_mass={self.skipped_mass}"
        if self.balance in ("switch", "entropy"):
            text += f", balance_coef={self.balance_coef}"
        return text + (f", z_loss_coef={self.z_loss_coef}" if self.z_loss_coef else "")
