"""Checks that all sites start with the same arguments and the same initial values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer.agreement import fold
from fomoe_ext.outer.codec import hash_bits
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.site import Site
from fomoe_ext.outer.state import OuterState
from fomoe_ext.placement.placement import Placement


def arguments_of(site: Site, placement: Placement) -> dict[str, Any]:
    """What all sites must have in common, by name."""
    # Stacks without their number of rows, which may differ between the ranks of a site.
    stacks = {id(p) for layer in site.moe_layers for p in layer.experts.parameters()}
    shapes = [
        (n, p.shape[1:] if id(p) in stacks else p.shape, p.requires_grad)
        for n, p in site.model.named_parameters()
    ]
    frozen = {"frozen parameters": _frozen(site.model, stacks)} if site.ranks.size == 1 else {}
    return {
        **frozen,
        "placement": placement.to_dict(),
        **site.options.agreed(),
        "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(),
    }


def _frozen(model: nn.Module, stacks: Collection[int]) -> int:
    """A hash of frozen parameters outside of experts: no meeting would make them equal."""
    tensors = [
        p.detach()
        for p in model.parameters()
        if not p.requires_grad and id(p) not in stacks and not p.is_meta
    ]
    return fold(hash_bits(tensors)) if tensors else 0


def agree_on_arguments(
    ranks: SiteRanks, arguments: dict[str, Any], problem: Exception | None
) -> None:
    """Raises the problem of this site, or MeetingError when another site has one or arguments
    differ."""
    mine = {"problem": str(problem or ""), **arguments}
    everyone = gather_objects(mine, ranks.num_sites * ranks.size)
    if problem is not None:
        raise problem
    for process, other in enumerate(everyone):
        site = process // ranks.size
        if other["problem"]:
            raise MeetingError(f"site {site}: {other['problem']}")
        differing = [name for name in mine if mine[name] != other[name]]
        if differing:
            raise MeetingError(
                f"all sites must have the same {differing[0]}; site {ranks.site} and site {site} "
                "differ"
            )


def digests(state: OuterState) -> dict[str, str]:
    """`OuterSync.hashes`."""
    layout, ranks = state.layout, state.layout.site.ranks
    with layout.held(wanted=not layout.site.options.apart):
        mine = _own_digests(state)
    if ranks.size == 1:
        return mine
    by_rank = ranks.gather(mine)
    return {
        flat.name: hashlib.sha256(
            repr([own.get(flat.name) for own in by_rank]).encode()
        ).hexdigest()
        for flat in layout.site_layouts
    }


def _own_digests(state: OuterState) -> dict[str, str]:
    result, apart = {}, state.layout.site.options.apart
    for i, layout in enumerate(state.layout.layouts):
        digest = hashlib.sha256()
        for piece, place in layout.slices():
            values = state.anchors[i][place] if apart else piece.values()
            # A copy: memory that numpy has seen cannot be resized, as FSDP does.
            digest.update(values.cpu().clone().view(torch.uint8).numpy())
        result[layout.name] = digest.hexdigest()
    return result


def verify(state: OuterState, under_way: bool) -> None:
    """`OuterSync.verify`. `under_way`: whether a fragment is."""
    layout, ranks = state.layout, state.layout.site.ranks
    owners_of = {la.name: la.group.owners for la in layout.site_layouts}
    mine = {name: (owners_of[name], digest) for name, digest in digests(state).items()}
    problem = layout.members.change()
    if under_way:
        problem = problem or "call finish before verify: a fragment is under way"
    told = gather_objects((problem, mine), ranks.num_sites * ranks.size)
    problems = [f"site {i // ranks.size}: {text}" for i, (text, _) in enumerate(told) if text]
    if problems:
        raise MeetingError("; ".join(problems))
    everyone = [of_site for _, of_site in told[:: ranks.size]]
    for first, theirs in enumerate(everyone):
        for name, (owners, digest) in theirs.items():
            differing = [s for s in owners if everyone[s].get(name, ("", ""))[1] != digest]
            if differing:
                raise MeetingError(
                    f"the sites {owners} must hold the same bits of what they share, but site "
                    f"{differing[0]} differs from site {first} (another seed, or not the same "
                    "checkpoint?)"
                )
