"""The Mixture-of-Experts layer of one site: routes to all experts, holds the resident ones.

    y = shared_expert(x) + sum over the token's slots of w[t, k] * expert[e[t, k]](x[t])

A slot whose expert is not resident is skipped: it costs no row and adds exactly nothing, unless the
layer keeps a frozen copy of that expert (`stale_experts`).

Letters of shapes in this folder; `x_TD` has the shape [T, D]:

    T  tokens of this rank           D  hidden size
    K  slots per token (top_k)       N  intermediate size
    E  experts of all sites          G  2 for gated activations, else 1
    R  experts held here             M  rows that a rank computes for all ranks of its site
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.activations import Activation
from fomoe_ext.checks import a_bool, at_least, finite, one_of
from fomoe_ext.layer import upcycle
from fomoe_ext.layer.arguments import changed_arguments, ids_unless_all, placed
from fomoe_ext.layer.balance import Balanced, MoEStats
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
from fomoe_ext.layer.router import CHOICE_OPTIONS, Router, check_choice
from fomoe_ext.layer.shared import SharedExpert
from fomoe_ext.layer.skipped import SKIPPED_MASS, rescale_skipped
from fomoe_ext.layer.stale import make_stale
from fomoe_ext.ops.tokens import RouterStatistics
from fomoe_ext.placement.spread import spread_experts

TRAINING_OPTIONS = (
    "skipped_mass",
    "router_scope",
    "router_z_loss_coef",
    "balance",
    "balance_coef",
    "balance_bias_rate",
)
"""Options of `MoELayer` that matter only in training: with all experts resident the layer computes
the same whatever they are."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Module = TypeVar("_Module", bound=nn.Module)


def _checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = dtype or torch.get_default_dtype()
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return dtype


def _check_scope(router_scope: str, site_experts: tuple[int, ...]) -> None:
    one_of(("global", "resident"), router_scope=router_scope)
    if router_scope == "resident" and not site_experts:
        raise ValueError("resident_experts must not be empty with router_scope 'resident', got []")


def _nothing() -> None:
    """Computes nothing beside the routed experts."""


def _within(module: nn.Module, kind: type[_Module]) -> _Module:
    """The module itself, or the one of this class inside the adapter that it is."""
    if isinstance(module, kind):
        return module
    return next(inner for inner in module.modules() if isinstance(inner, kind))


