"""The Mixture-of-Experts layer of one site: routes to all experts, holds the resident ones.

    y = shared_expert(x) + sum over the token's slots of w[t, k] * expert[e[t, k]](x[t])

A slot whose expert is not resident is skipped: it costs no row and adds exactly nothing, unless the
layer keeps a frozen copy of that expert (`stale_experts`). Shapes use
the letters T tokens, K slots per token, E experts, R resident experts, D hidden size, N expert
size, G = 2 for gated activations and else 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_ext import ops
from fomoe_ext.checks import a_bool, an_int, at_least, finite, one_of
from fomoe_ext.layer import balance as bal
from fomoe_ext.layer import upcycle
from fomoe_ext.layer.dispatch import DeviceMesh, make_dispatch
from fomoe_ext.layer.experts import (
    Experts,
    ExpertWeights,
    Residents,
    SharedExpert,
    StaleExperts,
    resident_ids,
)
from fomoe_ext.layer.seeding import fill_normal_
from fomoe_ext.layer.skipped import SKIPPED_MASS, rescale_skipped
from fomoe_ext.ops.shapes import on_one_device, plain_floats

__all__ = ["Experts", "MoELayer", "Router", "SharedExpert"]

_Module = TypeVar("_Module", bound=nn.Module)


def _autocasts(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # meta knows no autocast


def _within(module: nn.Module, kind: type[_Module]) -> _Module:
    """The module itself, or the one of this class that an adapter is around."""
    if isinstance(module, kind):
        return module
    return next(inner for inner in module.modules() if isinstance(inner, kind))


class Router(nn.Module):
    """Scores all experts and chooses `top_k` of them per token.

    weight: [E, D]. bias: [E], added to the logits, or None. selection_bias: fp32 [E], added to the
    scores for the choice only (zeros unless loaded or moved by bias balancing); it stays fp32 when
    the module is cast. tap: a module that is called with the logits, or None, for libraries that
    record them by hooks.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    selection_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalize: bool = False,
        scale: float = 1.0,
        num_groups: int = 1,
        groups_kept: int = 1,
        bias: bool = False,
        layer_index: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Sizes and options of `MoELayer`. Raises ValueError or TypeError for bad ones."""
        super().__init__()
        at_least(1, hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        at_least(1, num_groups=num_groups, groups_kept=groups_kept)
        at_least(0, layer_index=layer_index)
        an_int(seed=seed)
        a_bool(renormalize=renormalize, bias=bias)
        one_of(("sigmoid", "softmax"), scoring=scoring)
        finite(0.0, scale=scale)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts = {num_experts}, got {top_k}")
        if num_experts % num_groups:
            raise ValueError(
                f"num_groups must divide num_experts = {num_experts}, got {num_groups}"
            )
        if groups_kept > num_groups:
            raise ValueError(
                f"groups_kept must be at most num_groups = {num_groups}, got {groups_kept}"
            )
        choosable = groups_kept * (num_experts // num_groups)
        if top_k > choosable:
            raise ValueError(
                f"top_k must be at most the {choosable} experts of the groups kept, got {top_k}"
            )
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scoring, self.renormalize, self.scale = scoring, renormalize, scale
        self.num_groups, self.groups_kept = num_groups, groups_kept
        self.layer_index, self.seed = layer_index, seed
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        lines = torch.empty(num_experts, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(lines) if bias else None)
        self.tap: nn.Module | None = None
        self.register_buffer(
            "selection_bias", torch.zeros(num_experts, device=device, dtype=torch.float32)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of deviation 1/sqrt(D) that depend only on (seed, layer); biases 0."""
        fill_normal_(self.weight, self.hidden_size**-0.5, self.seed, "router", self.layer_index)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.selection_bias.zero_()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parameters, each with a row per expert."""
        return ("weight",) if self.bias is None else ("weight", "bias")

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> fp32 logits [T, E], computed in fp32 also under autocast.

        Raises ValueError for parameters on another device or of no plain float dtype.
        """
        of_router = {name: getattr(self, name) for name in (*self.parts, "selection_bias")}
        on_one_device({"x": x} | of_router)
        plain_floats(of_router)
        plain = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with plain:
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(x.float(), self.weight.float(), bias)
        if self.tap is not None:
            self.tap(logits)
        return logits

    def choose(
        self, logits: Tensor, allowed: Tensor | None = None, top_k: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [T, E] -> combine weights fp32 [T, K] and experts int32 [T, K] (`ops.route`).

        `allowed` is a bool mask [E] (None = all may be chosen), `top_k` overrides the router's own.
        Raises as `ops.route` does, e.g. ValueError for NaN logits.
        """
        return ops.route(
            logits, self.top_k if top_k is None else top_k, allowed=allowed, **self._options()
        )

    def choose_and_measure(
        self, logits: Tensor, allowed: Tensor | None = None, top_k: int | None = None
    ) -> tuple[Tensor, Tensor, ops.RouterStatistics]:
        """`choose` and the statistics of `ops.measured_route`, from one pass over the logits."""
        return ops.measured_route(
            logits, self.top_k if top_k is None else top_k, allowed=allowed, **self._options()
        )

    def _options(self) -> dict[str, Any]:
        return {
            "scoring": self.scoring,
            "selection_bias": self.selection_bias,
            "num_groups": self.num_groups,
            "groups_kept": self.groups_kept,
            "renormalize": self.renormalize,
            "scale": self.scale,
        }

    def forward(
        self,
        x: Tensor,
        allowed: Tensor | None = None,
        top_k: int | None = None,
        *,
        measured: bool = False,
    ) -> Any:
        """x [T, D] -> combine weights fp32 [T, K] and chosen experts int32 [T, K], as `choose`.

        With `measured` the logits go before them and the statistics of `choose_and_measure` after.
        """
        logits = self.logits(x)
        if measured:
            return logits, *self.choose_and_measure(logits, allowed, top_k)
        return self.choose(logits, allowed, top_k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if self.selection_bias.dtype != torch.float32:
            # Steps of the bias are smaller than what bf16 can add.
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def extra_repr(self) -> str:
        text = f"{self.hidden_size}, {self.num_experts}, top_k={self.top_k}, scoring={self.scoring}"
        if self.num_groups > 1:
            text += f", groups={self.groups_kept}/{self.num_groups}"
        text += f", renormalize={self.renormalize}, scale={self.scale}"
        return text if self.bias is None else text + ", bias=True"


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer of which this site holds only the resident experts.

    After a forward pass `stats` holds its measurements (`balance.MoEStats`, device tensors) and
    `aux_loss` the sum of its balancing losses, each times its coefficient: a scalar to add to the
    training loss, 0 in eval mode or when no loss is asked for.

    Under activation checkpointing use `use_reentrant=False`; the reentrant form runs the layer
    without a graph, so that `aux_loss` would train nothing.

    With `mesh` a site's ranks share its resident experts (`fomoe_ext.layer.dispatch` says what
    gradients then are). `stats` and `aux_loss` are of this rank's tokens, `stats.rows` counts rows
    made here.
    """

    stats: bal.MoEStats | None
    aux_loss: Tensor
    load_since_update: Tensor

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: Literal[
            "swiglu", "geglu", "silu", "relu2", "gelu", "clamped_swiglu"
        ] = "swiglu",
        bias: bool = False,
        scoring: Literal["sigmoid", "softmax"] = "sigmoid",
        router_scope: Literal["global", "resident"] = "global",
        skipped_mass: Literal["drop", "rescale"] = "drop",
        resident_experts: Sequence[int] | None = None,
        shared_expert_size: int = 0,
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
        """Builds the layer.

        Args:
            hidden_size: D, width of a token.
            expert_size: N, inner width of an expert.
            num_experts: E, experts over all sites.
            top_k: K, experts chosen per token.
            activation: a key of `ops.ACTIVATIONS`; swiglu, geglu and clamped_swiglu are gated
                (G = 2).
            bias: the routed experts have biases, 0 at first, in both of their layers.
            scoring: how logits become scores.
            router_scope: "global" chooses among all experts and skips those not resident,
                "resident" chooses min(K, R) among the resident ones.
            skipped_mass: "drop" loses the weights of skipped slots, "rescale" shares them out over
                the token's computed ones (`skipped.rescale_skipped`).
            resident_experts: ids this site holds; None = all, empty = none ("global" only).
            shared_expert_size: inner width of an expert that every token uses; 0 = none.
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
                (`experts.StaleExperts`); for router_scope "global", without a mesh.
            mesh: its axis "expert" shares out the resident experts; None, or one rank: all here.
            rank_experts: by rank of that axis its ids (`spread.spread_experts`); None = chunks.
            device, dtype: of the parameters; float32, bfloat16 or float16.

        Raises ValueError or TypeError naming the argument.
        """
        super().__init__()
        one_of(("global", "resident"), router_scope=router_scope)
        one_of(SKIPPED_MASS, skipped_mass=skipped_mass)
        one_of(bal.BALANCES, balance=balance)
        at_least(0, shared_expert_size=shared_expert_size, layer_index=layer_index)
        finite(0.0, balance_coef=balance_coef, z_loss_coef=z_loss_coef)
        finite(0.0, bias_update_rate=bias_update_rate)
        a_bool(router_bias=router_bias)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        common: dict[str, Any] = {
            "layer_index": layer_index,
            "seed": seed,
            "device": device,
            "dtype": dtype,
        }
        self.router = Router(
            hidden_size,
            num_experts,
            top_k,
            scoring=scoring,
            renormalize=renormalize,
            scale=scale,
            num_groups=num_groups,
            groups_kept=groups_kept,
            bias=router_bias,
            **common,
        )
        site = resident_ids(resident_experts, num_experts)
        if router_scope == "resident" and not site:
            raise ValueError("resident_experts must not be empty with router_scope 'resident'")
        sizes = (num_experts, hidden_size)
        self.dispatch = make_dispatch(mesh, site, *sizes, layer_index, device, rank_experts)
        self.experts = Experts(
            hidden_size,
            expert_size,
            num_experts,
            activation=activation,
            bias=bias,
            resident_experts=self.dispatch.own_experts if self.dispatch else site,
            **common,
        )
        self.stale: StaleExperts | None = None
        if len(stale_experts):
            if router_scope != "global":
                raise ValueError(f"stale_experts needs router_scope 'global', got {router_scope!r}")
            if self.dispatch is not None:
                raise ValueError("stale_experts: not possible in a layer sharded over a mesh")
            self.stale = StaleExperts(self.experts, stale_experts)
        self.shared_expert: nn.Module | None = None
        if shared_expert_size:
            self.shared_expert = SharedExpert(
                hidden_size, shared_expert_size, activation=activation, **common
            )
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.router_scope, self.balance = router_scope, balance
        self.skipped_mass = skipped_mass
        self.balance_coef, self.z_loss_coef = balance_coef, z_loss_coef
        self.bias_update_rate, self.layer_index, self.seed = bias_update_rate, layer_index, seed
        self.stats = None
        self.aux_loss = torch.zeros((), device="cpu")
        self.register_buffer(
            "load_since_update",
            torch.zeros(num_experts, dtype=torch.int64, device=device),
            persistent=False,
        )

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
            mlp: gated with linear layers gate_proj, up_proj and down_proj, plain with up_proj and
                down_proj or fc1 and fc2, a Sequential of Linear, activation, Linear, or a
                `SharedExpert`; with biases the layer has them too. Not changed, nothing is shared
                with it.
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
        return upcycle.from_dense(
            cls,
            mlp,
            num_experts,
            top_k=top_k,
            noise=noise,
            seed=seed,
            resident_experts=resident_experts,
            activation=activation,
            **layer_options,
        )

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
        counts, stale = self.load_since_update, self.stale
        if counts.device != device:
            with torch.inference_mode(False):  # they outlive this pass
                self.load_since_update = (
                    torch.zeros_like(counts, device=device) if counts.is_meta else counts.to(device)
                )
        if stale is not None:
            stale.tables_to(device)
            if stale.part("expand_weight").is_meta and device.type != "meta":
                with torch.inference_mode(False):
                    stale.to_empty(device=device)  # which fills them

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoELayer:
        counts = self.load_since_update
        super()._apply(fn, recurse)
        # As they were, also where they were cast, or only memory was asked for.
        device = self.load_since_update.device
        known = not counts.is_meta or device.type == "meta"
        self.load_since_update = (
            counts.to(device) if known else torch.zeros_like(counts, device=device)
        )
        return self

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

    @torch.no_grad()
    def update_selection_bias(self, load: Tensor | None = None) -> None:
        """One step of bias balancing, to be called after an optimizer step; else it does nothing.

        selection_bias += bias_update_rate * sign(mean load - load), over the experts that may be
        chosen. `load` is [E], slots per expert, e.g. summed over sites; None = what this layer
        counted in training mode since the last update. Raises ValueError for another shape.
        """
        if self.balance != "bias":
            return
        self._settle(self._own_router.selection_bias.device)
        if load is None:
            load = self.load_since_update
        if not isinstance(load, Tensor):
            raise TypeError(f"load must be a tensor, got {type(load).__name__}")
        if load.shape != (self.num_experts,):
            raise ValueError(f"load must have shape [{self.num_experts}], got {list(load.shape)}")
        load = load.to(self.load_since_update.device)
        if self.allowed is None:
            self._own_router.selection_bias += bal.bias_step(load, self.bias_update_rate)
        else:
            ids = self._site.resident_ids
            step = bal.bias_step(load[ids], self.bias_update_rate)
            self._own_router.selection_bias.index_add_(0, ids, step)
        self.load_since_update.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] of the layer's dtype (any float dtype under autocast) -> the same shape.

        Raises ValueError for a wrong last dimension, dtype or device of x and for NaN logits,
        TypeError where x is no tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must have shape [..., {self.hidden_size}], got {list(x.shape)}")
        self._check_kind(x)
        self._settle(x.device)
        tokens = x.reshape(-1, self.hidden_size).contiguous()
        top_k = self.top_k
        if self.router_scope == "resident":
            top_k = min(top_k, self._site.num_resident)
        logits, weights, experts, measured = self.router(tokens, self.allowed, top_k, measured=True)
        if self.skipped_mass == "rescale":
            index = self._site.resident_index
            if self.stale is not None:
                index = torch.maximum(index, self.stale.resident_index)
            weights = rescale_skipped(weights, experts, index)
        inputs = tokens
        if _autocasts(x):
            inputs = tokens.to(torch.get_autocast_dtype(x.device.type))
        of_shared = lambda: None if self.shared_expert is None else self.shared_expert(tokens)
        if self.dispatch is None:
            y, table = self.experts(inputs, weights, experts)
            rows = computed = table.offsets[-1].clone()
            if self.stale is not None:
                more, table = self.stale(inputs, weights, experts)
                y, rows = y + more, rows + table.offsets[-1]
                computed = rows
            shared = of_shared()
        else:
            y, shared, rows, computed = self.dispatch(
                inputs, weights, experts, self.experts, of_shared
            )
        if shared is not None:
            y = y + shared
        stats = bal.measure(measured, rows, experts.shape[0], experts.numel())
        self.stats = stats._replace(rows=computed)
        self._balance(logits, self.stats.load)
        return y.view(x.shape)

    def _check_kind(self, x: Tensor) -> None:
        weight = self._own.expand_weight
        if not x.is_floating_point():
            raise ValueError(f"x must have a float dtype, got {x.dtype}")
        # Torch's own linear layers give memory that nobody has written for weights on meta.
        missing = [] if x.is_meta else [name for name, t in self._tensors() if t.is_meta]
        if missing:
            raise ValueError(
                f"{missing[0]} must be on the device of x, {x.device}, it is on meta; after "
                "building there call to_empty(device=...), then reset_parameters() or "
                "load_state_dict(...)"
            )
        if x.device != weight.device:
            raise ValueError(f"x must be on the layer's device {weight.device}, got {x.device}")
        if x.dtype != weight.dtype and not _autocasts(x):
            raise ValueError(f"x must have the layer's dtype {weight.dtype}, got {x.dtype}")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a pass will read of this layer's modules, by name."""
        for path, module in (("router", self._own_router), ("experts", self._own)):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{path}.{name}", tensor
        if self.shared_expert is None:
            return
        for path, module in self.shared_expert.named_modules(prefix="shared_expert"):
            if hasattr(module, "_hf_hook"):  # accelerate brings its tensors when it runs
                continue
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{path}.{name}", tensor

    def _balance(self, logits: Tensor, load: Tensor) -> None:
        """Sets `aux_loss` and counts the load of bias balancing."""
        losses = []
        if self.training and logits.shape[0] > 0 and self._wants_loss():
            chosen = load
            if self.allowed is not None:
                logits = logits.index_select(1, self._site.resident_ids)
                chosen = load.index_select(0, self._site.resident_ids)
            if self.balance == "switch":
                switch = bal.switch_loss(logits, chosen, self._own_router.scoring)
                losses.append(self.balance_coef * switch)
            elif self.balance == "entropy":
                losses.append(self.balance_coef * bal.entropy_loss(logits))
            if self.z_loss_coef:
                losses.append(self.z_loss_coef * bal.z_loss(logits))
        if self.training and self.balance == "bias":
            self.load_since_update.add_(load)
        self.aux_loss = sum(losses, start=logits.new_zeros(()))

    def _wants_loss(self) -> bool:
        return self.balance in ("switch", "entropy") or self.z_loss_coef != 0.0

    def __getstate__(self) -> dict[str, Any]:
        # The graph of the last pass can be neither copied nor stored.
        return self.__dict__ | {"aux_loss": self.aux_loss.detach()}

    def extra_repr(self) -> str:
        text = f"router_scope={self.router_scope}, balance={self.balance}"
        if self.skipped_mass != "drop":
            text += f", skipped_mass={self.skipped_mass}"
        if self.balance in ("switch", "entropy"):
            text += f", balance_coef={self.balance_coef}"
        if self.z_loss_coef:
            text += f", z_loss_coef={self.z_loss_coef}"
        return text
