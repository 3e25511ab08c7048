"""The weights of the experts that are resident here, and the computation of their rows.

Shapes use the letters of `fomoe_ext.layer.moe`.
"""

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
from fomoe_ext.ops.shapes import require_floats

ExpertWeights = tuple[Tensor, ...]
"""The weights of one expert in the order of `Experts.parts`: expand [G*N, D], contract [D, N] and,
with biases, [G*N] and [D]."""
_NUMBER = {2: "two", 4: "four"}
_PARTS = ("expand_weight", "contract_weight", "expand_bias", "contract_bias")
_EXTRA_STATE = "_extra_state"  # what torch calls it in state dicts


class Experts(Residents):
    """The weights of the resident experts, ascending by id; no others are allocated.

    expand_weight: [R, G*N, D]; of gated experts the gate rows come first, then up.
    contract_weight: [R, D, N]. expand_bias: [R, G*N] and contract_bias: [R, D], or None.
    resident_experts: the global ids (see `Residents`), in the order of the rows. The state dict has
    them as `_extra_state`, int64 [R]. Loading a state dict of other experts is an error; one
    without ids (of an older version) is loaded.

    In a forward pass the weights may be tensors that are no Parameters, e.g. with
    `torch.func.functional_call`, parametrizations, pruning or adapters.

    If a weight has an attribute `main_grad`, fp32 of its shape (Megatron-LM's convention), the
    backward pass adds the weight's gradient to that and leaves `grad` alone.
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

        Raises RuntimeError if it is computed from other tensors (a parametrization, pruning):
        values written into it would be lost.
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
        """Only checks: ValueError unless `state` holds the ids of the resident experts."""
        if problem := self._other_residents(state):
            raise ValueError(f"resident_experts {problem}")

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
            error_msgs.append(f"{prefix}resident_experts {problem}")
            if all(_same_rows(state_dict.get(prefix + n), self._parameters[n]) for n in self.parts):
                return  # the shapes fit, so only this keeps other experts' rows out
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)

    def _other_residents(self, stored: Any) -> str:
        """What is wrong with the ids in a state dict, or an empty text."""
        if isinstance(stored, Tensor) and stored.is_meta:
            return ""
        try:
            numbers = stored.tolist() if isinstance(stored, Tensor) else list(stored)
            ids = tuple(map(round, numbers))
            # Fractions come from averaging the state dicts of several sites.
            whole = all(abs(e - number) < 1e-3 for e, number in zip(ids, numbers, strict=True))
        except (TypeError, ValueError, OverflowError):
            return f"must be ids in a state dict, got {stored!r}"
        if not whole:
            return f"must be whole numbers in a state dict, got {numbers}"
        if ids == self.resident_experts:
            return ""
        return (
            f"must be {list(self.resident_experts)} in a state dict for this layer, got "
            f"{list(ids)}; load it into a layer built with resident_experts={list(ids)}"
        )

    def reset_parameters(self) -> None:
        """Draws weights of standard deviation 1/sqrt(fan-in) that depend only on (seed,
        layer_index, expert id); sets biases to 0.
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

        Args:
            resident_experts: as many ids as before.
            weights: by id, as `expert_weights` returns them: of every expert that arrives, and of
                others to be overwritten. The rows of experts that stay are moved.

        Returns the ids that arrived. Raises ValueError, before anything is changed, for another
        number of ids, ids out of range or repeated, and missing or misshapen weights.
        """
        weights = weights or {}
        ids = resident_ids(resident_experts, self.num_experts)
        if len(ids) != self.num_resident:
            raise ValueError(
                f"resident_experts must have {self.num_resident} ids as before, got {len(ids)}: "
                f"{ids}"
            )
        arrived = tuple(e for e in ids if e not in self.resident_experts)
        missing = [e for e in arrived if e not in weights]
        if missing:
            raise ValueError(
                f"weights must have all experts that arrive, {list(arrived)}, got none of {missing}"
            )
        parts = [self.part(name) for name in self.parts]
        wanted = tuple(tuple(part.shape[1:]) for part in parts)
        for expert, given in weights.items():
            if expert not in ids:
                raise ValueError(f"weights must be of experts in {ids}, got expert {expert}")
            if len(given) != len(parts) or not all(isinstance(weight, Tensor) for weight in given):
                kinds = [type(weight).__name__ for weight in given]
                raise TypeError(
                    f"weights[{expert}] must be {_NUMBER[len(parts)]} tensors, got {kinds}"
                )
            shapes = tuple(tuple(weight.shape) for weight in given)
            if shapes != wanted:
                raise ValueError(f"weights[{expert}] must have the shapes {wanted}, got {shapes}")
        # Rows that move are copied first, because they may swap places.
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
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        index_E: Tensor | None = None,
    ) -> tuple[Tensor, ops.RowTable]:
        """The sum over each token's slots on resident experts, [T, D], and the row table used.

        Args:
            x_TD: tokens, of the dtype to compute in.
            weights_TK: combine weights, fp32.
            experts_TK: the chosen experts, int32.
            index_E: int32, the row of each id in `experts_TK`; None = `resident_index`.
        """
        if index_E is None:
            self.tables_to(x_TD.device)
            index_E = self.resident_index
        # Read once: a parametrization computes the weight at every access.
        parts = {name: getattr(self, name) for name in _PARTS}
        given = {name: part for name, part in parts.items() if part is not None}
        require_floats(x_TD, given)
        table = ops.compact(experts_TK, index_E, self.num_resident)
        y_TD = ops.moe_experts(
            x_TD,
            weights_TK,
            table,
            activation=self.activation,
            expand_total=getattr(parts["expand_weight"], "main_grad", None),
            contract_total=getattr(parts["contract_weight"], "main_grad", None),
            **{name: part.to(x_TD.dtype) for name, part in given.items()},
        )
        return y_TD, table

    def extra_repr(self) -> str:
        names = ("hidden_size", "intermediate_size", "num_experts", "activation", "layer_index")
        values = {name: getattr(self, name) for name in (*names, "seed")}
        values["bias"] = self.expand_bias is not None
        values["resident_experts"] = ids_unless_all(self.resident_experts, self.num_experts)
        return changed_arguments(Experts, values | placed(self.expand_weight))


def _same_rows(stored: Any, own: Tensor | None) -> bool:
    return isinstance(stored, Tensor) and own is not None and stored.shape == own.shape


def require_plain(path: str, module: nn.Module) -> None:
    """Raises ValueError unless the router or experts at `path` have exactly the plain Parameters
    that they were built with, one row per expert. Sites cannot exchange the tensors of adapters and
    parametrizations, which have no rows or different ones at every site.
    """
    parts = getattr(module, "parts", None)
    if parts is None:
        raise ValueError(
            f"{path} must be a Router or Experts, got {type(module).__name__}; merge and unload "
            "adapters first"
        )
    found = {name for name, _ in module.named_parameters()}
    if other := sorted(found ^ set(parts)):
        raise ValueError(
            f"{path} must have exactly the parameters {', '.join(parts)}, got a difference in "
            f"{', '.join(other)}; remove parametrizations, pruning and adapters first"
        )


def extra_state_names(model: nn.Module) -> set[str]:
    """The keys of a model's state dict that hold the ids of its resident experts."""
    return {
        f"{name}.{_EXTRA_STATE}" if name else _EXTRA_STATE
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Experts)
    }
