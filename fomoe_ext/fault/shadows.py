"""Shadow copies: every expert's last agreed state on one more site than its holders.

With replication 1 a site that dies takes the only copy of its experts along. Here a holder sends
each expert's anchor and outer momentum, fp32, to a site that does not hold it, at the end of every
meeting; that keeps it in host memory and does not compute with it. When all holders are gone the
expert goes on there: at most the last round of its training is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fomoe_ext.outer.belongings import Belongings, Item, biases_of, elements_of, items_of, ship
from fomoe_ext.outer.sync import OuterSync
from fomoe_ext.placement import wire


class Shadows:
    """The shadows that a site keeps."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[int, int], Tensor] = {}
        self._names: list[str] = []
        self.round = 0
        """The meeting they are of."""

    @property
    def experts(self) -> list[tuple[int, int]]:
        """(layer, expert) of all that are here."""
        return sorted(self._vectors)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(vector.nbytes for vector in self._vectors.values())

    @torch.no_grad()
    def refresh(self, sync: OuterSync) -> int:
        """Sends and receives all shadows as they are after a meeting; the bytes sent.

        A collective. Raises what the transport does when a site is lost; then what was here before
        stays.
        """
        placement, me = sync.placement, sync.site
        names = ["anchor", "momentum"] if sync.state.momenta else ["anchor"]
        mine = Belongings.of(sync.state)
        mine.tensors = {k: v for k, v in mine.tensors.items() if k in (*names, "bias")}
        here, biases = items_of(sync.layout), biases_of(sync.layout)
        # An expert's vector is as long as any other's of its layer, and a site holds one at least.
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
        """Adds an expert's shadow to what this site has, for a model that is to hold it."""
        pieces, biases = items_of(sync.layout)[expert], biases_of(sync.layout).get(expert, [])
        mine.take(self._vectors[expert], pieces, biases, self._names)
