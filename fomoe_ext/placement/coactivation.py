"""Experts that the same tokens choose, on the same sites or on different ones. Needs no torch.

`Placement.from_coactivation` says what is searched for, `fomoe_ext.model.evaluate` counts. A
placement is searched for all layers at once: they are independent, and numpy is slow on one alone.
Counts are whole numbers that fp64 adds up exactly, so that every site and machine finds the same
placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_ext.placement.designs import Row

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

_SMALL = 1 << 18
_MOST_PASSES = 50
_EXACT = 2**50
"""Sums of counts stay below: fp64 then adds and subtracts them without rounding."""


def is_small(num_layers: int, num_experts: int) -> bool:
    """Whether the counts of all pairs are few enough for every report (2^18 numbers)."""
    return num_layers * num_experts**2 <= _SMALL


def pairs_together(counts: Any, owners_of: Sequence[Row]) -> list[int]:
    """What `Placement.from_coactivation` makes large or small, by layer: pairs of experts that one
    token has chosen, each times the number of sites that hold both.

    `owners_of`: a placement's. Raises as that does, and ValueError where the counts are of other
    sizes than the placement.
    """
    table = checked_counts(counts)
    wanted = (len(owners_of), len(owners_of[0]))
    if table.shape[:2] != wanted:
        raise ValueError(
            f"counts must be of the placement's {wanted[0]} layers of {wanted[1]} experts, got "
            f"{table.shape[0]} of {table.shape[1]}"
        )
    num_sites = 1 + max(site for experts in owners_of for sites in experts for site in sites)
    return [int(value) for value in _objective(_pairs(table), _incidence(owners_of, num_sites))]


def checked_counts(counts: Any) -> _Ints:
    """Counts as an array of ints [L, E, E].

    Raises TypeError for what holds other than ints, ValueError for another shape, and for counts
    that are negative, not symmetric, or too many to be added exactly.
    """
    try:
        table = np.asarray(counts)
    except ValueError:
        raise ValueError(
            "counts must be a table [layer][expert][expert], got rows of several lengths"
        ) from None
    if table.ndim != 3 or 0 in table.shape or table.shape[1] != table.shape[2]:
        raise ValueError(
            f"counts must be a table [layer][expert][expert], got one of shape {list(table.shape)}"
        )
    if not np.issubdtype(table.dtype, np.integer):
        raise TypeError(f"counts must be ints, got {table.dtype}")
    where = "counts[{}][{}][{}]"
    if table.min() < 0:
        at = np.argwhere(table < 0)[0]
        raise ValueError(f"{where.format(*at)} must be at least 0, got {table[tuple(at)]}")
    other = table.swapaxes(1, 2)
    if not np.array_equal(table, other):
        layer, a, b = np.argwhere(table != other)[0]
        raise ValueError(
            f"{where.format(layer, a, b)} must be {where.format(layer, b, a)}, got "
            f"{table[layer, a, b]} and {table[layer, b, a]}"
        )
    most = _EXACT // table.shape[1]
    total = float(table.sum(axis=(1, 2), dtype=np.float64).max())
    if total >= most:
        raise ValueError(f"counts must add up to less than {most} in a layer, got {total:g}")
    return table


def _pairs(counts: _Ints) -> _Floats:
    """fp64, without the pairs of an expert with itself."""
    result = counts.astype(np.float64)
    diagonal = np.arange(counts.shape[1])
    result[:, diagonal, diagonal] = 0.0
    return result


# ---- the search ----------------------------------------------------------------------------------


def search(
    counts: _Ints, start: Sequence[Row], num_sites: int, together: bool
) -> list[list[list[int]]]:
    """A table [layer][expert] -> sites, of the sizes of `start`, an even one; counts as of
    `checked_counts`.

    A local optimum, where no two sites would do better by a swap of an expert for another: from a
    greedy placement or, in layers where that ends worse than `start`, from there.
    """
    signed = _pairs(counts) if together else -_pairs(counts)
    first = _incidence(start, num_sites)
    held = _swapped(signed, _greedy(signed, num_sites, int(first[0, 0].sum())))
    worse = np.flatnonzero(_objective(signed, held) < _objective(signed, first))
    if worse.size:
        held[worse] = _swapped(signed[worse], first[worse])
    return [[np.flatnonzero(sites).tolist() for sites in layer.T] for layer in held]


def _incidence(owners_of: Sequence[Row], num_sites: int) -> NDArray[np.bool_]:
    """Bool [L, S, E]: which site holds which expert."""
    held = np.zeros((len(owners_of), num_sites, len(owners_of[0])), dtype=bool)
    for layer, experts in enumerate(owners_of):
        for expert, sites in enumerate(experts):
            held[layer, sites, expert] = True
    return held


def _objective(counts: _Floats, held: NDArray[np.bool_]) -> _Floats:
    """Counts of the pairs within a site, over all sites, [L]."""
    return (np.matmul(held.astype(np.float64), counts) * held).sum(axis=(1, 2)) / 2


def _greedy(counts: _Floats, num_sites: int, size: int) -> NDArray[np.bool_]:
    """Fills one site after the other: the heaviest expert that is left, then the one that has most
    in common with those already there. An expert that all sites left must hold comes first.
    """
    layers, experts = counts.shape[:2]
    rows = np.arange(layers)
    held = np.zeros((layers, num_sites, experts), dtype=bool)
    left = np.full((layers, experts), num_sites * size // experts)
    heaviest = counts.sum(axis=2)
    for site in range(num_sites):
        common = heaviest.copy()  # decides on the first one alone
        for place in range(size):
            free = (left > 0) & ~held[:, site]
            due = free & (left >= num_sites - site)
            score = np.where(free, common, -np.inf)
            score = np.where(due, _EXACT + common, score)
            chosen = score.argmax(axis=1)
            held[rows, site, chosen] = True
            left[rows, chosen] -= 1
            common = counts[rows, chosen] if place == 0 else common + counts[rows, chosen]
    return held


def _swapped(counts: _Floats, held: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Improves placements until no swap of two experts between two sites does."""
    swaps = _Swaps(counts, held.copy())
    for _ in range(_MOST_PASSES):
        if not swaps.improve():
            break
    return swaps.held


