"""How values of several sites become one: what each weighs, and which are scaled down or left out.

Deltas that are far longer than the others' are scaled down to a multiple of their median norm, and
those with NaN are left out: against accidents (a diverged site, a broken device). A member that
wants to do harm can do it below any such limit: this is no defence against it.
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
    """What was done to the deltas of a meeting: by site, the factor of its delta, 0..1; and the
    sites, ascending, whose values were left out (their factor is 0)."""

    factors: tuple[float, ...] = ()
    left_out: tuple[int, ...] = ()


UNTREATED = Treatment()
"""Nobody's delta is scaled down or left out."""


def treat(norms: Sequence[float], limit: float) -> Treatment:
    """Which deltas are left out and which scaled down, from all sites' norms.

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
    """How values of a piece become one.

    `tokens`: by piece of an expert, the tokens that each site has routed to it since the last
    meeting, fp64 [num_sites], in place of other weights. `trained`: the tokens that each site has
    trained on since then, the weights of all else; None, or no tokens at all = equal. `rescale`:
    the mean times the square root of the number of members, which a mean of unlike deltas loses of
    its norm (DiPaCo, arXiv 2403.10616). `treatment`: deltas times a factor, and who is left out;
    `someone`: where that is all members of a piece, none of them is.
    """

    tokens: dict[tuple[int, int], Sequence[float]] | None = None
    rescale: bool = False
    trained: Sequence[float] | None = None
    treatment: Treatment = UNTREATED
    someone: bool = False

    def members(self, piece: Piece) -> Owners:
        """The sites whose values are averaged; may be none."""
        left_out = self.treatment.left_out
        if not left_out:
            return piece.contributors
        members = tuple(site for site in piece.contributors if site not in left_out)
        return piece.contributors if self.someone and not members else members

    def _by_routed(self, piece: Piece) -> Sequence[float] | None:
        """Weights that travel as they are, since who encodes may not know the others' yet."""
        if self.tokens is None or piece.expert is None or len(piece.contributors) == 1:
            return None
        return self.tokens[piece.expert]

    def weight(self, piece: Piece, site: int) -> float:
        """What this site's values are multiplied by; 0 for one that is no member."""
        members = self.members(piece)
        if site not in members:
            return 0.0
        factors, routed = self.treatment.factors, self._by_routed(piece)
        factor = factors[site] if factors else 1.0
        if routed is not None:
            return factor * float(routed[site])
        if self.trained is None or len(members) == 1:
            return factor
        # 1 on average, exactly 1 where all are alike: what encoding loses is in units of a delta.
        total = sum(self.trained[member] for member in members)
        return factor * self.trained[site] * len(members) / total if total else factor

    def divisor(self, piece: Piece) -> float:
        """What the sum is divided by."""
        members, routed = self.members(piece), self._by_routed(piece)
        total = float(len(members) or 1)
        if routed is not None:
            # No tokens anywhere: nothing but the error of before is in the sum.
            total = float(sum(routed[site] for site in members)) or 1.0
        return total / math.sqrt(len(members) or 1) if self.rescale else total
