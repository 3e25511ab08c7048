"""Averaging the values of several sites: their weights, and the treatment of outliers.

A delta much longer than the others is scaled down to a multiple of their median norm, and one with
NaN is left out. This protects against accidents (a diverged site, a broken device), not against a
malicious site, which can do harm below any such limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from fomoe_ext.outer.layout import Piece
from fomoe_ext.placement.placement import Owners


class Treatment(NamedTuple):
    """What `clip_delta` did in a meeting. factors: the factor on the delta of each site, in [0, 1].
    left_out: the sites whose values were left out, ascending; their factor is 0."""

    factors: tuple[float, ...] = ()
    left_out: tuple[int, ...] = ()


UNTREATED = Treatment()
"""No delta is scaled down or left out."""


def treat(norms: Sequence[float], limit: float) -> Treatment:
    """Decides which deltas are left out and which are scaled down, from the norms of all sites.

    A site whose norm is NaN or infinite is left out. Norms above `limit` times the median of the
    others' (for an even number, the mean of the middle two) are scaled down to that; with a median
    of zero none is.
    """
    good = [norm for norm in norms if math.isfinite(norm)]
    longest = limit * median(good) if good else 0.0
    factors = tuple(
        0.0 if not math.isfinite(norm) else longest / norm if 0 < longest < norm else 1.0
        for norm in norms
    )
    return Treatment(factors, tuple(s for s, n in enumerate(norms) if not math.isfinite(n)))


@dataclass(frozen=True)
class Averaging:
    """How the values that several sites have of a piece are averaged.

    `tokens`: by expert (layer, expert), the tokens that each site has routed to it since the last
    meeting, fp64 [num_sites]: the weights of the expert's pieces. `trained`: the tokens that each
    site has trained on since then: the weights of all other pieces; None, or no tokens at all =
    equal weights. `rescale`: multiply the mean by the square root of the number of members, because
    the mean of unrelated deltas is shorter than they are by that factor (DiPaCo, arXiv 2403.10616).
    `treatment`: factors on deltas, and sites to leave out. `someone`: if every member of a piece
    would be left out, all are kept.
    """

    tokens: dict[tuple[int, int], Sequence[float]] | None = None
    rescale: bool = False
    trained: Sequence[float] | None = None
    treatment: Treatment = UNTREATED
    someone: bool = False

    def members(self, piece: Piece) -> Owners:
        """The sites whose values are averaged, possibly none."""
        left_out = self.treatment.left_out
        if not left_out:
            return piece.contributors
        members = tuple(site for site in piece.contributors if site not in left_out)
        return piece.contributors if self.someone and not members else members

    def _by_routed(self, piece: Piece) -> Sequence[float] | None:
        """Token counts as weights, or None. They are not normalised, because a site may have to
        encode its values before it knows the counts of the others."""
        if self.tokens is None or piece.expert is None or len(piece.contributors) == 1:
            return None
        return self.tokens[piece.expert]

    def weight(self, piece: Piece, site: int) -> float:
        """The factor on a site's values of a piece; 0 for a site that is not a member."""
        members = self.members(piece)
        if site not in members:
            return 0.0
        factors, routed = self.treatment.factors, self._by_routed(piece)
        factor = factors[site] if factors else 1.0
        if routed is not None:
            return factor * float(routed[site])
        if self.trained is None or len(members) == 1:
            return factor
        # 1 on average, and exactly 1 if all are equal: error feedback is in units of a delta.
        total = sum(self.trained[member] for member in members)
        return factor * self.trained[site] * len(members) / total if total else factor

    def divisor(self, piece: Piece) -> float:
        """The divisor of the sum of weighted values."""
        members, routed = self.members(piece), self._by_routed(piece)
        total = float(len(members) or 1)
        if routed is not None:
            # No tokens anywhere: the sum contains only the errors of earlier meetings.
            total = float(sum(routed[site] for site in members)) or 1.0
        return total / math.sqrt(len(members) or 1) if self.rescale else total
