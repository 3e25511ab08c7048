"""The weights of the experts that are resident here, and what they make of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fomoe_ext import ops
from fomoe_ext.activations import ACTIVATIONS, num_projections
from fomoe_ext.checks import a_bool, an_int, at_least, one_of
from fomoe_ext.layer.arguments import changed_arguments, ids_unless_all, placed
from fomoe_ext.layer.residents import Residents, resident_ids
from fomoe_ext.layer.seeding import fill_normal_
from fomoe_ext.ops.shapes import on_one_device, plain_floats

# Of one expert, in the order of `Experts.parts`: expand [G*N, D], contract [D, N] and, where there
# are biases, theirs [G*N] and [D].
ExpertWeights = tuple[Tensor, ...]
_NUMBER = {2: "two", 4: "four"}
_PARTS = ("expand_weight", "contract_weight", "expand_bias", "contract_bias")
_EXTRA_STATE = "_extra_state"  # what torch calls it in state dicts


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
        intermediate_size: int,
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
        at_least(
            1, hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts
        )
        at_least(0, layer_index=layer_index)
        an_int(seed=seed)
        a_bool(bias=bias)
        one_of(tuple(ACTIVATIONS), activation=activation)
        super().__init__(resident_experts, num_experts, device)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation = activation
        self.layer_index, self.seed = layer_index, seed
        residents = self.num_resident
        wide = intermediate_size * num_projections(activation)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.expand_weight = nn.Parameter(torch.empty(residents, wide, hidden_size, **options))
        self.contract_weight = nn.Parameter(
            torch.empty(residents, hidden_size, intermediate_size, **options)
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
        names = ("hidden_size", "intermediate_size", "num_experts", "activation", "layer_index")
        values = {name: getattr(self, name) for name in (*names, "seed")}
        values["bias"] = self.expand_bias is not None
        values["resident_experts"] = ids_unless_all(self.resident_experts, self.num_experts)
        return changed_arguments(Experts, values | placed(self.expand_weight))


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