class MoELayer(Balanced):
    """A Mixture-of-Experts feed-forward layer of which this site holds only the resident experts.

    A forward pass leaves two results in attributes, for this rank's tokens:

    stats: `balance.MoEStats` of the last pass, tensors on its device; None before the first.
    aux_loss: scalar, the sum of the balancing losses of the last pass, each times its coefficient.
        Add it to the training loss. It is 0 in eval mode, before the first pass and where the layer
        is asked for no loss; always on the layer's device.

    Under activation checkpointing use `use_reentrant=False`: the reentrant form runs the layer
    without a graph, so that `aux_loss` would train nothing.

    With `mesh` the ranks of a site share its resident experts; `fomoe_ext.layer.dispatch` says what
    gradients then are.

    Args:
        hidden_size: D, width of a token.
        intermediate_size: N, inner width of an expert.
        num_experts: E, experts over all sites.
        top_k: K, experts chosen per token.
        activation: a name of `fomoe_ext.activations`.
        expert_bias: both layers of every routed expert have biases, 0 at first.
        resident_experts: ids that this site holds; None = all. Empty needs router_scope "global".
        shared_expert_intermediate_size: inner width of an expert that every token uses; 0 = none.
        skipped_mass: what happens to the combine weight of skipped slots. "drop": it is lost;
            "rescale": the token's computed slots share it (`skipped.rescale_skipped`).
        router_scope: "global" chooses among all experts and skips those that are not resident;
            "resident" chooses min(K, R) of the resident ones.
        router_scoring: how logits become scores.
        router_renormalize: divide the chosen experts' scores by their sum.
        router_scale: factor on the combine weights.
        router_num_groups, router_groups_kept: choose among the experts of the best groups only
            (group-limited routing, DeepSeek-V3).
        router_bias: the router's logits have a bias, 0 at first (gpt-oss).
        router_z_loss_coef: coefficient of the router z-loss.
        balance: how the load of experts is evened. "switch" and "entropy" add a loss; "bias" moves
            the selection bias whenever `update_selection_bias` is called.
        balance_coef: coefficient of the balance loss.
        balance_bias_rate: step of the selection bias.
        layer_index, seed: an expert's initial weights depend only on these and its id.
        stale_experts: ids of absent experts to compute from frozen copies (`stale.StaleExperts`);
            for router_scope "global" without a mesh.
        mesh: its axis "expert" shares out the resident experts; None, or one rank: all are here.
        rank_experts: ids by rank of that axis (`spread.spread_experts`); None = equal chunks.
        device, dtype: of the parameters; float32, bfloat16 or float16.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: Activation = "swiglu",
        expert_bias: bool = False,
        resident_experts: Sequence[int] | None = None,
        shared_expert_intermediate_size: int = 0,
        skipped_mass: Literal["drop", "rescale"] = "drop",
        router_scope: Literal["global", "resident"] = "global",
        router_scoring: Literal["sigmoid", "softmax"] = "sigmoid",
        router_renormalize: bool = False,
        router_scale: float = 1.0,
        router_num_groups: int = 1,
        router_groups_kept: int = 1,
        router_bias: bool = False,
        router_z_loss_coef: float = 0.0,
        balance: Literal["none", "switch", "entropy", "bias"] = "none",
        balance_coef: float = 0.01,
        balance_bias_rate: float = 1e-3,
        layer_index: int = 0,
        seed: int = 0,
        stale_experts: Sequence[int] = (),
        mesh: DeviceMesh | None = None,
        rank_experts: Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        one_of(SKIPPED_MASS, skipped_mass=skipped_mass)
        a_bool(expert_bias=expert_bias, router_bias=router_bias)
        at_least(0, shared_expert_intermediate_size=shared_expert_intermediate_size)
        balancing = (balance, balance_coef, balance_bias_rate, router_z_loss_coef)
        super().__init__(num_experts, *balancing, device)
        self.hidden_size, self.top_k = hidden_size, top_k
        self.router_scope, self.skipped_mass = router_scope, skipped_mass
        self.layer_index, self.seed = layer_index, seed
        common: dict[str, Any] = {"layer_index": layer_index, "seed": seed, "device": device}
        common["dtype"] = _checked_dtype(dtype)
        choice: dict[str, Any] = {"scoring": router_scoring, "renormalize": router_renormalize}
        choice |= {"scale": router_scale, "num_groups": router_num_groups}
        choice["groups_kept"] = router_groups_kept
        check_choice(num_experts, top_k, **choice, prefix="router_")
        self.router = Router(hidden_size, num_experts, top_k, bias=router_bias, **choice, **common)
        site = resident_ids(resident_experts, num_experts)
        _check_scope(router_scope, site)
        shared_out = (site, num_experts, hidden_size, layer_index, device, rank_experts)
        self.dispatch = make_dispatch(mesh, *shared_out)
        own = site if self.dispatch is None else self.dispatch.own_experts
        common["activation"] = activation
        sizes = (hidden_size, intermediate_size, num_experts)
        self.experts = Experts(*sizes, bias=expert_bias, resident_experts=own, **common)
        self.stale = make_stale(stale_experts, self.experts, router_scope, self.dispatch)
        self.shared_expert: nn.Module | None = None
        if size := shared_expert_intermediate_size:
            self.shared_expert = SharedExpert(hidden_size, size, **common)

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

        The router and a shared expert have the initial weights of any layer. The router
        renormalizes unless told otherwise, so that a token's combine weights add up to one. Without
        noise, with router_scale 1, without a shared expert and with all chosen experts resident the
        layer then computes the same as the MLP.

        Args:
            mlp: in a layout that `upcycle.read_mlp` knows; the layer has biases if it has. It is
                copied and not changed.
            num_experts, top_k, resident_experts: as in `MoELayer`.
            noise: standard deviation of normal noise on the weight matrices of an expert, relative
                to the root mean square of the matrix, e.g. 0.01; biases get none. It depends only
                on (seed, layer_index, expert), so that sites agree on an expert that they share.
            seed: of the noise, and as in `MoELayer`.
            activation: a name of `fomoe_ext.activations`, needed where the module does not show it.
                "gelu" and "geglu" (tanh form) are also accepted for an MLP with the exact GELU.
            layer_options: other arguments of `MoELayer`. Unless given, router_scoring is "softmax",
                router_renormalize True, and dtype and device are those of mlp.

        Raises TypeError or ValueError naming the argument, also for an MLP that computes something
        that experts cannot, e.g. dropout.
        """
        finite(0.0, noise=noise)
        dense, options = upcycle.read_for_layer(mlp, activation, layer_options)
        device = options.pop("device")
        options |= {"seed": seed, "resident_experts": resident_experts}
        # Built on the meta device, so that no initial weights are drawn for the experts.
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
        """The `Experts` themselves, also if an adapter wraps them."""
        return _within(self.experts, Experts)

    @property
    def _own_router(self) -> Router:
        """The `Router` itself, also if an adapter wraps it."""
        return _within(self.router, Router)

    @property
    def _site(self) -> Residents:
        """Which experts are resident at the site, on whatever rank."""
        return self._own if self.dispatch is None else self.dispatch

    @property
    def site_experts(self) -> tuple[int, ...]:
        """Ids of the site's resident experts, ascending; `experts` holds those of this rank."""
        return self._site.resident_experts

    @property
    def allowed(self) -> Tensor | None:
        """bool [E], the experts that the router may choose; None = all."""
        return self._site.resident_mask if self.router_scope == "resident" else None

    @property
    def _choosable(self) -> Tensor | None:
        """int64, the ids of the experts that the router may choose; None = all."""
        return self._site.resident_ids if self.router_scope == "resident" else None

    def make_buffers(self, device: torch.device | str) -> None:
        """Makes the buffers anew on a device, with a selection bias of 0: for a layer built on the
        meta device whose parameters are then set one by one."""
        device = torch.device(device)
        for module in (self, self._own_router):
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.zeros_like(buffer, device=device))
        self.aux_loss = None
        for residents in (self._own, self._site):
            residents.tables_to(device)
        if self.stale is not None:
            self.stale.to_empty(device=device).reset_parameters()

    def _prepare(self, device: torch.device) -> None:
        """Moves what no state dict holds to a device, or makes it anew where it has no memory."""
        self._site.tables_to(device)
        self._counts_to(device)
        if self.stale is not None:
            self.stale.prepare(device)

    def reset_parameters(self) -> None:
        """Draws the initial weights, e.g. after building on the meta device and `to_empty`."""
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
        """Changes which experts are resident, as `Experts.set_resident_experts`.

        With router_scope "resident" the router chooses among the new ones from now on. Make copies
        that average this layer (EMA, SWA) anew: their rows belong to the experts before. Raises
        RuntimeError for a layer that is sharded over a mesh or has stale experts.
        """
        if self.dispatch is not None:
            raise RuntimeError("a layer sharded over a mesh cannot change its resident experts")
        if self.stale is not None:
            raise RuntimeError("a layer with stale experts cannot change its resident experts")
        return self._own.set_resident_experts(resident_experts, weights)

    def update_selection_bias(self, load: Tensor | None = None) -> None:
        """One step of bias balancing; call it after an optimizer step. Without balance "bias" it
        does nothing.

        selection_bias += balance_bias_rate * sign(mean load - load), over the experts that may be
        chosen. load: [E], slots per expert, e.g. summed over sites; None = those that this layer
        counted in training mode since the last update. Raises ValueError for another shape.
        """
        if self.balance == "bias":
            bias = self._own_router.selection_bias
            self._prepare(bias.device)
            self._move_bias(bias, load, self._choosable)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] of the layer's dtype (any float dtype under autocast) -> the same shape.

        Also sets `stats` and `aux_loss`. Raises ValueError for a wrong last dimension, dtype or
        device of x and for NaN logits, TypeError if x is not a tensor.
        """
        check_shape(x, self.hidden_size)
        check_kind(x, self._own.expand_weight, self._tensors)
        self._prepare(x.device)
        x_TD = x.reshape(-1, self.hidden_size).contiguous()
        logits_TE, weights_TK, chosen_TK, counted = self._route(x_TD)
        low_TD = x_TD.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) else x_TD
        shared_expert = self.shared_expert
        shared = _nothing if shared_expert is None else partial(shared_expert, x_TD)
        done = self._compute(low_TD, weights_TK, chosen_TK, self.experts, shared)
        y_TD = done.y if done.beside is None else done.y + done.beside
        self.stats = MoEStats(counted, done.rows, done.rows_here, *chosen_TK.shape)
        self._weigh(logits_TE, counted, self._choosable, self._own_router.scoring)
        return y_TD.view(x.shape)

    def _route(self, x_TD: Tensor) -> tuple[Tensor | None, Tensor, Tensor, RouterStatistics]:
        """Logits [T, E] if a loss is taken of them (else None or logits), combine weights [T, K],
        chosen experts [T, K] and router statistics."""
        allowed_E = self.allowed
        top_k = self.top_k if allowed_E is None else min(self.top_k, self._site.num_resident)
        logits_TE, weights_TK, chosen_TK, counted = self.router(
            x_TD, allowed_E, top_k, measured=True, with_logits=self._takes_loss
        )
        if self.skipped_mass == "rescale":
            index_E = self._site.resident_index
            if self.stale is not None:
                index_E = torch.maximum(index_E, self.stale.resident_index)
            weights_TK = rescale_skipped(weights_TK, chosen_TK, index_E)
        return logits_TE, weights_TK, chosen_TK, counted

    @property
    def _compute(self) -> Compute:
        """The function that computes the slots of a pass."""
        if self.dispatch is not None:
            return self.dispatch
        return compute_here if self.stale is None else self.stale.compute_both

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a pass will read, by name."""
        yield from tensors_of("router", self._own_router)
        yield from tensors_of("experts", self._own)
        if self.shared_expert is not None:
            yield from all_tensors_of("shared_expert", self.shared_expert)

    def extra_repr(self) -> str:
        return changed_arguments(MoELayer, _arguments(self))


