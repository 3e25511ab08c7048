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

    # In no state dict, as said above, and so are their ids.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def part(self, name: str) -> Tensor:  # type: ignore[override]
        """The buffer of one of the `parts`."""
        return self.get_buffer(name)

    def compute_too(
        self, x: Tensor, weights: Tensor, chosen: Tensor, experts: nn.Module, meanwhile: Meanwhile
    ) -> Computed:
        """A `Compute` of the experts of this process and of these copies."""
        y, table = experts(x, weights, chosen)
        more, of_copies = self(x, weights, chosen)
        rows = table.offsets[-1] + of_copies.offsets[-1]
        return Computed(y + more, meanwhile(), rows, rows)

    def prepare(self, device: torch.device) -> None:
        """Moves the tables to a device, and gives the weights memory there if they have none."""
        self.tables_to(device)
        if self.part("expand_weight").is_meta and device.type != "meta":
            with torch.inference_mode(False):  # they outlive the pass that makes them
                self.to_empty(device=device)  # which fills them

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        without_memory = self.part("expand_weight").is_meta
        super()._apply(fn, recurse)
        if without_memory:  # nobody else has values for them
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        return super().extra_repr().replace("resident_experts=", "stale_experts=")

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
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
