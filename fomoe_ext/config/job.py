"""The configuration of a training job: its sections, and checks across sections.

Needs no torch. `fomoe_ext.config.io` reads and writes these classes (TOML, command line). Field
names are unique over all sections, so that flags need no section (`--num-layers`). A value of
`None` stands for a default that depends on other options and is left out of a saved file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from fomoe_ext.config.data import DataConfig
from fomoe_ext.config.fault import FaultConfig
from fomoe_ext.config.inner import InnerConfig
from fomoe_ext.config.limits import in_section
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.config.outer import OuterConfig
from fomoe_ext.config.presets import PRESETS, check_preset
from fomoe_ext.config.run import RunConfig
from fomoe_ext.config.sites import SitesConfig
from fomoe_ext.placement.wire import check_staggering


@dataclass(frozen=True)
class TrainConfig:
    """A training job. Precedence: preset < TOML file < command line."""

    preset: str = "tiny"
    """Model size: tiny, 54m, 153m, 1.8b, 13.3b, 104b."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sites: SitesConfig = field(default_factory=SitesConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    run: RunConfig = field(default_factory=RunConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        check_preset(self.preset)
        experts, sites = self.model.num_experts, self.sites
        if sites.placement_file is None and experts * sites.replication % sites.sites:
            raise ValueError(
                f"model.num_experts * sites.replication must be a multiple of sites.sites, so that "
                f"every site holds the same number of experts, got {experts} * "
                f"{sites.replication} over {sites.sites} sites"
            )
        if self.inner.batch_size % sites.ranks_per_site:
            raise ValueError(
                f"inner.batch_size (of a site) must be a multiple of sites.ranks_per_site = "
                f"{sites.ranks_per_site}, got {self.inner.batch_size}"
            )
        if self.outer.optimizer == "local-adamw" and self.inner.inner_optimizer != "adamw":
            raise ValueError("outer.optimizer = local-adamw needs inner.inner_optimizer = adamw")
        if sites.reshuffle_moments == "carry" and self.inner.inner_optimizer != "adamw":
            raise ValueError("sites.reshuffle_moments = carry needs inner.inner_optimizer = adamw")
        outer = self.outer
        if self.fault.tolerant:
            self._check_tolerant()
        if self.inner.uneven_steps:
            outer.require_whole("inner.uneven_steps")
        if outer.expert_turns > 1 and (sites.ranks_per_site > 1 or sites.reshuffle_rounds):
            raise ValueError(
                "outer.expert_turns > 1 needs sites.ranks_per_site = 1 and sites.reshuffle_rounds "
                f"= 0, got {sites.ranks_per_site} and {sites.reshuffle_rounds}"
            )
        if sites.stale_experts:
            self._check_stale()
        if self.run.cuda_graph:
            self._check_graph()
        with in_section("outer."):
            check_staggering(
                outer.optimizer,
                outer.fragments,
                outer.overlap,
                outer.overlap_alpha,
                self.run.local_steps,
            )
        if outer.fragments > self.model.num_layers:
            raise ValueError(
                f"outer.fragments must be at most model.num_layers = {self.model.num_layers}, got "
                f"{outer.fragments}"
            )

    def _check_stale(self) -> None:
        absent = self.model.num_experts * (self.sites.sites - self.sites.replication)
        absent //= self.sites.sites
        if self.sites.stale_experts > absent:
            raise ValueError(
                f"sites.stale_experts must be at most {absent}, the number of experts per layer "
                f"that a site does not hold, or -1 for all, got {self.sites.stale_experts}"
            )
        if self.model.router_scope != "global":
            raise ValueError(
                f"sites.stale_experts needs model.router_scope = global, got "
                f"{self.model.router_scope}"
            )
        self.outer.require_whole("sites.stale_experts")

    def _check_graph(self) -> None:
        """Raises ValueError for what a step that is captured as a CUDA graph cannot contain."""
        wrong = {
            "sites.ranks_per_site = 1 (ranks exchange rows within a step)": (
                self.sites.ranks_per_site > 1
            ),
            "an outer.optimizer that is not ddp (sites exchange gradients within a step)": (
                self.outer.optimizer == "ddp"
            ),
            "inner.inner_optimizer = adamw (torch's SGD reads its learning rate on the host)": (
                self.inner.inner_optimizer != "adamw"
            ),
            "outer.expert_mean = equal, and outer.turn_order = numbered if outer.expert_turns > 1 "
            "(a hook of each pass counts the tokens of an expert)": (self.outer.counts_tokens),
        }
        if needed := [what for what, violated in wrong.items() if violated]:
            raise ValueError(f"run.cuda_graph needs {', and '.join(needed)}")

    def _check_tolerant(self) -> None:
        """Raises ValueError for options that a job cannot have if it continues without lost
        sites."""
        sites, outer = self.sites, self.outer
        wanted = {
            "sites.ranks_per_site = 1": sites.ranks_per_site,
            "sites.stale_experts = 0": sites.stale_experts,
            "sites.reshuffle_rounds = 0": sites.reshuffle_rounds,
            "outer.fragments = 1": outer.fragments,
            "outer.overlap = 0": outer.overlap,
            "outer.expert_turns = 1": outer.expert_turns,
            "run.probe_tokens = 0": self.run.probe_tokens,
        }
        needed = [
            f"{what} (got {value})"
            for what, value in wanted.items()
            if not what.endswith(f" = {value}")
        ]
        if outer.optimizer == "ddp":
            needed.append("an outer.optimizer that is not ddp")
        if needed:
            raise ValueError(f"fault.membership = torchft needs {', '.join(needed)}")
        if self.fault.quorum > sites.sites:
            raise ValueError(
                f"fault.quorum must be at most sites.sites = {sites.sites}, got {self.fault.quorum}"
            )

    def with_vocab(self, vocab_size: int) -> TrainConfig:
        """This configuration with the vocabulary grown to at least `vocab_size` token ids."""
        if vocab_size <= self.model.vocab_size:
            return self
        model = dataclasses.replace(self.model, vocab_size=vocab_size)
        return dataclasses.replace(self, model=model)


SECTIONS = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name != "preset")


def preset_config(name: str) -> TrainConfig:
    """The configuration of a preset. Raises ValueError for an unknown preset."""
    check_preset(name)
    return TrainConfig(preset=name, **PRESETS[name]._asdict())