class _Swaps:
    """Swaps between two sites, in all layers at once: of each the best one.

    members: [L, S, M], experts of each site. common: [L, S, E], what an expert has in common with
    those of a site.
    """

    def __init__(self, counts: _Floats, held: NDArray[np.bool_]) -> None:
        self.counts, self.held = counts, held
        layers, sites, _ = held.shape
        self.members = np.nonzero(held)[2].reshape(layers, sites, -1)
        self.common = np.matmul(held.astype(np.float64), counts)
        self._time = 0
        self._changed = np.zeros((layers, sites), dtype=np.int64)
        self._looked = np.full((layers, sites, sites), -1, dtype=np.int64)

    def improve(self) -> bool:
        """One pass over all pairs of sites; False where nothing is left to gain."""
        before, sites = self._time, self.held.shape[1]
        for first in range(sites):
            for second in range(first + 1, sites):
                changed = np.maximum(self._changed[:, first], self._changed[:, second])
                layers = np.flatnonzero(changed > self._looked[:, first, second])
                while layers.size:
                    self._looked[layers, first, second] = self._time
                    layers = self._swap(layers, first, second)
        return self._time > before

    def _swap(self, layers: _Ints, first: int, second: int) -> _Ints:
        """The best swap between two sites in each of the layers; those where it gained."""
        there, back = self.members[layers, first], self.members[layers, second]
        at = layers[:, None]
        difference = self.common[layers, second] - self.common[layers, first]
        gives = np.take_along_axis(difference, there, axis=1)
        takes = -np.take_along_axis(difference, back, axis=1)
        # What both sites hold cannot be swapped.
        gives[self.held[at, second, there]] = -np.inf
        takes[self.held[at, first, back]] = -np.inf
        gain = gives[:, :, None] + takes[:, None, :]
        gain -= 2 * self.counts[at[:, :, None], there[:, :, None], back[:, None, :]]
        flat = gain.reshape(len(layers), -1)
        best = flat.argmax(axis=1)
        good = np.flatnonzero(flat[np.arange(len(layers)), best] > 0)
        if good.size:
            i, j = np.divmod(best[good], back.shape[1])
            self._exchange(layers[good], first, second, i, j)
        return layers[good]

    def _exchange(self, layers: _Ints, first: int, second: int, i: _Ints, j: _Ints) -> None:
        self._time += 1
        a, b = self.members[layers, first, i], self.members[layers, second, j]
        change = self.counts[layers, b] - self.counts[layers, a]
        for site, place, comes, goes, sign in ((first, i, b, a, 1), (second, j, a, b, -1)):
            self.members[layers, site, place] = comes
            self.held[layers, site, goes] = False
            self.held[layers, site, comes] = True
            self.common[layers, site] += sign * change
            self._changed[layers, site] = self._time
