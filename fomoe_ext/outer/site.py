"""Site: what stays the same in all meetings of this site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer.codec import get_codec
from fomoe_ext.outer.groups import SiteGroup, SiteGroups
from fomoe_ext.outer.layout import find_moe_layers
from fomoe_ext.outer.optimizer import OuterRule
from fomoe_ext.outer.options import OuterOptions


@dataclass(eq=False)
class Site:
    """What stays the same from meeting to meeting.

    model, inner_optimizer: of the local steps (None = optimizer unknown). ranks: the processes of
    the site. groups: connections to the other sites. rule and codec: the outer step and the codec
    that the options name. moe_layers: of the model, in order.
    """

    model: nn.Module
    inner_optimizer: torch.optim.Optimizer | None
    ranks: SiteRanks
    groups: SiteGroups
    options: OuterOptions

    def __post_init__(self) -> None:
        options = self.options
        self.rule = OuterRule(options.optimizer, options.resolved_lr, options.resolved_momentum)
        self.codec = get_codec(options.codec, options.rounding)
        self.moe_layers = [layer for _, layer in find_moe_layers(self.model)]

    @property
    def index(self) -> int:
        """The number of this site."""
        return self.ranks.site

    @property
    def num_sites(self) -> int:
        """The number of sites."""
        return self.ranks.num_sites

    @property
    def everyone(self) -> SiteGroup:
        """The group of all sites."""
        return self.groups.group(self.groups.everyone)


def connect(given: SiteGroups | None, ranks: SiteRanks, timeout_s: float) -> SiteGroups:
    """The given connections, or new ones. Raises ValueError if they belong to another site."""
    num_sites, site, rank, size = ranks.num_sites, ranks.site, ranks.rank, ranks.size
    groups = given or SiteGroups(num_sites, site, timeout_s, rank=rank, ranks=size)
    if (groups.num_sites, groups.site) != (num_sites, site):
        raise ValueError(
            f"groups must be of site {site} of {num_sites}, got those of site "
            f"{groups.site} of {groups.num_sites}"
        )
    if (groups.rank, groups.ranks) != (rank, size):
        raise ValueError(
            f"groups must be of rank {rank} of {size} of the site, got those of rank "
            f"{groups.rank} of {groups.ranks}"
        )
    return groups
