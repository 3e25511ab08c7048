"""The interface of a training site for fault tolerance, and the data of a site that regroups."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data.sequences import BatchIterator
from fomoe_ext.fault.shadows import Shadows
from fomoe_ext.launch.world import World
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.reports import RoundReport
from fomoe_ext.outer.sync import OuterSync
from fomoe_ext.placement.placement import Placement
from fomoe_ext.report.tally import Tally


class Abandonable(Protocol):
    """Work that may be running when a site is lost."""

    def abandon(self) -> None:
        """Abandons it without waiting."""
        ...


class Recoverable(Protocol):
    """A training site, as far as it is read and changed when sites are lost or join.

    A `late` site has no model yet, or one that is too old. It may lack model, optimizer and sync.
    """

    config: TrainConfig
    run_dir: Path
    world: World
    late: bool
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    sync: OuterSync
    batches: BatchIterator
    tally: Tally
    shadows: Shadows
    story: list[dict[str, Any]]
    """Events for the report: sites that were lost or joined."""
    steps_in_round: int
    """Local steps taken in the current round."""

    @property
    def round(self) -> int:
        """Rounds completed."""
        ...

    @property
    def step(self) -> int:
        """Local steps of all completed rounds, plus those of the current one."""
        ...

    @property
    def step_s(self) -> float:
        """Seconds per local step; 0 = not measured yet."""
        ...

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        ...

    @property
    def checkpoints(self) -> Abandonable:
        """The writer of its checkpoints."""
        ...

    def make_groups(self, world: World) -> SiteGroups:
        """The process groups of the sites; a collective."""
        ...

    def make(
        self, world: World, placement: Placement, groups: SiteGroups, *, arriving: bool
    ) -> tuple[LanguageModel, torch.optim.Optimizer, OuterSync]:
        """A model with the experts that a placement gives the site, its optimizer and outer sync.

        A collective. `arriving`: see `OuterSync`.
        """
        ...

    def after_meeting(self, placement: Placement, outcome: RoundReport) -> float:
        """Counts an interrupted meeting that was then applied; returns the seconds it took."""
        ...


@dataclass
class Formed:
    """What a site becomes when all sites confirm: its place, model, optimizer and outer sync."""

    number: int
    world: World
    placement: Placement
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    sync: OuterSync
    donor: dict[str, Any]
    restored: list[dict[str, Any]] = field(default_factory=list)
    """Experts without a holder that this site has restored."""
    told: list[dict[str, Any]] = field(default_factory=list)
    """Restored experts of all sites."""
