"""Frozen copies of experts that are resident at other sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fomoe_ext.layer.compute import Computed, Meanwhile
from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.residents import Residents, resident_ids


class StaleExperts(Experts):
    """Frozen copies of experts that are resident at other sites: computed, but not trained.

    Their weights are buffers outside the state dict, so no optimizer, meeting or checkpoint sees
    them. Gradients flow through them to the input and the combine weights, but not into them. Their
    initial weights are those of the experts; meetings refresh them (`fomoe_ext.outer.stale`).
    """

    def __init__(self, experts: Experts, stale_experts: Sequence[int]) -> None:
        """Copies of `stale_experts`, with the sizes and options of a layer's own `experts`.

        Raises ValueError or TypeError for bad ids and for those of resident experts.
        """
        ids = resident_ids(stale_experts, experts.num_experts, "stale_experts")
        present = sorted(set(ids) & set(experts.resident_experts))
        if present:
            raise ValueError(f"stale_experts must be experts that are not resident, got {present}")
        weight = experts.expand_weight
        super().__init__(
            experts.hidden_size,
            experts.intermediate_size,
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

    # The ids of the copies are not in the state dict either.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def part(self, name: str) -> Tensor:  # type: ignore[override]
        """The buffer of one of the `parts`."""
        return self.get_buffer(name)

    def compute_both(
        self, x: Tensor, weights: Tensor, chosen: Tensor, experts: nn.Module, meanwhile: Meanwhile
    ) -> Computed:
        """A `Compute` for a process that holds all of the site's experts and these copies."""
        y, table = experts(x, weights, chosen)
        y_of_copies, table_of_copies = self(x, weights, chosen)
        rows = table.offsets[-1:] + table_of_copies.offsets[-1:]
        return Computed(y + y_of_copies, meanwhile(), rows, rows)

    def prepare(self, device: torch.device) -> None:
        """Moves the tables to a device, and gives the weights memory there if they have none."""
        self.tables_to(device)
        if self.part("expand_weight").is_meta and device.type != "meta":
            with torch.inference_mode(False):  # they are used after the current pass, too
                self.to_empty(device=device)  # which fills them

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        without_memory = self.part("expand_weight").is_meta
        super()._apply(fn, recurse)
        if without_memory:  # no state dict will bring values for them
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        return super().extra_repr().replace("resident_experts=", "stale_experts=")

    @property
    def nbytes(self) -> int:
        """Size of the copies in bytes."""
        return sum(self.part(name).nbytes for name in self.parts)


def make_stale(
    stale_experts: Sequence[int],
    experts: Experts,
    router_scope: str,
    dispatch: Residents | None,
) -> StaleExperts | None:
    """`StaleExperts` of a layer with these `experts`; None where no ids are given.

    Raises as `StaleExperts` does, and ValueError for another router_scope than "global" and for a
    layer with a `dispatch`.
    """
    ids = list(stale_experts)
    if not ids:
        return None
    if router_scope != "global":
        raise ValueError(
            f"stale_experts must be empty with router_scope {router_scope!r}, got {ids}"
        )
    if dispatch is not None:
        raise ValueError(f"stale_experts must be empty in a layer sharded over a mesh, got {ids}")
    return StaleExperts(experts, ids)
