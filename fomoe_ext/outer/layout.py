"""Layout: which piece of which tensor travels with which owner group, the same order everywhere.

A piece is a whole dense tensor, a router row, or one expert's part of a stacked weight or bias. All
pieces of one owner set form one flat vector. Every member has the same pieces at the same offsets,
in whichever rows of its stacked weights they are. The outer optimizer works on that vector, so that
the members get the same bits even where vector and scalar instructions round differently.

The ranges, from large to small:

    ModelLayout    model_layout.py: all of a site's vectors under one placement
      Layout       one vector: an owner group's pieces of one fragment
      TurnLayout   turns.py: a layout without the experts whose turn it is not; anchor, momentum and
                   error stay vectors of the whole layout
      Lane         shards.py: with several ranks per site, the buckets for which this rank meets;
                   they form layouts of their own
        Piece      what has a name and is averaged as one, somewhere in a vector
          Part     the elements of a piece that are in a range (a bucket, or a share of one)
          Span     shards.py: the elements of a piece that some ranks of the site hold, and where
          _Move    shards.py: where a part and a span overlap, copied between vector and memory
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from fomoe_ext.layer.experts import require_plain
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.outer.groups import SiteGroup, SiteGroups
from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Owners, Placement
from fomoe_ext.placement.stale import Wanted

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A tensor, or row `row` of it, which has a name and is averaged as one.

    Only the values of `contributors` are averaged; all owners, of which the contributors are some,
    get the mean. `expert`: (layer, expert) for the weights and the router row of an expert. In a
    site of several ranks an expert's weights are a row of the stack of one rank of the axis
    "expert", rank `expert_rank`.
    """

    key: str
    tensor: Tensor
    row: int | None
    owners: Owners
    contributors: Owners
    expert: tuple[int, int] | None = None
    expert_rank: int | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        shape = self.tensor.shape if self.row is None else self.tensor.shape[1:]
        return shape.numel()

    def part_of(self, tensor: Tensor) -> Tensor:
        """This piece's place in a tensor of the same shape (a moment, a gradient), flat."""
        tensor = tensor.detach()
        return (tensor if self.row is None else tensor[self.row]).view(-1)

    def values(self) -> Tensor:
        """A flat view of the piece."""
        return self.part_of(self.tensor)


class Part(NamedTuple):
    """The elements of one piece in a range of a layout: elements lo..hi-1 of the piece are elements
    at..at+hi-lo-1 of the range."""

    piece: Piece
    lo: int
    hi: int
    at: int

    @property
    def range(self) -> slice:
        """Where the part is in the range."""
        return slice(self.at, self.at + self.hi - self.lo)


class Layout:
    """A flat vector, `numel` elements: the pieces of a fragment that travel in one owner group, one
    after the other."""

    def __init__(self, group: SiteGroup, pieces: Sequence[Piece], fragment: int = 0) -> None:
        self.group, self.pieces, self.fragment = group, tuple(pieces), fragment
        self.position: Callable[[int], int] = lambda element: element
        """The offset of an element in the vector of the whole site (`Lane` layouts are parts of
        it)."""
        self.starts = [0, *accumulate(piece.numel for piece in pieces)]
        self.numel = self.starts[-1]

    @property
    def name(self) -> str:
        """The fragment and the owners, e.g. "0:1-3"."""
        return f"{self.fragment}:{'-'.join(map(str, self.group.owners))}"

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """The parts of pieces that make up elements start..stop-1, in order."""
        index, here = bisect_right(self.starts, start) - 1, start
        while here < stop:
            first, last = self.starts[index], min(stop, self.starts[index + 1])
            if last > here:
                yield Part(self.pieces[index], here - first, last - first, here - start)
                here = last
            index += 1

    def slices(self) -> Iterator[tuple[Piece, slice]]:
        """Every piece with its place in the flat vector."""
        for piece, start, stop in zip(self.pieces, self.starts, self.starts[1:], strict=False):
            yield piece, slice(start, stop)

    def take(self, vector: Tensor, start: int, stop: int) -> Tensor:
        """Elements start..stop-1 of a vector kept for the layout, for reading."""
        return vector[start:stop]

    @contextmanager
    def lent(self, vector: Tensor | None, start: int, stop: int) -> Iterator[Tensor | None]:
        """The same for changing inside the context; None for None."""
        yield None if vector is None else self.take(vector, start, stop)


def find_moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """The MoE layers and their paths in order of appearance."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, MoELayer)]


def trained_elements(model: nn.Module) -> int:
    """Trained elements of the whole model, of all sites: every expert once."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for _, layer in find_moe_layers(model):
        for stack in layer.experts.parameters():
            if stack.requires_grad:
                total += (layer.num_experts - len(stack)) * stack.shape[1:].numel()
    return total


