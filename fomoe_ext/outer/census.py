"""Census: numbers that all sites exchange before a meeting, from which weights and the treatment of
outliers follow (`fomoe_ext.outer.averaging`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_ext.outer.averaging import UNTREATED, Averaging, treat
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.layout import Layout
from fomoe_ext.outer.routed import TokenCounts
from fomoe_ext.outer.site import Site
from fomoe_ext.placement.overlap import AUTO, TIMES


class Census:
    """Numbers of all sites, fp64 [num_sites, n]: the tokens routed to each expert [L * E], the
    tokens trained on [1], the norm of the delta [1] and the site's times [3]; only those that the
    options need.

    of_deltas, of_rest: how deltas and all other values are averaged; None = equal weights, or not
    known yet. treatment: what `clip_delta` does to the deltas. square: the squared norm of this
    site's delta, fp64 scalar, set before `count`. times: of this site, set before `count`;
    told_times: of all sites, after the exchange.
    """

    def __init__(self, site: Site, counts: TokenCounts, layouts: Sequence[Layout]) -> None:
        """`layouts`: those of the meeting."""
        self._site, self._counts = site, counts
        self._experts = {p.expert for la in layouts for p in la.pieces if p.expert is not None}
        self._own: Tensor | None = None
        self._told: Tensor | None = None
        self.square = torch.zeros((), dtype=torch.float64)
        self.times: tuple[float, ...] = ()
        self.treatment = UNTREATED
        self.of_deltas: Averaging | None = None
        self.of_rest: Averaging | None = None

    @property
    def wanted(self) -> bool:
        """Whether the options need any numbers."""
        return self._site.options.counts_tokens or self._site.options.site_numbers > 0

    @property
    def routed(self) -> Tensor | None:
        """The tokens that each site has routed to each expert, [num_sites, L, E], after the
        exchange."""
        return None if self._told is None else self._by_expert(self._told)

    @property
    def told_times(self) -> list[list[float]]:
        """With overlap "auto": the times of all sites; else empty."""
        if self._told is None or self._site.options.overlap != AUTO:
            return []
        found: list[list[float]] = self._told[:, -TIMES:].tolist()
        return found

    def _by_expert(self, told: Tensor) -> Tensor:
        shape = self._counts.tokens.shape
        return told[:, : shape.numel()].view(-1, *shape)

    def count(self) -> None:
        """The numbers of this site; a collective of its ranks."""
        options, ranks = self._site.options, self._site.ranks
        parts = [self._counts.tokens.flatten()] if options.counts_tokens else []
        if options.site_mean == "tokens":
            parts.append(torch.tensor([self._counts.trained], dtype=torch.float64))
        counts = ranks.sum_(torch.cat(parts)) if parts else torch.empty(0, dtype=torch.float64)
        norm = [self.square.sqrt().view(1)] if options.clip_delta else []
        times = [torch.tensor(self.times, dtype=torch.float64)] if options.overlap == AUTO else []
        self._own = torch.cat([counts, *norm, *times])

    def suppose(self) -> None:
        """Uses this site's own numbers, which are enough for encoding, until the exchange."""
        self.count()
        assert self._own is not None
        own = torch.zeros(self._site.num_sites, len(self._own), dtype=torch.float64)
        own[self._site.index] = self._own
        self._average_by(own)

    def gather(self) -> int:
        """Exchanges the numbers with all sites; returns the bytes sent.

        Raises MeetingError at all sites if all would be left out, or if a number is impossible.
        """
        if not self.wanted:
            return 0
        if self._own is None:
            self.count()
        own, group, ranks = self._own, self._site.everyone, self._site.ranks
        assert own is not None
        gathered, sent = ranks.tell(lambda: _plain(*group.gather_now(own)), "background")
        self._told = torch.tensor(gathered, dtype=torch.float64)
        self._average_by(self._told)
        if len(self.treatment.left_out) == group.size:
            raise MeetingError(
                "nothing was changed: the values of every site, or their moments, are NaN or "
                "infinite"
            )
        return sent if ranks.leads else 0

    def _average_by(self, told: Tensor) -> None:
        """`told` [num_sites, n]: the numbers of all sites, each row as `count` returns it."""
        options = self._site.options
        tokens = trained = None
        if options.expert_mean == "tokens":
            counts = self._by_expert(told)
            tokens = {key: counts[:, key[0], key[1]].tolist() for key in self._experts}
        if options.clip_delta:
            self.treatment = treat(told[:, -1].tolist(), options.clip_delta)
        if options.site_mean == "tokens":
            trained = told[:, told.shape[1] - options.site_numbers].tolist()
            for site, count in enumerate(trained):
                if not 0 <= count < math.inf:
                    raise MeetingError(
                        f"nothing was changed: site {site} says that it has trained on {count} "
                        "tokens"
                    )
        self.of_deltas = Averaging(tokens, options.rescale, trained, self.treatment)
        unscaled = self.treatment._replace(factors=())
        self.of_rest = Averaging(trained=trained, treatment=unscaled)


def _plain(counts: Tensor, sent: int) -> tuple[list[list[float]], int]:
    """The result of `SiteGroup.gather_now` as plain data, for a message to the other ranks."""
    return counts.tolist(), sent
