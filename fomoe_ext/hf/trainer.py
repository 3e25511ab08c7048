"""Meetings of sites under `transformers.Trainer`: every site runs a Trainer of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fomoe_ext.files import replace_file
from fomoe_ext.hf.convert import layers
from fomoe_ext.outer import OuterSync, RoundReport
from fomoe_ext.placement import Placement
from fomoe_ext.state_files import read_state, write_state
from fomoe_ext.tensor_files import INDEX, SINGLE

STATE_FILE = "outer_sync.safetensors"
_SHOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@contextmanager
def one_process() -> Iterator[None]:
    """Inside, the environment does not say that this process is one of several.

    A Trainer would otherwise join the sites to a data-parallel world, with an exchange at every
    step. Make its TrainingArguments inside, after torch.distributed has been initialised.
    """
    hidden = {name: os.environ.pop(name) for name in _SHOWN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class OuterSyncCallback(TrainerCallback):
    """Lets the sites meet after every `local_steps` optimizer steps, and at the end of training.

    `sync` is the `OuterSync`, from the start of training; `reports` those of its rounds. A
    checkpoint of the Trainer gets a file more, the state of the meetings; after
    `train(resume_from_checkpoint=folder)` training goes on with it.
    """

    def __init__(
        self,
        placement: Placement,
        site: int,
        *,
        local_steps: int,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        """placement, site, options: of `OuterSync`. local_steps: optimizer steps of a round.

        resume_from: the Trainer's checkpoint folder that training will go on from. Raises
        ValueError for local_steps < 1 or a folder without the state of meetings.
        """
        if local_steps < 1:
            raise ValueError(f"local_steps must be at least 1, got {local_steps}")
        self.placement, self.site, self.local_steps = placement, site, local_steps
        self.options = options
        self.sync: OuterSync | None = None
        self.reports: list[RoundReport] = []
        self._state: Any = None
        if resume_from is not None:
            path = Path(resume_from) / STATE_FILE
            if not path.is_file():
                raise ValueError(f"resume_from must be a folder with {STATE_FILE}, got {path}")
            self._state = read_state(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Meets the other sites."""
        optimizer = given["optimizer"]
        self.sync = OuterSync(
            given["model"],
            self.placement,
            self.site,
            inner_optimizer=getattr(optimizer, "optimizer", optimizer),
            local_steps=self.local_steps,
            **self.options,
        )
        if self._state is not None:
            self.sync.load_state_dict(self._state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """After an optimizer step: one step of bias balancing; a meeting where it is due."""
        assert self.sync is not None
        for layer in layers(given["model"]):
            layer.update_selection_bias()
        self.sync.after_step()
        if state.global_step % self.local_steps == 0:
            self.reports.append(self.sync.step())

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Writes the state of the meetings into the checkpoint; and the weights, which transformers
        leaves to rank 0 of torch.distributed, but every site has its own."""
        assert self.sync is not None
        self.sync.finish()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not any((folder / name).exists() for name in (SINGLE, INDEX)):
            with replace_file(folder / SINGLE) as temporary:
                save_model(given["model"], str(temporary))
        write_state(folder / STATE_FILE, self.sync.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """A last meeting, if there have been steps since one, so that all sites end with one
        model. With fragments or overlap steps must be a multiple of local_steps for that."""
        assert self.sync is not None
        if state.global_step % self.local_steps and not self.sync.options.staggered:
            self.reports.append(self.sync.step())
        self.sync.finish()
        if self.sync.options.apart:
            self.sync.copy_anchor_to_model()