def check_model(model: nn.Module, placement: Placement, site: int, expert_ranks: int = 1) -> None:
    """Raises ValueError when the model's MoE layers are not those of the placement's site, shared
    out over so many ranks. Warns if it has none, but the placement does not put all experts on all
    sites."""
    layers = find_moe_layers(model)
    if not layers and placement.replication < placement.num_sites:
        _log.warning(
            "model has no MoELayer: all sites train all of it, though the placement has "
            "replication %d of %d sites (fomoe_ext.hf.convert makes MoELayers of the blocks of a "
            "transformers model)",
            placement.replication,
            placement.num_sites,
        )
    if layers and len(layers) != placement.num_layers:
        raise ValueError(
            f"placement must have as many layers as the model has MoE layers, {len(layers)}, got "
            f"{placement.num_layers}"
        )
    for index, (path, layer) in enumerate(layers):
        for name in ("router", "experts"):
            require_plain(_join(path, name), layer.get_submodule(name))
        if layer.num_experts != placement.num_experts:
            raise ValueError(
                f"placement must have the {layer.num_experts} experts of {path}, got "
                f"{placement.num_experts}"
            )
        wanted = placement.resident(index, site)
        if layer.site_experts != wanted:
            raise ValueError(
                f"{path} must hold the placement's experts of site {site}, {wanted}, it holds "
                f"{layer.site_experts}"
            )
        over = 1 if layer.dispatch is None else layer.dispatch.axis.size
        if over != expert_ranks:
            raise ValueError(
                f"{path} is sharded over {over} ranks, and mesh has {expert_ranks} on the axis "
                "'expert': both must be given the same mesh"
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.is_contiguous():
            raise ValueError(
                f"parameter {name} must be a contiguous float tensor, got {parameter.dtype} "
                f"of shape {list(parameter.shape)} and strides {parameter.stride()}"
            )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def parameter_pieces(
    model: nn.Module,
    placement: Placement,
    site: int,
    router_mean: str,
    copies: Wanted | None = None,
) -> list[Piece]:
    """Pieces of all trained parameters: dense ones, router rows, experts, in that order.

    `copies`: experts, by layer and site, of which sites compute a frozen copy; where router rows
    are averaged over holders these sites count as such.
    """
    everyone = tuple(range(placement.num_sites))
    layers = find_moe_layers(model)
    special = {
        id(parameter)
        for _, layer in layers
        for module in (layer.router, layer.experts)
        for parameter in module.parameters(recurse=False)
    }
    pieces = [
        Piece(name, p, None, everyone, everyone)
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in special
    ]
    for index, (path, layer) in enumerate(layers):
        for part in layer.router.parts:
            rows = layer.router.get_parameter(part)
            if rows.requires_grad:
                key = _join(path, f"router.{part}")
                everywhere = layer.router_scope == "global"
                pieces += _rows(key, rows, placement, index, site, everywhere, router_mean, copies)
    for index, (path, layer) in enumerate(layers):
        stacks = {name: layer.experts.part(name) for name in layer.experts.parts}
        for expert, (rank, row) in _places(layer).items():
            owners = placement.owners(index, expert)
            for part, stack in stacks.items():
                if stack.requires_grad:
                    key = _join(path, f"experts.{expert}.{part}")
                    pieces.append(Piece(key, stack, row, owners, owners, (index, expert), rank))
    return pieces


def _places(layer: MoELayer) -> dict[int, tuple[int, int]]:
    """The site's experts, ascending: on which rank of the axis "expert", in which row there."""
    ranks = [layer.site_experts] if layer.dispatch is None else layer.dispatch.rank_experts
    found = {e: (rank, row) for rank, ids in enumerate(ranks) for row, e in enumerate(ids)}
    return {expert: found[expert] for expert in layer.site_experts}


def bias_pieces(model: nn.Module, placement: Placement, site: int) -> list[Piece]:
    """Pieces of the selection biases of layers that balance by bias, one per expert.

    With router_scope "global" every site sees the load of all experts: averaged over all.
    """
    pieces = []
    for index, (path, layer) in enumerate(find_moe_layers(model)):
        if layer.balance == "bias":
            key = _join(path, "router.selection_bias")
            bias, everywhere = layer.router.selection_bias, layer.router_scope == "global"
            pieces += _rows(key, bias, placement, index, site, everywhere, "all")
    return pieces


def _rows(
    key: str,
    tensor: Tensor,
    placement: Placement,
    layer: int,
    site: int,
    everywhere: bool,
    mean: str,
    copies: Wanted | None = None,
) -> Iterator[Piece]:
    """One piece per expert: of all sites (averaged over holders or all), or of the holders."""
    everyone = tuple(range(placement.num_sites))
    for expert in range(placement.num_experts):
        owners = placement.owners(layer, expert)
        if everywhere:
            of_sites = copies[layer] if copies else ()
            more = [s for s, experts in enumerate(of_sites) if expert in experts]
            contributors = tuple(sorted({*owners, *more})) if mean == "holders" else everyone
            yield Piece(f"{key}.{expert}", tensor, expert, everyone, contributors)
        elif site in owners:
            yield Piece(f"{key}.{expert}", tensor, expert, owners, owners, (layer, expert))


def block_of(key: str) -> str | None:
    """The block that a piece is in, e.g. "layers.3" of "layers.3.experts.5.expand_weight": the path
    to the first number; None outside of all blocks."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", key)
    return found[0] if found else None


class Fragments:
    """Which fragment of a model every piece meets with (`wire.fragment_of_block`).

    Raises ValueError when the model has fewer blocks than fragments.
    """

    def __init__(self, pieces: Iterable[Piece], fragments: int) -> None:
        blocks = dict.fromkeys(block_of(piece.key) for piece in pieces)
        blocks.pop(None, None)
        if fragments > max(1, len(blocks)):
            raise ValueError(
                f"fragments must be at most the number of the model's blocks, {len(blocks)}, got "
                f"{fragments}"
            )
        self._of_block = {
            block: wire.fragment_of_block(i, fragments) for i, block in enumerate(blocks)
        }

    def of(self, piece: Piece) -> int:
        """The fragment of a piece."""
        return self._of_block.get(block_of(piece.key), 0)


def make_layouts(pieces: Iterable[Piece], groups: SiteGroups, fragments: Fragments) -> list[Layout]:
    """One layout per fragment and owner set, in ascending order of both, pieces in given order."""
    together: dict[tuple[int, Owners], list[Piece]] = {}
    for piece in pieces:
        together.setdefault((fragments.of(piece), piece.owners), []).append(piece)
    return [
        Layout(groups.group(owners), together[fragment, owners], fragment)
        for fragment, owners in sorted(together)
    ]
