"""The search of `Placement.from_coactivation`, whose docstring has the objective. Needs no torch.

`fomoe_ext.model.evaluate` counts which experts are chosen together. The layers are independent and
are searched all at once, because numpy is slow on small arrays. Counts are integers, which fp64
adds exactly, so that all sites and machines find the same placement.
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
"""Limit of sums of counts, below which fp64 adds and subtracts them without rounding."""


def is_small(num_layers: int, num_experts: int) -> bool:
    """Whether the counts of all pairs are few enough (2^18 numbers) for every report."""
    return num_layers * num_experts**2 <= _SMALL


def pairs_together(counts: Any, table: Sequence[Row]) -> list[int]:
    """The objective of `Placement.from_coactivation` by layer: the sum over all pairs of experts of
    their count times the number of sites that hold both.

    table: of a placement. Raises as `from_coactivation`, and ValueError if the counts and the table
    differ in size.
    """
    found = checked_counts(counts)
    wanted = (len(table), len(table[0]))
    if found.shape[:2] != wanted:
        raise ValueError(
            f"counts must be for the placement's {wanted[0]} layers of {wanted[1]} experts, got "
            f"{found.shape[0]} of {found.shape[1]}"
        )
    num_sites = 1 + max(site for experts in table for sites in experts for site in sites)
    return [int(value) for value in _objective(_pairs(found), _incidence(table, num_sites))]


def checked_counts(counts: Any) -> _Ints:
    """Counts as an array of ints [L, E, E].

    Raises TypeError for a dtype other than ints, and ValueError for another shape and for counts
    that are negative, not symmetric, or too large to be added exactly.
    """
    try:
        table = np.asarray(counts)
    except ValueError:
        raise ValueError(
            "counts must be a table [layer][expert][expert], got rows of different lengths"
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
    """Counts in fp64 with a zero diagonal."""
    result = counts.astype(np.float64)
    diagonal = np.arange(counts.shape[1])
    result[:, diagonal, diagonal] = 0.0
    return result


# ---- the search ----------------------------------------------------------------------------------


def search(
    counts: _Ints, start: Sequence[Row], num_sites: int, together: bool
) -> list[list[list[int]]]:
    """A table [layer][expert] -> sites of the size of `start`, which is an even table.

    counts: from `checked_counts`. The result is a local optimum: no swap of two experts between two
    sites improves it. The search starts from a greedy placement and, in layers where that ends
    worse than `start`, from `start`.
    """
    signed = _pairs(counts) if together else -_pairs(counts)
    first = _incidence(start, num_sites)
    held = _swapped(signed, _greedy(signed, num_sites, int(first[0, 0].sum())))
    worse = np.flatnonzero(_objective(signed, held) < _objective(signed, first))
    if worse.size:
        held[worse] = _swapped(signed[worse], first[worse])
    return [[np.flatnonzero(sites).tolist() for sites in layer.T] for layer in held]


def _incidence(table: Sequence[Row], num_sites: int) -> NDArray[np.bool_]:
    """Bool [L, S, E]: which site holds which expert."""
    held = np.zeros((len(table), num_sites, len(table[0])), dtype=bool)
    for layer, experts in enumerate(table):
        for expert, sites in enumerate(experts):
            held[layer, sites, expert] = True
    return held


def _objective(counts: _Floats, held: NDArray[np.bool_]) -> _Floats:
    """Sum of the counts of all pairs that share a site, over all sites, [L]."""
    return (np.matmul(held.astype(np.float64), counts) * held).sum(axis=(1, 2)) / 2


def _greedy(counts: _Floats, num_sites: int, size: int) -> NDArray[np.bool_]:
    """Fills one site after the other.

    The first expert of a site is the remaining one with the largest total count, each further one
    that with the largest sum of counts with the experts already there. An expert that all remaining
    sites must hold takes precedence.
    """
    layers, experts = counts.shape[:2]
    rows = np.arange(layers)
    held = np.zeros((layers, num_sites, experts), dtype=bool)
    left = np.full((layers, experts), num_sites * size // experts)
    heaviest = counts.sum(axis=2)
    for site in range(num_sites):
        common = heaviest.copy()  # scores of the first expert only
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
    """Swaps two experts between two sites until no swap improves the objective."""
    swaps = _Swaps(counts, held.copy())
    for _ in range(_MOST_PASSES):
        if not swaps.improve():
            break
    return swaps.held


class _Swaps:
    """Applies the best swap between two sites, in all layers at once.

    members: [L, S, M], experts of each site. common: [L, S, E], sum of an expert's counts with the
    experts of a site.
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
        """One pass over all pairs of sites; returns whether it swapped anything."""
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
        """Applies the best swap between two sites in each layer; returns the layers that gained."""
        there, back = self.members[layers, first], self.members[layers, second]
        at = layers[:, None]
        difference = self.common[layers, second] - self.common[layers, first]
        gives = np.take_along_axis(difference, there, axis=1)
        takes = -np.take_along_axis(difference, back, axis=1)
        # An expert that both sites hold cannot be swapped.
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
