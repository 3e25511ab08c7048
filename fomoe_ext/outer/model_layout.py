"""ModelLayout: the layouts of a site's whole model under the current placement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fomoe_ext.outer.layout import (
    Fragments,
    bias_pieces,
    make_layouts,
    parameter_pieces,
)
from fomoe_ext.outer.members import Members
from fomoe_ext.outer.shards import Lane
from fomoe_ext.outer.site import Site
from fomoe_ext.outer.turns import group_experts
from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Placement
from fomoe_ext.placement.stale import Wanted


class ModelLayout:
    """Which sites share each piece of the model, and which rank of the site meets for it.

    site_layouts, site_biases: of trained parameters and of selection biases, of the whole site.
    layouts, bias_layouts: what this rank meets for; with one rank per site the same. lane: this
    rank's part of them; None with one rank. members: the tensors that take part.
    """

    def __init__(
        self, site: Site, fragments: Fragments, placement: Placement, copies: Wanted = ()
    ) -> None:
        """`copies`: by layer and site, the experts of which the site has a frozen copy."""
        self.site, self._fragments, self._copies = site, fragments, copies
        self.adopt(placement)

    def adopt(self, placement: Placement) -> None:
        """Lays out the pieces for a placement, of which the model already has its resident experts;
        a collective of all sites."""
        site, options = self.site, self.site.options
        self.placement = placement
        pieces = parameter_pieces(
            site.model, placement, site.index, options.router_mean, self._copies
        )
        biases = bias_pieces(site.model, placement, site.index)
        site.groups.create(placement.owner_sets())
        self.site_layouts = make_layouts(pieces, site.groups, self._fragments)
        self.site_biases = make_layouts(biases, site.groups, self._fragments)
        self.members = Members(site.model)
        self.layouts, self.bias_layouts = self.site_layouts, self.site_biases
        self.lane: Lane | None = None
        if site.ranks.size > 1:
            turns = wire.owner_sets(placement)
            self.lane = Lane(
                self.site_layouts, self.site_biases, site.ranks, options.bucket_bytes, turns
            )
            self.layouts, self.bias_layouts = self.lane.of_parameters, self.lane.of_biases

    def disconnect(self) -> None:
        """Drops all layouts and every reference to connections."""
        del self.site.groups
        self.lane = None
        self.layouts, self.bias_layouts, self.site_layouts, self.site_biases = [], [], [], []

    def indices(self, fragment: int) -> list[int]:
        """Which of `layouts` are of a fragment."""
        return [i for i, layout in enumerate(self.layouts) if layout.fragment == fragment]

    # ------------------------------------------------- with several ranks: values of their pieces

    def hold(self, fragment: int) -> None:
        """Gives the pieces the values of the parameters until `release` or `give_back`. With
        several ranks a collective of the site; with one they always have them."""
        if self.lane is not None:
            self.lane.hold(fragment)

    def release(self, fragment: int) -> None:
        """Frees their memory."""
        if self.lane is not None:
            self.lane.release(fragment)

    def give_back(self, fragment: int) -> None:
        """Writes the pieces back to the parameters; a collective of the site's ranks."""
        if self.lane is not None:
            self.lane.give_back(fragment)

    @contextmanager
    def held(self, *, wanted: bool = True) -> Iterator[None]:
        """Inside, the pieces of all fragments have the values of the parameters."""
        fragments = self.lane.fragments if self.lane is not None and wanted else []
        for fragment in fragments:
            self.hold(fragment)
        try:
            yield
        finally:
            for fragment in fragments:
                self.release(fragment)

    # -------------------------------------------------------------------------------- questions

    def elements(self) -> tuple[wire.GroupElements, ...]:
        """Elements this site shares with each owner group, by fragment; of all its ranks."""
        options = self.site.options
        result = [wire.GroupElements({}, {}) for _ in range(options.fragments)]
        for layout in self.site_layouts:
            result[layout.fragment].parameters[layout.group.owners] = layout.numel
        for layout in self.site_biases:
            result[layout.fragment].biases[layout.group.owners] = layout.numel
        if options.expert_turns > 1:  # and one fragment
            of = {la.group.owners: group_experts(la.pieces) for la in self.site_layouts}
            result = [result[0]._replace(experts=of)]
        return tuple(result)

    def predicted_bytes(self, round_index: int, local_steps: int, clip: bool) -> int:
        """Bytes that the site's meetings of a round take (`OuterSync.predicted_bytes`)."""
        site, options = self.site, self.site.options
        counted = sum(layer.num_experts for layer in site.moe_layers)
        return wire.round_bytes(
            self.elements(),
            site.num_sites,
            optimizer=site.rule.name,
            codec=site.codec.name,
            bucket_bytes=options.bucket_bytes,
            local_steps=local_steps,
            clip=clip,
            round_index=round_index,
            moment_periods=options.moment_periods,
            moment_codecs=options.resolved_moment_codecs,
            counted_experts=counted if options.counts_tokens else 0,
            numbers=options.site_numbers,
            staged=options.staged,
            expert_turns=options.expert_turns,
        )
