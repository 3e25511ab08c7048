"""Makes what a site trains with from the job's configuration: mesh, connections, model, optimizer
and outer sync. All functions are collectives of all sites.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.checkpoint.reader import load_global_model
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.links import parse_link
from fomoe_ext.launch.world import World, with_others
from fomoe_ext.layer.dense import shard_dense
from fomoe_ext.layer.mesh import make_mesh
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.sync import OuterSync
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan import traffic as plan
from fomoe_ext.train.job import make_optimizer, outer_options


def make_site_mesh(config: TrainConfig, world: World, device: torch.device) -> DeviceMesh | None:
    """The device mesh over all ranks of all sites; None if a site is one process."""
    if world.ranks == 1:
        return None
    with with_others("the mesh", world.site):
        return make_mesh(world.num_sites, world.ranks, config.sites.replicas, device.type)


def connect(config: TrainConfig, world: World) -> SiteGroups:
    """The process groups of the sites."""
    outer, link = config.outer, config.sites.link
    with with_others("connecting the sites", world.site):
        return SiteGroups(
            world.num_sites,
            world.site,
            outer.timeout_s,
            link=None if link is None else parse_link(link),
            rank=world.rank,
            ranks=world.ranks,
        )


def make_training(
    config: TrainConfig,
    world: World,
    placement: Placement,
    groups: SiteGroups,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    resume: Path | None = None,
    arriving: bool = False,
) -> tuple[LanguageModel, torch.optim.Optimizer, OuterSync]:
    """A model with the experts that a placement gives the site, its optimizer and its outer sync.

    `resume`: a checkpoint from which the weights are loaded. `arriving`: see `OuterSync`.
    """
    model = LanguageModel(
        config.model,
        placement,
        world.site,
        config.run.seed,
        mesh=mesh,
        rank_experts=plan.rank_experts(config, placement, world.site),
        stale_experts=[of_sites[world.site] for of_sites in plan.wanted_copies(config, placement)],
        device=device,
    )
    if world.ranks > 1:
        shard_dense(model, model.blocks, world.num_sites, world.ranks)
    if resume is not None:
        load_global_model(resume, model)
    optimizer = make_optimizer(model, config.inner)
    with with_others("the first meeting", world.site):
        sync = OuterSync(
            model,
            placement,
            world.site,
            outer_options(config),
            inner_optimizer=optimizer,
            groups=groups,
            mesh=mesh,
            arriving=arriving,
        )
    return model, optimizer, sync
