"""Refreshing the frozen copies of absent experts (`fomoe_ext.placement.stale`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.layer.assemble import expert_key
from fomoe_ext.layer.experts import Experts
from fomoe_ext.outer.codec import DeltaPart, get_codec
from fomoe_ext.outer.layout import find_moe_layers
from fomoe_ext.outer.log import MeetingLog
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.outer.reduce import Damaged, broken_seals, seal
from fomoe_ext.outer.site import Site
from fomoe_ext.placement import stale
from fomoe_ext.placement.placement import Placement, Transfer


def check_stale(model: nn.Module, options: OuterOptions, ranks: int) -> None:
    """Raises ValueError if the model has stale experts that these meetings cannot refresh."""
    if all(layer.stale is None for _, layer in find_moe_layers(model)):
        return
    if options.apart or options.optimizer == "ddp":
        raise ValueError(
            "stale_experts need fragments = 1, overlap = 0, expert_turns = 1 and an optimizer that "
            f"is not ddp, got {options.fragments}, {options.overlap}, {options.expert_turns} and "
            f"{options.optimizer!r}"
        )
    if options.staged:
        raise ValueError("staged needs a model without stale_experts: it does not refresh copies")
    if ranks > 1:
        raise ValueError(f"stale_experts need one rank per site, got {ranks}")


def wanted_by_all(site: Site) -> stale.Wanted:
    """By layer and site, the experts of which the site keeps a copy; a collective."""
    mine = [() if la.stale is None else la.stale.resident_experts for la in site.moe_layers]
    size = site.ranks.size
    everyone = gather_objects(mine, site.num_sites * size)[::size]
    return tuple(tuple(of_site[layer] for of_site in everyone) for layer in range(len(mine)))


class StaleCopies:
    """The copies of all sites, and what each site sends and receives to refresh them."""

    def __init__(
        self, site: Site, placement: Placement, log: MeetingLog, wanted: stale.Wanted
    ) -> None:
        """`wanted`: from `wanted_by_all`. `log`: for the number of the round."""
        options = site.options
        self._site, self._placement, self._log = site, placement, log
        self.wanted, self.codec = wanted, get_codec(options.stale_codec)
        self.period = options.stale_period
        layers = [layer.experts for layer in site.moe_layers]
        self._elements = [sum(e.part(n).shape[1:].numel() for n in e.parts) for e in layers]
        self._transfers = stale.copy_transfers(placement, wanted)
        most_bytes = options.bucket_bytes * options.in_flight
        self._waves = stale.copy_waves(wanted, self._elements, self.codec.name, most_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of this site's copies."""
        return sum(la.stale.nbytes for la in self._site.moe_layers if la.stale is not None)

    def predicted_bytes(self, round_index: int) -> int:
        """Bytes that this site will send at the end of a round."""
        if not stale.is_due(round_index, self.period):
            return 0
        site, codec = self._site.index, self.codec.name
        return stale.refresh_bytes(self._placement, self.wanted, site, self._elements, codec)

    def refresh(self) -> int:
        """Overwrites all copies with the holders' parameters; a collective. Returns the bytes sent.

        Raises Damaged for a damaged payload, RuntimeError when a site is lost.
        """
        return sum(self._exchange(layers) for layers in self._waves)

    def _exchange(self, layers: list[int]) -> int:
        site, group, sites = self._site.index, self._site.everyone, range(self._site.num_sites)
        travelling = [t for t in self._transfers if t.layer in layers]
        to_sites = [[t for t in travelling if (t.source, t.target) == (site, s)] for s in sites]
        from_sites = [[t for t in travelling if (t.source, t.target) == (s, site)] for s in sites]
        payloads: dict[tuple[int, int], Tensor] = {}
        for t in (t for to_site in to_sites for t in to_site):
            if (t.layer, t.expert) not in payloads:
                own = self._site.moe_layers[t.layer].experts
                payload = self._encode(t.layer, own.expert_weights(t.expert))
                payloads[t.layer, t.expert] = payload.to(group.device)
        parts = [payloads[t.layer, t.expert] for to_site in to_sites for t in to_site]
        nothing = torch.empty(0, dtype=torch.uint8, device=group.device)
        sent = torch.cat(parts) if parts else nothing
        arriving = [t for from_site in from_sites for t in from_site]
        received = nothing.new_empty(self._size(arriving))
        count = group.send_to_each(
            received, sent, [*map(self._size, from_sites)], [*map(self._size, to_sites)]
        )
        rows = received.split([self._size([t]) for t in arriving]) if arriving else ()
        for index in broken_seals(rows):
            t = arriving[index]
            raise Damaged(
                f"the copy of expert {t.expert} of layer {t.layer} that site {t.source} sent was "
                "damaged on the way"
            )
        for t, row in zip(arriving, rows, strict=True):
            self._decode(t.layer, t.expert, row)
        return count

    def _size(self, transfers: list[Transfer]) -> int:
        codec = self.codec.name
        return sum(stale.copy_bytes(codec, self._elements[t.layer]) for t in transfers)

    def _encode(self, layer: int, weights: tuple[Tensor, ...]) -> Tensor:
        """An expert's payload with its hash, uint8."""
        numel = self._elements[layer]
        payload = torch.empty(
            stale.copy_bytes(self.codec.name, numel), dtype=torch.uint8, device=weights[0].device
        )
        parts, begin = [], 0
        for weight in weights:
            parts.append(DeltaPart(weight.reshape(-1), begin))
            begin += weight.numel()
        self.codec.encode_delta(parts, numel, payload[: self.codec.wire_bytes(numel)])
        seal(payload.unsqueeze(0))
        return payload

    def _decode(self, layer: int, expert: int, payload: Tensor) -> None:
        copies = self._site.moe_layers[layer].stale
        assert copies is not None
        targets, numel = copies.expert_weights(expert), self._elements[layer]
        payload = payload[: self.codec.wire_bytes(numel)].to(targets[0].device)
        values = self.codec.decode(payload, numel)
        sizes = [target.numel() for target in targets]
        for target, value in zip(targets, values.split(sizes), strict=True):
            target.copy_(value.view(target.shape))

    # --------------------------------------------------------------------------------- resuming

    @property
    def fresh(self) -> bool:
        """Whether the copies were refreshed in the last meeting (before the first: are
        unchanged)."""
        return stale.is_due(self._log.round, self.period)

    def description(self) -> dict[str, object]:
        """Identifies this site's copies, as plain data."""
        ids = [list(of_sites[self._site.index]) for of_sites in self.wanted]
        return {"codec": self.codec.name, "experts": ids}

    def tensors(self) -> dict[str, Tensor]:
        """Views of this site's copies by the names that experts have in the global model."""
        result = {}
        for path, layer in find_moe_layers(self._site.model):
            copies: Experts | None = layer.stale
            for expert in () if copies is None else copies.resident_experts:
                for part, tensor in zip(copies.parts, copies.expert_weights(expert), strict=True):
                    result[expert_key(path, expert, part)] = tensor
        return result

    @torch.no_grad()
    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Sets the copies as `refresh` would, from a global model of which `read` returns tensors
        by name."""
        for index, (path, layer) in enumerate(find_moe_layers(self._site.model)):
            copies: Experts | None = layer.stale
            for expert in () if copies is None else copies.resident_experts:
                like = copies.expert_weights(expert)
                names = [expert_key(path, expert, part) for part in copies.parts]
                given = tuple(read(n).to(t) for n, t in zip(names, like, strict=True))
                self._decode(index, expert, self._encode(index, given))