def _arguments(layer: MoELayer) -> dict[str, Any]:
    """What each argument of `MoELayer` would be for this layer."""
    router, experts, dispatch = layer._own_router, layer._own, layer.dispatch
    inner = layer.shared_expert and _within(layer.shared_expert, SharedExpert)
    values = {
        "intermediate_size": experts.intermediate_size,
        "activation": experts.activation,
        "expert_bias": experts.expand_bias is not None,
        "resident_experts": ids_unless_all(layer.site_experts, layer.num_experts),
        "shared_expert_intermediate_size": 0 if inner is None else inner.intermediate_size,
        "router_bias": router.bias is not None,
        "stale_experts": () if layer.stale is None else layer.stale.resident_experts,
        "mesh": None,
        "rank_experts": None,
        **{f"router_{name}": getattr(router, name) for name in CHOICE_OPTIONS},
        **placed(experts.expand_weight),
    }
    if dispatch is not None:
        values["mesh"] = f"rank {dispatch.axis.rank} of {dispatch.axis.size}"
        if dispatch.rank_experts != spread_experts(layer.site_experts, dispatch.axis.size):
            values["rank_experts"] = dispatch.rank_experts
    plain = inspect.signature(MoELayer).parameters.keys() - values.keys()
    return values | {name: getattr(layer, name) for name in plain}
