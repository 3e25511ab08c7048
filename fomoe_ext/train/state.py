"""The state of a site in training.

Its parts work on it, a checkpoint saves it, and it is replaced when sites join or leave.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data.sequences import BatchIterator, TextData
from fomoe_ext.fault.shadows import Shadows
from fomoe_ext.launch.age import age_of_process
from fomoe_ext.launch.world import World
from fomoe_ext.layer.assemble import local_tensors
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer.sync import OuterSync
from fomoe_ext.placement.placement import Placement
from fomoe_ext.report.tally import Tally
from fomoe_ext.train.divergence import Course
from fomoe_ext.train.pace import Pace
from fomoe_ext.train.round_progress import RoundProgress, of_site


class SiteState:
    """The state of one rank of a site. Its maker sets mesh, model, optimizer and sync."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        data: TextData,
        device: torch.device,
        late: bool = False,
    ) -> None:
        """`config`: resolved. `late`: the site joins a running job."""
        self.started = time.perf_counter() - age_of_process()
        self._before_s = 0.0
        """Seconds of the job before the checkpoint that was resumed."""
        self.config, self.world, self.data, self.device = config, world, data, device
        self.late = late
        """This site has no model yet, or one that is too old: the others send it everything."""
        self.mesh: DeviceMesh | None = None
        """The mesh of all ranks; None if a site is one process."""
        self.run_dir = config.run.run_dir or Path(".")
        self.rounds, self.local_steps = config.run.resolved_rounds, config.run.local_steps
        self.model: LanguageModel
        self.optimizer: torch.optim.Optimizer
        self.sync: OuterSync
        self.batches: BatchIterator = data.train_batches(
            config.inner.batch_size,
            site=world.number,
            num_sites=config.sites.sites,
            seed=config.run.seed,
        )
        self.tally = Tally()
        self.progress, self.pace = RoundProgress(self.local_steps, device), Pace()
        self.course = Course(config, world.number)
        self.shadows = Shadows()
        self.story: list[dict[str, Any]] = []
        """Events for the report: sites that were lost or joined."""
        self.routing: dict[str, Any] | None = None
        """`routing_probe.figures` of the last meeting, if the job has a probe."""

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self.sync.round

    @property
    def step(self) -> int:
        """Local steps of all completed rounds, plus this site's own in the current round.

        A round counts `local_steps` even if some sites took fewer, so between rounds all sites have
        the same number.
        """
        return self.round * self.local_steps + self.progress.steps

    @property
    def steps_in_round(self) -> int:
        """Local steps taken in the current round."""
        return self.progress.steps

    @steps_in_round.setter
    def steps_in_round(self, steps: int) -> None:
        self.progress.steps = steps

    @property
    def step_s(self) -> float:
        """Moving average of the seconds per local step; 0 = not measured yet."""
        return self.pace.seconds

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has sent to other sites: meetings, moved experts and notes."""
        return self.sync.bytes_sent + self.tally.note_bytes

    @property
    def link(self) -> str:
        """A description of the link that meetings use; empty without one."""
        return self.sync.groups.link_words

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.sync.placement

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast; None = the model computes in the dtype of its parameters."""
        return torch.bfloat16 if self.config.run.dtype == "bfloat16" else None

    def count_startup(self) -> None:
        """What has passed since the process started was its start-up."""
        self.tally.startup_s += time.perf_counter() - self.started

    def count_wall(self) -> None:
        """Updates the tally's seconds since the job began."""
        self.tally.wall_s = self._before_s + time.perf_counter() - self.started

    @contextmanager
    def global_model(self) -> Iterator[dict[str, Tensor] | None]:
        """Inside, the model is that of the last meeting. Yields the site's own parameters if they
        differ from it, else None.

        Use it under `torch.no_grad`.
        """
        if not (self.progress.steps or self.config.outer.apart):
            yield None
            return
        local = {name: value.clone() for name, value in local_tensors(self.model).items()}
        self.sync.copy_anchor_to_model()
        yield local
        for name, target in local_tensors(self.model).items():
            target.copy_(local[name])

    # ------------------------------------------------------------------------- for a checkpoint

    def counts(self) -> tuple[dict[str, Any], tuple[float, int, int]]:
        """This rank's counts: those of the job, and those of the current round."""
        self.count_wall()
        return self.tally.state_dict(), self.progress.counts()

    def progress_state(
        self, counts: Sequence[tuple[dict[str, Any], tuple[float, int, int]]]
    ) -> dict[str, Any]:
        """The site's progress for a checkpoint. `counts`: from `counts` of all its ranks."""
        return {
            "data": self.batches.state_dict(),
            "tally": Tally.of_ranks([Tally.from_state(tally) for tally, _ in counts]).state_dict(),
            "steps_in_round": self.progress.steps,
            "uneven": {
                "due": self.progress.due,
                "tokens": self.progress.tokens * self.world.ranks,
                "pace": self.pace.seconds,
            },
            "round_counts": of_site([of_round for _, of_round in counts]),
        }

    def load_progress_state(self, state: Mapping[str, Any], same: bool) -> None:
        """Loads what `progress_state` returned. Unless `same`, counts start from zero.

        `same`: the checkpoint has the same sites and placement. The outer sync must have its round
        already. Raises ValueError for an invalid state.
        """
        self.batches.load_state_dict(state["data"])
        tally = Tally.from_state(state["tally"])
        loss, rows, slots = state["round_counts"]
        if not same:
            self.tally = Tally(steps=tally.steps, from_round=self.round, from_step=tally.steps)
            return
        # From here on the first rank holds the sums of the site.
        leads = self.world.rank == 0
        self.tally = tally if leads else tally.without_counts()
        self.progress.steps = state["steps_in_round"]
        if "uneven" in state:  # not in checkpoints of earlier versions
            self._load_uneven(state["uneven"])
        self.progress.set_counts((loss, rows, slots) if leads else (loss, 0, 0))

    def _load_uneven(self, state: Mapping[str, float]) -> None:
        """Loads steps due, tokens of the round and pace. Raises ValueError for an invalid number of
        steps."""
        due = int(state["due"])
        if not 1 <= due <= self.local_steps:
            raise ValueError(f"steps due must be in [1, {self.local_steps}], got {due}")
        if self.config.inner.uneven_steps:
            self.progress.set_due(due)
        self.progress.tokens = int(state["tokens"]) // self.world.ranks
        self.pace = Pace(float(state["pace"]))
