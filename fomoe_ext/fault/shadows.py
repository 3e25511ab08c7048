"""Shadow copies: the last agreed state of every expert, on one site besides its holders.

With replication 1, a lost site takes the only copy of its experts with it. With shadow copies, at
the end of every meeting a holder sends each expert's anchor and outer momentum (fp32) to a site
that does not hold the expert. That site keeps them in host memory and does not compute with them.
If all holders are lost, it becomes the holder, and at most the last round of training is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fomoe_ext.outer.belongings import Belongings, Item, biases_of, elements_of, items_of, ship
from fomoe_ext.outer.sync import OuterSync
from fomoe_ext.placement import wire


class Shadows:
    """The shadow copies on one site."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[int, int], Tensor] = {}
        self._names: list[str] = []
        self.round = 0
        """The round after which they were sent."""

    @property
    def experts(self) -> list[tuple[int, int]]:
        """The experts with a copy here, as (layer, expert)."""
        return sorted(self._vectors)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(vector.nbytes for vector in self._vectors.values())

    @torch.no_grad()
    def refresh(self, sync: OuterSync) -> int:
        """Sends and receives all shadow copies after a meeting; returns the bytes sent.

        A collective. If a site is lost, it raises the transport's error and keeps the old copies.
        """
        placement, me = sync.placement, sync.site
        names = ["anchor", "momentum"] if sync.state.momenta else ["anchor"]
        mine = Belongings.of(sync.state)
        mine.tensors = {k: v for k, v in mine.tensors.items() if k in (*names, "bias")}
        here, biases = items_of(sync.layout), biases_of(sync.layout)
        # All experts of a layer have vectors of equal length, and a site holds at least one.
        length = {
            item[0]: elements_of(here[item], biases.get(item, []), names) for item in here if item
        }
        fresh: dict[tuple[int, int], Tensor] = {}
        moving = wire.shadow_parcels(placement)
        sent = 0
        everyone = sync.groups.group(sync.groups.everyone)
        for layer in range(placement.num_layers):
            some: list[tuple[Item, int, int]] = [
                ((t.layer, t.expert), t.source, t.target) for t in moving if t.layer == layer
            ]
            vectors = {
                item: mine.vector(here[item], biases.get(item, []))
                for item, source, _ in some
                if source == me
            }
            sizes = dict.fromkeys((item for item, _, _ in some), length[layer])
            arrived, count = ship(everyone, me, [p for p in some if me in p[1:]], sizes, vectors)
            sent += count
            fresh |= {item: vector.cpu() for item, vector in arrived.items() if item is not None}
        self._vectors, self._names, self.round = fresh, names, sync.round
        return sent

    def fill(self, mine: Belongings, sync: OuterSync, expert: tuple[int, int]) -> None:
        """Adds an expert's shadow copy to `mine`, for a model that becomes its holder."""
        pieces, biases = items_of(sync.layout)[expert], biases_of(sync.layout).get(expert, [])
        mine.take(self._vectors[expert], pieces, biases, self._names)
