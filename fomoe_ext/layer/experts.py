"""Expert weights: those resident on this site, and the shared expert that every site holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_ext import ops
from fomoe_ext.checks import a_bool, an_int, at_least, one_of
from fomoe_ext.layer.seeding import fill_normal_
from fomoe_ext.ops.shapes import on_one_device, plain_floats

# Of one expert, in the order of `Experts.parts`: expand [G*N, D], contract [D, N] and, where there
# are biases, theirs [G*N] and [D].
ExpertWeights = tuple[Tensor, ...]
_NUMBER = {2: "two", 4: "four"}
_PARTS = ("expand_weight", "contract_weight", "expand_bias", "contract_bias")
_EXTRA_STATE = "_extra_state"  # what torch calls it in state dicts


def resident_ids(
    resident_experts: Sequence[int] | None, num_experts: int, name: str = "resident_experts"
) -> tuple[int, ...]:
    """The ids in ascending order, checked; None = all experts. `name` is for errors."""
    if resident_experts is None:
        return tuple(range(num_experts))
    try:
        ids = sorted(operator.index(e) for e in resident_experts)
    except TypeError as error:
        raise TypeError(f"{name} must be ints, got {resident_experts!r}") from error
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name} must be distinct, got {ids}")
    if ids and not 0 <= ids[0] <= ids[-1] < num_experts:
        raise ValueError(
            f"{name} must be in 0..{num_experts - 1} (num_experts is {num_experts}), got {ids}"
        )
    return tuple(ids)


class _Tables(NamedTuple):
    """What `Residents` says of itself, as tensors."""

    index: Tensor
    ids: Tensor
    allowed: Tensor


class Residents(nn.Module):
    """Which experts are resident, ascending by id, with tables of them on the device.

    resident_experts: the global ids. resident_index: int32 [E], position of each expert among them
    or -1. resident_ids: int64 [R], the ids as a tensor.

    The tables are no buffers: all that they say is in `resident_experts`, from which they are made
    anew wherever they are needed. So nothing that is done to buffers, such as averaging them,
    leaving them on the meta device or `to_empty`, makes them say anything else.
    """

    def __init__(
        self,
        resident_experts: Sequence[int] | None,
        num_experts: int,
        device: torch.device | str | None = None,
        name: str = "resident_experts",
    ) -> None:
        """`resident_experts` None = all. Raises ValueError or TypeError for bad ids, in which
        `name` is what they are called."""
        super().__init__()
        self.num_experts = num_experts
        self.resident_experts = resident_ids(resident_experts, num_experts, name)
        self._skipped: frozenset[int] = frozenset()
        self._tables = self._make_tables(device)

    @property
    def num_resident(self) -> int:
        """R, the number of resident experts."""
        return len(self.resident_experts)

    @property
    def resident_index(self) -> Tensor:
        """int32 [E], the place of each expert among the resident ones or -1."""
        return self._tables.index

    @property
    def resident_ids(self) -> Tensor:
        """int64 [R], the ids, ascending."""
        return self._tables.ids

    @property
    def resident_mask(self) -> Tensor:
        """bool [E], which experts have a place."""
        return self._tables.allowed

    def _in_order(self) -> Sequence[int]:
        """The resident experts in the order of their rows."""
        return self.resident_experts

    def _make_tables(self, device: torch.device | str | None) -> _Tables:
        index = [-1] * self.num_experts
        for row, expert in enumerate(self._in_order()):
            if expert not in self._skipped:
                index[expert] = row
        if device is None:
            device = torch.get_default_device()
        with torch.inference_mode(False):  # they outlive the pass that makes them
            return _Tables(
                torch.tensor(index, dtype=torch.int32, device=device),
                torch.tensor(self.resident_experts, dtype=torch.int64, device=device),
                torch.tensor([row >= 0 for row in index], dtype=torch.bool, device=device),
            )

    def tables_to(self, device: torch.device | str) -> None:
        """Makes the tables anew unless they are on this device."""
        if self._tables.index.device != torch.device(device):
            self._tables = self._make_tables(device)

    @torch.no_grad()
    def write_resident_tables(self) -> None:
        """Writes what `resident_experts` says now into the tables, in place."""
        if self._tables.index.is_meta:
            return
        for table, values in zip(self._tables, self._make_tables("cpu"), strict=True):
            table.copy_(values)

    def skip_experts(self, experts: Sequence[int]) -> None:
        """From now on resident experts that are among these count as absent; they stay in memory.

        Raises ValueError or TypeError for bad ids.
        """
        self._skipped = frozenset(resident_ids(experts, self.num_experts, "experts"))
        self.write_resident_tables()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.tables_to(fn(torch.empty(0, device=self._tables.index.device)).device)
        return self


class Experts(Residents):
    """The weights of the resident experts, ascending by id; no others are allocated.

    expand_weight: [R, G*N, D], gated: gate rows first, then up. contract_weight: [R, D, N].
    expand_bias: [R, G*N] and contract_bias: [R, D], or None.
    resident_experts: the global ids, those of `Residents`; rows are in their order. They are in the
    state dict as `_extra_state`, int64 [R], and one of other experts is not loaded; one that does
    not say is, as older ones do not.

    The weights may be other tensors than Parameters while the module runs, as with
    `torch.func.functional_call`, parametrizations, pruning and adapters.

    Where a weight has an attribute `main_grad`, float32 of its shape (Megatron-LM's convention),
    the backward pass adds the weight's gradient to that, and its `grad` stays as it is.
    """

    expand_weight: nn.Parameter
    contract_weight: nn.Parameter
    expand_bias: nn.Parameter | None
    contract_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        resident_experts: Sequence[int] | None = None,
        layer_index: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Sizes and options of `MoELayer`. Raises ValueError or TypeError for bad ones."""
        at_least(1, hidden_size=hidden_size, expert_size=expert_size, num_experts=num_experts)
        at_least(0, layer_index=layer_index)
        an_int(seed=seed)
        a_bool(bias=bias)
        one_of(tuple(ops.ACTIVATIONS), activation=activation)
        super().__init__(resident_experts, num_experts, device)
        self.hidden_size, self.expert_size, self.activation = hidden_size, expert_size, activation
        self.layer_index, self.seed = layer_index, seed
        residents = self.num_resident
        wide = expert_size * (2 if ops.is_gated(activation) else 1)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.expand_weight = nn.Parameter(torch.empty(residents, wide, hidden_size, **options))
        self.contract_weight = nn.Parameter(
            torch.empty(residents, hidden_size, expert_size, **options)
        )
        for name, width in (("expand_bias", wide), ("contract_bias", hidden_size)):
            lines = nn.Parameter(torch.empty(residents, width, **options)) if bias else None
            self.register_parameter(name, lines)
        self.reset_parameters()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parameters, each with a row per resident expert."""
        weights = ("expand_weight", "contract_weight")
        return weights if self.expand_bias is None else (*weights, "expand_bias", "contract_bias")

    def part(self, name: str) -> nn.Parameter:
        """The parameter of one of the `parts`, to be read and written.

        Raises RuntimeError where it is computed from other tensors (a parametrization, pruning),
        so that what is written into it would be lost.
        """
        found = self._parameters.get(name)
        if not isinstance(found, nn.Parameter):
            raise RuntimeError(
                f"{name} of experts must be a plain Parameter here, but it is computed from other "
                "tensors (a parametrization, pruning or an adapter); remove or merge that first"
            )
        return found

    def get_extra_state(self) -> Tensor:
        """The ids of the resident experts for the state dict, int64 [R], on the CPU."""
        return torch.tensor(self.resident_experts, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Changes nothing. ValueError for the ids of other experts than are resident."""
        if problem := self._other_residents(state):
            raise ValueError(f"resident_experts: {problem}")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}{_EXTRA_STATE}"
        problem = self._other_residents(state_dict[key]) if key in state_dict else ""
        if problem:
            error_msgs.append(f"{prefix}resident_experts: {problem}")
            if all(_same_rows(state_dict.get(prefix + n), self._parameters[n]) for n in self.parts):
                return  # nothing else would keep the rows of other experts out
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)

    def _other_residents(self, stored: Any) -> str:
        """What is wrong with the ids in a state dict; empty for nothing."""
        if isinstance(stored, Tensor) and stored.is_meta:
            return ""
        try:
            numbers = stored.tolist() if isinstance(stored, Tensor) else list(stored)
            ids = tuple(map(round, numbers))
            # Not of whole numbers: somebody has averaged those of several sites.
            whole = all(abs(e - number) < 1e-3 for e, number in zip(ids, numbers, strict=True))
        except (TypeError, ValueError, OverflowError):
            return f"must be ids in a state dict, got {stored!r}"
        if not whole:
            return f"must be whole numbers in a state dict, got {numbers}"
        if ids == self.resident_experts:
            return ""
        return (
            f"the state dict is of experts {list(ids)}, this layer holds "
            f"{list(self.resident_experts)}; load it into a layer built with "
            f"resident_experts={list(ids)}"
        )

    def reset_parameters(self) -> None:
        """Weights of deviation 1/sqrt(fan-in) that depend only on (seed, layer, expert); zero
        biases.
        """
        self.write_resident_tables()
        for row, expert in enumerate(self.resident_experts):
            for weight, name in (
                (self.expand_weight, "expand"),
                (self.contract_weight, "contract"),
            ):
                fan_in = weight.shape[2]
                fill_normal_(
                    weight[row].detach(), fan_in**-0.5, self.seed, name, self.layer_index, expert
                )
        for bias in (self.expand_bias, self.contract_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of a resident expert's `parts`: expand [G*N, D], contract [D, N], biases if any.

        Raises ValueError when the expert is not resident.
        """
        if expert not in self.resident_experts:
            raise ValueError(f"expert must be one of {self.resident_experts}, got {expert}")
        row = self.resident_experts.index(expert)
        return tuple(self.part(name).detach()[row] for name in self.parts)

    @torch.no_grad()
    def set_resident_experts(
        self, resident_experts: Sequence[int], weights: Mapping[int, ExpertWeights] | None = None
    ) -> tuple[int, ...]:
        """Changes which experts are resident, in place: the Parameter objects stay the same.

        `weights` gives what `expert_weights` returns for every expert that arrives (and for any
        other that is to be overwritten); the rows of experts that stay are moved. Returns the ids
        that arrived. Nothing is changed when an error is raised: ValueError for a different
        number of ids, ids out of range or repeated, and missing or misshapen weights.
        """
        weights = weights or {}
        ids = resident_ids(resident_experts, self.num_experts)
        if len(ids) != self.num_resident:
            raise ValueError(
                f"resident_experts must keep its number, {self.num_resident}, got {len(ids)}: {ids}"
            )
        arrived = tuple(e for e in ids if e not in self.resident_experts)
        missing = [e for e in arrived if e not in weights]
        if missing:
            raise ValueError(f"weights must hold the experts that arrive, {missing} are missing")
        parts = [self.part(name) for name in self.parts]
        wanted = tuple(tuple(part.shape[1:]) for part in parts)
        for expert, given in weights.items():
            if expert not in ids:
                raise ValueError(f"weights holds expert {expert}, which is not in {ids}")
            if len(given) != len(parts) or not all(isinstance(weight, Tensor) for weight in given):
                kinds = [type(weight).__name__ for weight in given]
                raise TypeError(
                    f"weights[{expert}] must be {_NUMBER[len(parts)]} tensors, got {kinds}"
                )
            shapes = tuple(tuple(weight.shape) for weight in given)
            if shapes != wanted:
                raise ValueError(f"weights[{expert}] must have the shapes {wanted}, got {shapes}")
        # What moves is copied out first: rows may swap places.
        old = {
            row: tuple(part[at].clone() for part in parts)
            for row, expert in enumerate(ids)
            if expert not in weights and (at := self.resident_experts.index(expert)) != row
        }
        new = old | {ids.index(expert): given for expert, given in weights.items()}
        for row, values in new.items():
            for part, value in zip(parts, values, strict=True):
                part[row].copy_(value)
        self.resident_experts = ids
        self.write_resident_tables()
        return arrived

    def forward(
        self, x: Tensor, weights: Tensor, experts: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, ops.RowTable]:
        """Sum over each token's slots on resident experts, and the row table it was computed by.

        x [T, D] of the weights' dtype, weights fp32 [T, K], experts int32 [T, K] -> y [T, D].
        `index`: the table by which to read `experts`, None = `resident_index`.
        """
        if index is None:
            self.tables_to(x.device)
            index = self.resident_index
        # Each once: a parametrization computes it.
        parts = {name: getattr(self, name) for name in _PARTS}
        given = {name: part for name, part in parts.items() if part is not None}
        on_one_device({"x": x} | given)
        plain_floats(given)
        table = ops.compact(experts, index, self.num_resident)
        y = ops.moe_experts(
            x,
            weights,
            table,
            activation=self.activation,
            expand_total=getattr(parts["expand_weight"], "main_grad", None),
            contract_total=getattr(parts["contract_weight"], "main_grad", None),
            **{name: part.to(x.dtype) for name, part in given.items()},
        )
        return y, table

    def extra_repr(self) -> str:
        text = f"{self.hidden_size}, {self.expert_size}, resident={self.num_resident}/"
        text += f"{self.num_experts}, activation={self.activation}"
        return text if self.expand_bias is None else text + ", bias=True"


class StaleExperts(Experts):
    """Frozen copies of experts that are resident elsewhere: computed, but not trained.

    Their weights are buffers that are in no state dict, so that no optimizer, meeting or checkpoint
    sees them. Input and combine weights get gradients through them, they get none. They begin as
    the experts themselves do and are refreshed in meetings (`fomoe_ext.outer.stale`).
    """

    def __init__(self, experts: Experts, stale_experts: Sequence[int]) -> None:
        """Copies of `stale_experts`, of the sizes and options of a layer's own `experts`.

        Raises ValueError or TypeError for bad ids, or those of experts that are not absent.
        """
        ids = resident_ids(stale_experts, experts.num_experts, "stale_experts")
        present = sorted(set(ids) & set(experts.resident_experts))
        if present:
            raise ValueError(f"stale_experts must be absent ones, {present} are resident")
        weight = experts.expand_weight
        super().__init__(
            experts.hidden_size,
            experts.expert_size,
            experts.num_experts,
            activation=experts.activation,
            bias=experts.expand_bias is not None,
            resident_experts=ids,
            layer_index=experts.layer_index,
            seed=experts.seed,
            device=weight.device,
            dtype=weight.dtype,
        )
        for name in self.parts:
            value = self.get_parameter(name).detach()
            delattr(self, name)
            self.register_buffer(name, value, persistent=False)

    # In no state dict, as said above, and so are their ids.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def part(self, name: str) -> Tensor:  # type: ignore[override]
        """The buffer of one of the `parts`."""
        return self.get_buffer(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        without_memory = self.part("expand_weight").is_meta
        super()._apply(fn, recurse)
        if without_memory:  # nobody else has values for them
            self.reset_parameters()
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(self.part(name).nbytes for name in self.parts)


def _same_rows(stored: Any, own: Tensor | None) -> bool:
    return isinstance(stored, Tensor) and own is not None and stored.shape == own.shape


def require_plain(path: str, module: nn.Module) -> None:
    """Raises ValueError unless the router or experts at `path` are what they were made: rows by
    expert in plain Parameters. What adapters and parametrizations add has none, or others at every
    site.
    """
    parts = getattr(module, "parts", None)
    if parts is None:
        raise ValueError(
            f"{path} must be as MoELayer has made it, it is a {type(module).__name__}; merge and "
            "unload adapters first"
        )
    found = {name for name, _ in module.named_parameters()}
    if other := sorted(found ^ set(parts)):
        raise ValueError(
            f"{path} must have the parameters {', '.join(parts)} and no others, it differs in "
            f"{', '.join(other)}; remove parametrizations, pruning and adapters first"
        )


def extra_state_names(model: nn.Module) -> set[str]:
    """What the state dict of a model calls the ids of its resident experts."""
    return {
        f"{name}.{_EXTRA_STATE}" if name else _EXTRA_STATE
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Experts)
    }


def _activate(preact: Tensor, activation: str) -> Tensor:
    up: Tensor | None = None
    if ops.is_gated(activation):
        preact, up = preact.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        assert up is not None
        gate = preact.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    if activation in ("swiglu", "silu"):
        act = F.silu(preact)
    elif activation in ("geglu", "gelu"):
        act = F.gelu(preact, approximate="tanh")
    else:
        act = F.relu(preact).square()
    return act if up is None else act * up


class SharedExpert(nn.Module):
    """An expert that every token uses and every site holds, of two plain linear layers."""

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        *,
        activation: str = "swiglu",
        layer_index: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Weights as one expert's: expand [G*N, D], contract [D, N]; no biases.

        Raises ValueError or TypeError naming the argument.
        """
        super().__init__()
        at_least(1, hidden_size=hidden_size, expert_size=expert_size)
        at_least(0, layer_index=layer_index)
        an_int(seed=seed)
        one_of(tuple(ops.ACTIVATIONS), activation=activation)
        self.activation, self.layer_index, self.seed = activation, layer_index, seed
        wide = expert_size * (2 if ops.is_gated(activation) else 1)
        device = torch.get_default_device() if device is None else device
        # skip_init: the default initialisation would draw from torch's global generator.
        make = nn.utils.skip_init
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.expand = make(nn.Linear, hidden_size, wide, **options)
        self.contract = make(nn.Linear, expert_size, hidden_size, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of deviation 1/sqrt(fan-in) that depend only on (seed, layer)."""
        for name, linear in (("expand", self.expand), ("contract", self.contract)):
            std = linear.in_features**-0.5
            fill_normal_(linear.weight, std, self.seed, "shared", name, self.layer_index)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]. Raises ValueError for a weight on the meta device and x not."""
        for name, linear in (("expand", self.expand), ("contract", self.contract)):
            weight = linear._parameters.get("weight")  # an adapter has others
            if weight is not None and weight.is_meta and not hasattr(linear, "_hf_hook"):
                on_one_device({"x": x, f"{name}.weight": weight})
        return self.contract(_activate(self.expand(x), self.activation))
