"""A training site as fault tolerance sees it, and what it is to become among other sites."""

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
    """What may be under way when a site is lost."""

    def abandon(self) -> None:
        """Gives it up; nothing is waited for."""
        ...


class Recoverable(Protocol):
    """What is read of a site when its company changes, and what becomes another then.

    A `late` one knows nothing of the model yet, or not enough: it may lack model, optimizer and
    sync.
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
    """What happened to the sites, for the report."""
    steps_in_round: int
    """Local steps taken in the round under way."""

    @property
    def round(self) -> int:
        """Rounds completed."""
        ...

    @property
    def step(self) -> int:
        """Local steps of all rounds so far."""
        ...

    @property
    def step_s(self) -> float:
        """Seconds of a local step; 0 = not known yet."""
        ...

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        ...

    @property
    def checkpoints(self) -> Abandonable:
        """What writes its checkpoints."""
        ...

    def make_groups(self, world: World) -> SiteGroups:
        """The connections of all sites; a collective."""
        ...

    def make(
        self, world: World, placement: Placement, groups: SiteGroups, *, arriving: bool
    ) -> tuple[LanguageModel, torch.optim.Optimizer, OuterSync]:
        """A model of what the site holds by a placement, its optimizer and outer sync; a
        collective. `arriving`: see `OuterSync`."""
        ...

    def after_meeting(self, placement: Placement, outcome: RoundReport) -> float:
        """Counts a meeting that broke off and was settled; returns the seconds it took."""
        ...


@dataclass
class Formed:
    """What a site will be once all agree: its place, and a model with all that belongs to it."""

    number: int
    world: World
    placement: Placement
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    sync: OuterSync
    donor: dict[str, Any]
    restored: list[dict[str, Any]] = field(default_factory=list)
    """Experts that nobody held, which this site has taken."""
    told: list[dict[str, Any]] = field(default_factory=list)
    """The same of all sites."""
